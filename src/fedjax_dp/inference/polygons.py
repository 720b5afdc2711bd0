"""The outlines of a label map, along the edges of its pixels, exact and streamed.

A map is read in bands of rows. Parts of one label that touch along an edge are one component, also
across bands; when no later row can touch a component any more, its edges are linked to rings. What
is kept is the boundary of the components that are still open, never their pixels.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import shapely
from skimage.measure import label as components_of

from fedjax_dp.inference.label_file import NOT_ANALYSED, LabelMap

_BAND_PIXELS = 2**24

_EAST, _SOUTH, _WEST, _NORTH = range(4)
_STEP = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])


class Region(NamedTuple):
    """One component of a label map.

    Attributes:
        label: its label.
        polygon: its outline and holes, in corners of pixels: pixel (i, j) covers [j, j + 1) in x
            and [i, i + 1) in y. Its area is its number of pixels.
    """

    label: int
    polygon: shapely.Polygon


def trace(
    labels: LabelMap, *, min_area_px: float = 0.0, band_pixels: int = _BAND_PIXELS
) -> Iterator[Region]:
    """Every component of every label but background and not analysed.

    Guarantees: pixels are of one component where they share an edge, not where only corners touch;
    polygons are valid, without vertices on straight lines; painting all of them by the pixels'
    centres gives the map again, whatever the bands.

    Args:
        labels: the map.
        min_area_px: components of fewer pixels are left out. What they were holes of keeps the
            hole.
        band_pixels: read at once, about.

    Yields:
        The regions, by their last rows.
    """
    rows = max(1, band_pixels // max(labels.width, 1))
    open_ = _Open(labels.width, min_area_px)
    for top in range(0, labels.height, rows):
        count = min(rows, labels.height - top)
        yield from open_.add(top, labels.read(top, 0, count, labels.width))
    yield from open_.add(labels.height, np.zeros((1, labels.width), np.uint8))


class _Open:
    """Components that later rows may touch."""

    def __init__(self, width: int, min_area_px: float) -> None:
        self._min_area_px = min_area_px
        self._last = np.zeros(width, np.uint8)  # labels of the last row
        self._last_part = np.zeros(width, np.int64)  # its components, 0 = none
        self._edges: dict[int, list[np.ndarray]] = {}  # component -> [n, 3] of x, y, direction
        self._label: dict[int, int] = {}
        self._next = 1

    def add(self, top: int, band: np.ndarray) -> Iterator[Region]:
        """Takes rows that begin at `top`; yields what they do not continue."""
        band = np.where(band == NOT_ANALYSED, 0, band)
        if not self._edges and not band.any():
            return  # most of most slides
        parts = components_of(band, background=0, connectivity=1).astype(np.int64)
        parts = self._named(band, parts)
        above = np.concatenate([self._last_part[None], parts])
        self._collect(top, above)
        still = set(np.unique(parts[-1]).tolist())
        self._last, self._last_part = band[-1], parts[-1]
        for part in [part for part in self._edges if part not in still]:
            edges = np.concatenate(self._edges.pop(part))
            label = self._label.pop(part)
            polygon = _polygon(edges)
            if polygon.area >= self._min_area_px:
                yield Region(label, polygon)

    def _named(self, band: np.ndarray, parts: np.ndarray) -> np.ndarray:
        """The components with names that hold across bands; those that meet now become one."""
        count = int(parts.max(initial=0))
        names: np.ndarray = np.arange(self._next - 1, self._next + count)
        names[0] = 0
        self._next += count
        meets = (self._last_part > 0) & (self._last == band[0])
        pairs = np.unique(np.stack([self._last_part[meets], names[parts[0][meets]]], -1), axis=0)
        parent: dict[int, int] = {}

        def root(name: int) -> int:
            while parent.get(name, name) != name:
                name = parent[name]
            return name

        for older, newer in pairs.tolist():
            first, second = sorted((root(older), root(newer)))
            parent[second] = first
        roots = {name: root(name) for name in parent}
        for gone, kept in roots.items():
            if gone != kept and gone in self._edges:
                self._edges.setdefault(kept, []).extend(self._edges.pop(gone))
                self._label.setdefault(kept, self._label.pop(gone))
        if roots:
            old_names, kept_names = np.array(sorted(roots.items())).T
            for array in (names, self._last_part):
                place = np.minimum(np.searchsorted(old_names, array), len(roots) - 1)
                is_known = old_names[place] == array
                array[is_known] = kept_names[place[is_known]]
        present, places = np.unique(parts, return_index=True)
        for name, value in zip(names[present].tolist(), band.ravel()[places].tolist(), strict=True):
            if name:
                self._label.setdefault(name, value)
                self._edges.setdefault(name, [])
        return names[parts]

    def _collect(self, top: int, parts: np.ndarray) -> None:
        """Notes the edges between components, of the row before and these; inside lies right."""
        found = []
        upper, lower = parts[:-1], parts[1:]
        differs = upper != lower
        for inside, mask, direction, shift in (
            (lower, differs & (lower > 0), _EAST, 0),
            (upper, differs & (upper > 0), _WEST, 1),
        ):
            y, x = np.nonzero(mask)
            found.append((inside[y, x], x + shift, y + top, np.full(len(x), direction)))
        rows = np.pad(parts[1:], ((0, 0), (1, 1)))
        left, right = rows[:, :-1], rows[:, 1:]
        differs = left != right
        for inside, mask, direction, shift in (
            (left, differs & (left > 0), _SOUTH, 0),
            (right, differs & (right > 0), _NORTH, 1),
        ):
            y, x = np.nonzero(mask)
            found.append((inside[y, x], x, y + top + shift, np.full(len(x), direction)))
        part, *edge = (np.concatenate(column) for column in zip(*found, strict=True))
        if not len(part):
            return
        order = np.argsort(part, kind="stable")
        names, starts = np.unique(part[order], return_index=True)
        table = np.stack(edge, -1)[order]
        for name, some in zip(names.tolist(), np.split(table, starts[1:]), strict=True):
            self._edges[name].append(some)


def _polygon(edges: np.ndarray) -> shapely.Polygon:
    """Links the edges [n, 3] of one component to its outline and holes."""
    rings = _rings(edges)
    areas = [_signed_area(ring) for ring in rings]
    outer = int(np.argmax(areas))
    return shapely.Polygon(rings[outer], [r for i, r in enumerate(rings) if i != outer])


def _rings(edges: np.ndarray) -> list[np.ndarray]:
    """Closed lines [n, 2] of corners where their direction changes."""
    x, y, direction = edges.astype(np.int64).T
    ends = edges[:, :2] + _STEP[direction]
    width = int(max(x.max(), ends[:, 0].max())) + 1
    begin = (y * width + x) * 4
    end = (ends[:, 1].astype(np.int64) * width + ends[:, 0]) * 4
    order = np.argsort(begin + direction)
    keys = (begin + direction)[order]
    following = np.full(len(edges), -1)
    # Left before straight before right: where two corners of a component touch, the hole between
    # them and the outside become rings of their own, which meet in a point, as is valid.
    for turn in (3, 0, 1):
        wanted = end + (direction + turn) % 4
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        is_there = (keys[place] == wanted) & (following < 0)
        following[is_there] = order[place[is_there]]
    after, turns = following.tolist(), (direction[following] != direction).tolist()
    points = ends.tolist()
    seen = bytearray(len(after))
    rings = []
    for start in range(len(after)):
        if seen[start]:
            continue
        ring, edge = [], start
        while not seen[edge]:
            seen[edge] = 1
            if turns[edge]:
                ring.append(points[edge])
            edge = after[edge]
        rings.append(np.array(ring))
    return rings


def _signed_area(ring: np.ndarray) -> float:
    """Positive where the inside lies right of the line, y pointing down."""
    x, y = ring.astype(np.float64).T
    return float(0.5 * (x * np.roll(y, -1) - np.roll(x, -1) * y).sum())
