import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.color import rgb_from_hed

from fedjax_dp.segmentation.augment import HED_FROM_RGB, RGB_FROM_HED, augment

SQUARE = {
    "same": lambda x: x,
    "quarter": lambda x: np.rot90(x, 1),
    "half": lambda x: np.rot90(x, 2),
    "three quarters": lambda x: np.rot90(x, 3),
    "down": lambda x: x[::-1],
    "right": lambda x: x[:, ::-1],
    "diagonal": lambda x: x.swapaxes(0, 1),
    "other diagonal": lambda x: x[::-1, ::-1].swapaxes(0, 1),
}


def make_tile(size=6, seed=0):
    """A tile whose image says its own labels: any slip between them shows."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, (size, size)).astype(np.uint8)
    labels[0, 1] = 255
    image = np.stack([labels / 255] * 3, axis=-1).astype(np.float32)
    return jnp.asarray(image), jnp.asarray(labels)


def views(options, count=1600):
    image, labels = make_tile()
    keys = jax.random.split(jax.random.key(7), count)
    fn = jax.jit(jax.vmap(lambda key: augment(key, image, labels, hed_jitter=0.0, **options)))
    images, moved = (np.asarray(x) for x in fn(keys))
    names = {np.ascontiguousarray(f(np.asarray(labels))).tobytes(): n for n, f in SQUARE.items()}
    assert len(names) == 8  # the tile has no symmetry of its own
    np.testing.assert_array_equal(np.round(images[..., 0] * 255), moved)
    return collections.Counter(names[x.tobytes()] for x in moved)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, set(SQUARE)),
        ({"rotate": False}, {"same", "half", "down", "right"}),
        ({"flips": False}, {"same", "quarter", "half", "three quarters"}),
        ({"flips": False, "rotate": False}, {"same"}),
    ],
)
def test_views_are_the_right_symmetries_equally_often(options, expected):
    counts = views(options)
    assert set(counts) == expected
    mean = 1600 / len(expected)
    stddev = np.sqrt(mean * (1 - 1 / len(expected)))
    for count in counts.values():
        assert abs(count - mean) <= 5 * stddev


def test_everything_off_gives_the_tile_back():
    image, labels = make_tile()
    same = augment(jax.random.key(0), image, labels, flips=False, rotate=False, hed_jitter=0.0)
    np.testing.assert_array_equal(same[0], image)
    np.testing.assert_array_equal(same[1], labels)


def test_stain_matrix_is_the_published_one():
    np.testing.assert_allclose(RGB_FROM_HED, rgb_from_hed, rtol=1e-6)
    np.testing.assert_allclose(HED_FROM_RGB @ RGB_FROM_HED, np.eye(3), atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_jitter_scales_and_shifts_each_stain_within_its_range(seed):
    rng = np.random.default_rng(seed)
    image = jnp.asarray(rng.uniform(0.3, 0.8, (16, 16, 3)), jnp.float32)
    labels = jnp.zeros((16, 16), jnp.uint8)
    options = {"flips": False, "rotate": False, "hed_jitter": 0.1}
    moved, _ = augment(jax.random.key(seed), image, labels, **options)
    before, after = (
        (-np.log(np.asarray(x, np.float64)) @ np.linalg.inv(RGB_FROM_HED)).reshape(-1, 3)
        for x in (image, moved)
    )
    fits = [np.polyfit(before[:, i], after[:, i], 1) for i in range(3)]
    for i, (scale, shift) in enumerate(fits):
        np.testing.assert_allclose(after[:, i], scale * before[:, i] + shift, atol=1e-4)
        assert abs(scale - 1) <= 0.1 + 1e-4
        assert abs(shift) <= 0.1 + 1e-4
    assert len({round(float(x), 6) for fit in fits for x in fit}) == 6  # six draws, not one


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_jitter_stays_in_range_at_black_and_white(dtype):
    image = jnp.asarray(np.repeat([0.0, 1.0], 48).reshape(4, 8, 3), dtype)
    labels = jnp.full((4, 8), 255, jnp.uint8)
    for seed in range(5):
        moved, kept = augment(jax.random.key(seed), image, labels, rotate=False, hed_jitter=0.5)
        assert moved.dtype == dtype
        assert ((moved >= 0) & (moved <= 1)).all()
        assert (kept == 255).all()


def test_small_jitter_is_a_small_change():
    image, labels = make_tile(16)
    image = 0.2 + 0.6 * image
    options = {"flips": False, "rotate": False}
    moved, _ = augment(jax.random.key(1), image, labels, hed_jitter=1e-6, **options)
    np.testing.assert_allclose(moved, image, atol=1e-5)
    moved, _ = augment(jax.random.key(1), image, labels, hed_jitter=0.05, **options)
    assert np.abs(np.asarray(moved - image)).max() > 1e-3


def test_a_tile_depends_on_its_own_key_alone():
    tiles = [make_tile(8, seed) for seed in range(3)]
    images, labels = (jnp.stack(x) for x in zip(*tiles, strict=True))
    keys = jax.random.split(jax.random.key(3), 3)
    together = jax.vmap(augment)(keys, images, labels)
    for i in range(3):
        alone = augment(keys[i], images[i], labels[i])
        np.testing.assert_allclose(together[0][i], alone[0], atol=1e-6)
        np.testing.assert_array_equal(together[1][i], alone[1])


def test_errors_say_what_to_change():
    image, labels = jnp.zeros((4, 6, 3)), jnp.zeros((4, 6), jnp.uint8)
    with pytest.raises(ValueError, match="rotate=False"):
        augment(jax.random.key(0), image, labels)
    assert augment(jax.random.key(0), image, labels, rotate=False)[0].shape == (4, 6, 3)
    with pytest.raises(ValueError, match="hed_jitter=-1"):
        augment(jax.random.key(0), image, labels, rotate=False, hed_jitter=-1.0)
