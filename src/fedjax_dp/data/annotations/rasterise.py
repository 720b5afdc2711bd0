"""Polygons on a grid of pixels, by the rule of the pixel's centre."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from fedjax_dp.data.tiles import IGNORE_INDEX

_CROSSINGS = 2**22
"""Of edges with rows, worked on together."""


class Grid(NamedTuple):
    """Pixels on a slide.

    Attributes:
        x: of the grid's corner, in the units of geometries.
        y: likewise.
        width: pixels.
        height: pixels.
        scale: (x, y), units of geometries per pixel.
    """

    x: float
    y: float
    width: int
    height: int
    scale: tuple[float, float]


def covered(geometry: BaseGeometry, grid: Grid) -> tuple[tuple[slice, slice], np.ndarray]:
    """Which pixels of a grid have their centre inside a geometry.

    Guarantees: of two geometries that share a border each centre on it belongs to exactly one: a
    centre is inside where an odd number of edges lies to its left, and an edge spans the rows from
    its upper end, inclusive, to its lower, exclusive; a centre on an edge lies right of it. Holes
    and overlapping parts follow from the same count.

    Args:
        geometry: polygon or multipolygon, valid.
        grid: the pixels.

    Returns:
        (rows, columns) of the part of the grid that the geometry's box meets, and bool of it.
    """
    left, top, right, bottom = geometry.bounds
    columns = _meeting(left, right, grid.x, grid.scale[0], grid.width)
    rows = _meeting(top, bottom, grid.y, grid.scale[1], grid.height)
    width, height = columns.stop - columns.start, rows.stop - rows.start
    if not width or not height:
        return (rows, columns), np.zeros((height, width), bool)
    x0, y0, x1, y1 = _edges(geometry)
    # In pixels, measured from the centre of the grid's first one whatever the part, and downwards
    # whatever the ring's direction: neighbours must round their common edge alike.
    x0, x1 = ((v - grid.x) / grid.scale[0] - 0.5 for v in (x0, x1))
    y0, y1 = ((v - grid.y) / grid.scale[1] - 0.5 for v in (y0, y1))
    is_upwards = y0 > y1
    x0, x1 = np.where(is_upwards, x1, x0), np.where(is_upwards, x0, x1)
    y0, y1 = np.where(is_upwards, y1, y0), np.where(is_upwards, y0, y1)
    begin, end = (np.clip(np.ceil(v), rows.start, rows.stop).astype(np.int64) for v in (y0, y1))
    is_crossing = end > begin
    x0, y0, x1, y1, begin, end = (v[is_crossing] for v in (x0, y0, x1, y1, begin, end))
    flips = np.zeros(height * (width + 1), np.int64)
    slope = (x1 - x0) / (y1 - y0)
    for some in _portions(end - begin):
        # One entry for each row that an edge crosses.
        counts = (end - begin)[some]
        edge = np.repeat(np.arange(some.start, some.stop), counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        row = begin[edge] + np.arange(len(edge)) - first
        column = np.ceil(x0[edge] + slope[edge] * (row - y0[edge]))
        column = np.clip(column, columns.start, columns.stop).astype(np.int64) - columns.start
        flips += np.bincount((row - rows.start) * (width + 1) + column, minlength=len(flips))
    inside = np.cumsum(flips.reshape(height, width + 1), 1)[:, :width] % 2 == 1
    return (rows, columns), inside


def _portions(counts: np.ndarray) -> Iterator[slice]:
    """Edges that are worked on together: a comb of long ones would fill the memory."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _CROSSINGS, side="right")))
        yield slice(start, stop)
        start = stop


def _meeting(low: float, high: float, start: float, scale: float, count: int) -> slice:
    """The pixels along one axis that an interval meets."""
    first = int(np.clip((low - start) // scale, 0, count))
    return slice(first, max(first, int(np.clip((high - start) // scale + 1, 0, count))))


def _edges(geometry: BaseGeometry) -> tuple[Any, ...]:
    """x0, y0, x1, y1, each float64 [n], of all edges of all rings."""
    rings = shapely.get_rings(shapely.get_parts(geometry))
    coordinates, ring = shapely.get_coordinates(rings, return_index=True)
    inside = ring[:-1] == ring[1:]
    start, end = coordinates[:-1][inside], coordinates[1:][inside]
    return start[:, 0], start[:, 1], end[:, 0], end[:, 1]


def rasterise(
    geometries: Sequence[tuple[BaseGeometry, int]], grid: Grid, *, background: int = 0
) -> tuple[np.ndarray, int]:
    """Paints geometries with labels one over the other.

    Args:
        geometries: (geometry, label); of those that overlap the later one is seen.
        grid: the pixels.
        background: label where nothing is painted.

    Returns:
        uint8 [height, width], and how many pixels of one label were painted over with another,
        neither of them `IGNORE_INDEX`.
    """
    labels = np.full((grid.height, grid.width), background, np.uint8)
    painted = np.zeros(labels.shape, bool)
    overpainted = 0
    for geometry, label in geometries:
        box, inside = covered(geometry, grid)
        part, before = labels[box], painted[box]
        claimed = inside & before & (part != label) & (part != IGNORE_INDEX)
        overpainted += int(claimed.sum()) if label != IGNORE_INDEX else 0
        part[inside] = label
        before |= inside
    return labels, overpainted
