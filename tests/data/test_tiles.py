"""The grid: every pixel once; tissue by a fixed threshold; the table knows whose tiles it has."""

import numpy as np
import pytest

from fedjax_dp.data.tiles import (
    IGNORE_INDEX,
    UNKNOWN_PATIENT,
    concatenate,
    cut,
    grid,
    tissue_fraction,
)


def _numbered(height, width):
    """An image whose colour is the pixel's number, and labels that are 0 or 1."""
    number = np.arange(height * width).reshape(height, width)
    image = np.stack([number % 251, number // 251 % 251, number // 251**2], axis=-1)
    return image.astype(np.uint8), (number % 2).astype(np.uint8)


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (7, 5), (8, 8), (9, 8), (16, 24), (31, 17), (3, 40)]
)
def test_every_pixel_of_an_image_is_counted_exactly_once(height, width):
    image, labels = _numbered(height, width)
    tiles, tile_labels = cut(image, labels, tile_size=8, stride=8)
    seen = tiles[tile_labels != IGNORE_INDEX].astype(int)
    numbers = seen[:, 0] + 251 * seen[:, 1] + 251**2 * seen[:, 2]
    np.testing.assert_array_equal(np.sort(numbers), np.arange(height * width))
    assert (tile_labels == 1).sum() == (labels == 1).sum()


@pytest.mark.parametrize("stride", [1, 3, 5, 7])
def test_a_smaller_stride_leaves_no_pixel_out(stride):
    image, labels = _numbered(19, 23)
    tiles, tile_labels = cut(image, labels, tile_size=8, stride=stride)
    seen = tiles[tile_labels != IGNORE_INDEX].astype(int)
    numbers = seen[:, 0] + 251 * seen[:, 1] + 251**2 * seen[:, 2]
    assert set(numbers) == set(range(19 * 23))
    assert len(numbers) > 19 * 23  # and pixels repeat, which the exact count would notice
    where = grid(19, 23, 8, stride)
    assert (where.top < 19).all()
    assert (where.left < 23).all()


def test_the_grid_has_no_tile_that_adds_nothing():
    where = grid(20, 16, 8, 4)
    assert sorted(set(where.top.tolist())) == [0, 4, 8, 12]  # 12 + 8 reaches 20
    assert sorted(set(where.left.tolist())) == [0, 4, 8]
    assert (where.height, where.width) == (20, 16)


def test_beyond_the_edge_the_image_is_mirrored_and_the_labels_ignored():
    image, labels = _numbered(6, 6)
    tiles, tile_labels = cut(image, labels, tile_size=8, stride=8)
    np.testing.assert_array_equal(tiles[0, 6:, :6], image[[5, 4]])
    np.testing.assert_array_equal(tiles[0, :6, 6:], image[:, [5, 4]])
    assert (tile_labels[0, 6:] == IGNORE_INDEX).all()
    assert (tile_labels[0, :, 6:] == IGNORE_INDEX).all()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((0, 8, 8, 8), "height"),
        ((8, 8, 0, 1), "tile_size"),
        ((8, 8, 8, 0), "stride"),
        ((8, 8, 8, 9), "stride"),
    ],
)
def test_bad_grids_are_refused(arguments, names):
    with pytest.raises(ValueError, match=names):
        grid(*arguments)


def test_bad_cuts_are_refused():
    image, labels = _numbered(8, 8)
    with pytest.raises(ValueError, match="min_tissue"):
        cut(image, labels, tile_size=8, stride=8, min_tissue=1.5)
    with pytest.raises(ValueError, match="labels"):
        cut(image, labels[:4], tile_size=8, stride=8)


def test_glass_is_left_out_unless_something_is_annotated_there():
    image = np.full((16, 24, 3), 245, np.uint8)
    image[:, 8:16] = (180, 90, 160)
    labels = np.zeros((16, 24), np.uint8)
    labels[3, 20] = 1  # on glass, and annotated all the same
    labels[12, 20] = IGNORE_INDEX  # ignored is not annotated
    tiles, tile_labels = cut(image, labels, tile_size=8, stride=8, min_tissue=0.5)
    assert len(tiles) == 3
    assert (tile_labels == 1).sum() == 1
    assert len(cut(image, labels, tile_size=8, stride=8)[0]) == 6


def test_tissue_of_a_tile_does_not_depend_on_its_neighbours():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 32, 3), np.uint8)
    image[:16] = 240
    labels = np.zeros((32, 32), np.uint8)
    other = image.copy()
    other[16:] = (200, 100, 180)
    for min_tissue in (0.1, 0.5, 0.9):
        kept = cut(image[:16], labels[:16], tile_size=16, stride=16, min_tissue=min_tissue)[0]
        among = cut(other, labels, tile_size=16, stride=16, min_tissue=min_tissue)[0]
        assert len(kept) == 0
        assert len(among) == 2


def test_tissue_fraction_of_known_colours():
    image = np.zeros((1, 4, 3), np.uint8)
    image[0] = [(255, 255, 255), (242, 240, 243), (200, 120, 180), (0, 0, 0)]
    assert tissue_fraction(image) == 0.25


def test_padding_is_no_tissue():
    """One stained pixel row of a sliver must not count as a tile of tissue, nor the reverse."""
    image = np.full((10, 8, 3), 245, np.uint8)
    image[8:] = (180, 90, 160)
    labels = np.zeros((10, 8), np.uint8)
    tiles, _ = cut(image, labels, tile_size=8, stride=8, min_tissue=0.9)
    assert len(tiles) == 1  # the sliver is all tissue, judged on its real pixels
    assert (tiles[0, :2] == (180, 90, 160)).all()


def test_concatenate_names_only_what_has_tiles():
    def part(count, value):
        return np.full((count, 4, 4, 3), value, np.uint8), np.zeros((count, 4, 4), np.uint8)

    table = concatenate(
        [part(2, 1), part(0, 2), part(3, 3), part(1, 4)],
        [("b", "s1", "p"), ("c", "s2", "q"), ("a", "s3", ""), ("b", "s4", "p")],
        4,
    )
    assert table.sites == ("b", "a")
    assert table.slides == ("s1", "s3", "s4")
    assert table.patients == ("p",)
    assert table.site.tolist() == [0, 0, 1, 1, 1, 0]
    assert table.slide.tolist() == [0, 0, 1, 1, 1, 2]
    assert table.patient.tolist() == [0, 0, *[UNKNOWN_PATIENT] * 3, 0]
    assert table.images[:, 0, 0, 0].tolist() == [1, 1, 3, 3, 3, 4]
    assert table.of_site("b").tolist() == [0, 1, 5]
    assert table.of_site("nowhere").tolist() == []


def test_an_empty_table_is_a_table():
    table = concatenate([], [], 4)
    assert len(table) == 0
    assert table.images.shape == (0, 4, 4, 3)
