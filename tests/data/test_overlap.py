"""Shared tissue is found at any shift, and after compression; blank borders are not tissue."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from fedjax_dp.data.overlap import fingerprint, overlapping_pairs
from fedjax_dp.data.synthetic import synthetic_federation


def _texture(height, width, seed):
    """Smooth texture with a grain, as stained tissue has; uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    coarse = ndimage.gaussian_filter(rng.normal(size=(height, width, 3)), (3, 3, 0))
    pixels = 150 + coarse * (30 / coarse.std()) + rng.normal(size=coarse.shape) * 4
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _pairs(images, groups=None):
    return overlapping_pairs([fingerprint(i) for i in images], groups or ["site"] * len(images))


def _jpeg(image, quality=60):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality)
    return np.array(Image.open(stream))


@pytest.mark.parametrize(
    ("y", "x"), [(0, 104), (104, 0), (100, 100), (37, 61), (-40, 90), (104, -23)]
)
def test_equal_pixels_are_found_at_any_shift(y, x):
    field = _texture(300, 300, 0)
    one, other = field[80:208, 80:208], field[80 + y : 208 + y, 80 + x : 208 + x]
    assert _pairs([one, other, _texture(128, 128, 1)], ["a", "b", "a"]) == [(0, 1)]


def test_an_image_inside_another_is_found():
    field = _texture(300, 300, 0)
    assert _pairs([field, _texture(64, 64, 1), field[100:164, 40:104]], ["a", "b", "c"]) == [(0, 2)]


@pytest.mark.parametrize("overlap", [8, 24, 60])
@pytest.mark.parametrize("axis", [0, 1])
def test_compressed_neighbours_are_found(overlap, axis):
    field = _texture(256, 256, 2)
    field = field if axis == 0 else field.transpose(1, 0, 2)
    one, other = field[:128, :128], field[128 - overlap : 256 - overlap, :128]
    if axis == 1:
        one, other = one.transpose(1, 0, 2), other.transpose(1, 0, 2)
    one, other = _jpeg(np.ascontiguousarray(one)), _jpeg(np.ascontiguousarray(other))
    assert (one != other).mean() > 0.5
    assert _pairs([other, one]) == [(0, 1)]


def test_neighbours_without_overlap_are_not_flagged():
    field = _texture(384, 384, 3)
    images = [field[y : y + 128, x : x + 128] for y in (0, 128, 256) for x in (0, 128, 256)]
    assert _pairs(images) == []
    assert _pairs([_jpeg(np.ascontiguousarray(i)) for i in images]) == []


@pytest.mark.parametrize("noise", [0, 1])
def test_blank_borders_are_no_overlap(noise):
    rng = np.random.default_rng(4)
    images = []
    for seed in range(6):
        image = np.full((128, 128, 3), 244, np.uint8)
        image[40:90, 40:90] = _texture(50, 50, seed)
        images.append(image + rng.integers(0, noise + 1, image.shape).astype(np.uint8))
    assert _pairs(images) == []
    assert _pairs([_jpeg(i) for i in images]) == []


def test_periodic_patterns_are_no_overlap():
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[::4] = 200
    squares = np.kron(np.indices((16, 16)).sum(0) % 2 * 150, np.ones((8, 8))).astype(np.uint8)
    assert _pairs([stripes, np.repeat(squares[..., None], 3, axis=2)], ["a", "b"]) == []


def test_a_burned_in_scale_bar_is_no_overlap():
    letters = np.random.default_rng(5).integers(0, 2, (24, 60), np.uint8) * 255
    images = [_texture(128, 128, seed) for seed in (0, 1)]
    for image in images:
        image[90:114, 60:120] = letters[..., None]
    assert _pairs(images, ["a", "b"]) == []


def test_tiny_images_have_no_landmarks():
    for shape in ((1, 1, 3), (4, 60, 3), (60, 4, 3), (8, 8, 3)):
        _pairs([np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)])
    assert _pairs([]) == []


def test_real_consep_patches(real_data):
    """By their source's account 0-8 lie edge to edge and 9-11 overlap the row above by 24 px."""
    folder = real_data / "formats/06_consep_uhcw_patches/images"
    images = [np.array(Image.open(folder / f"train_1_{i:03d}.jpg")) for i in range(12)]
    assert _pairs(images) == [(6, 9), (7, 10), (8, 11)]


def test_small_images_do_not_overlap_by_chance():
    table = synthetic_federation(
        num_training_sites=1, patients_per_site=40, tiles_per_patient=2, tile_size=64,
        num_external_sites=0, evaluation_patients_per_site=1, num_workers=1,
    ).train  # fmt: skip
    fingerprints = [fingerprint(image) for image in table.images]
    assert overlapping_pairs(fingerprints, ["site"] * len(fingerprints)) == []
