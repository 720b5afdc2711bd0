"""Outlines of label maps: painted again they are the map, whatever the bands."""

import numpy as np
import pytest
import shapely
from scipy import ndimage

from fedjax_dp.data.annotations.rasterise import Grid, rasterise
from fedjax_dp.inference.polygons import trace


class Array:
    """A label map in memory."""

    def __init__(self, labels):
        self.labels = np.asarray(labels, np.uint8)
        self.height, self.width = self.labels.shape

    def read(self, y, x, height, width):
        return self.labels[y : y + height, x : x + width]


def traced(labels, rows=1000, **settings):
    array = Array(labels)
    return list(trace(array, band_pixels=rows * array.width, **settings))


def painted(regions, labels):
    height, width = labels.shape
    shapes = [(region.polygon, region.label) for region in regions]
    return rasterise(shapes, Grid(0, 0, width, height, (1.0, 1.0)))[0]


def blobs(seed, height=60, width=70, classes=3, smooth=1.5):
    rng = np.random.default_rng(seed)
    fields = [
        ndimage.gaussian_filter(rng.normal(size=(height, width)), smooth) for _ in range(classes)
    ]
    labels = np.argmax(fields, 0)
    labels[rng.random((height, width)) < 0.05] = 255
    return labels.astype(np.uint8)


def noise(seed, height=40, width=50):
    return np.random.default_rng(seed).choice([0, 0, 1, 2, 255], (height, width)).astype(np.uint8)


def key(region):
    return region.label, shapely.normalize(region.polygon).wkb


@pytest.mark.parametrize("make", [blobs, noise])
@pytest.mark.parametrize("seed", range(6))
def test_painted_again_they_are_the_map(make, seed):
    labels = make(seed)
    regions = traced(labels)
    foreground = np.where(labels == 255, 0, labels)
    assert (painted(regions, labels) == foreground).all()
    for region in regions:
        assert region.polygon.is_valid, shapely.is_valid_reason(region.polygon)
        assert region.polygon.area == round(region.polygon.area)
    for label in (1, 2):
        count = ndimage.label(foreground == label)[1]
        assert sum(region.label == label for region in regions) == count


@pytest.mark.parametrize("make", [blobs, noise])
@pytest.mark.parametrize("rows", [1, 2, 7, 13])
def test_bands_change_nothing(make, rows):
    labels = make(10)
    assert sorted(map(key, traced(labels, rows))) == sorted(map(key, traced(labels)))


def test_a_spiral_across_bands():
    labels = np.zeros((41, 41), np.uint8)
    y = x = 20
    dy, dx, length = 0, 1, 2
    labels[y, x] = 1
    while length < 40:
        for _ in range(2):
            for _ in range(length):
                y, x = y + dy, x + dx
                if 0 <= y < 41 and 0 <= x < 41:
                    labels[y, x] = 1
            dy, dx = dx, -dy
        length += 2
    for rows in (1, 3, 100):
        (region,) = traced(labels, rows)
        assert region.polygon.area == labels.sum()
        assert not region.polygon.interiors


def test_rings_within_rings():
    labels = np.zeros((30, 30), np.uint8)
    for inset, label in ((2, 1), (5, 0), (8, 2), (10, 0), (12, 1)):
        labels[inset : 30 - inset, inset : 30 - inset] = label
    for rows in (4, 100):
        regions = traced(labels, rows)
        assert sorted(region.polygon.area for region in regions) == [36, 96, 276]
        assert sorted(len(region.polygon.interiors) for region in regions) == [0, 1, 1]
        assert (painted(regions, labels) == labels).all()


def test_corners_do_not_join_and_touching_holes_are_valid():
    assert len(traced(np.eye(5, dtype=np.uint8))) == 5
    ring = np.ones((4, 4), np.uint8)
    ring[1, 1] = ring[2, 2] = 0
    (region,) = traced(ring)
    assert region.polygon.is_valid
    assert region.polygon.area == 14
    pinched = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 0]], np.uint8)
    (region,) = traced(pinched)
    assert region.polygon.is_valid
    assert len(region.polygon.interiors) == 1
    assert (painted([region], pinched) == pinched).all()


def test_no_vertex_lies_on_a_straight_line():
    labels = np.zeros((100, 50), np.uint8)
    labels[3:97, 4:40] = 1
    (region,) = traced(labels, rows=5)
    assert len(region.polygon.exterior.coords) == 5
    assert region.polygon.bounds == (4, 3, 40, 97)


def test_small_ones_are_left_out():
    labels = np.zeros((10, 10), np.uint8)
    labels[0, 0], labels[4:7, 4:7] = 1, 1
    assert [region.polygon.area for region in traced(labels, min_area_px=2)] == [9]


@pytest.mark.parametrize("value", [0, 255, 7])
def test_maps_of_one_value(value):
    regions = traced(np.full((20, 30), value, np.uint8), rows=6)
    assert len(regions) == (value == 7)


def test_what_is_closed_is_not_waited_for():
    """The first regions come before the last rows are read."""
    labels = np.zeros((1000, 20), np.uint8)
    labels[::10, 3:6] = 1
    read = []

    class Counted(Array):
        def read(self, y, x, height, width):
            read.append(y)
            return super().read(y, x, height, width)

    next(trace(Counted(labels), band_pixels=20 * 10))
    assert len(read) <= 3
