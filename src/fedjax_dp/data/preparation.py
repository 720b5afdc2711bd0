"""One slide to tiles: what is tissue or annotated, cut on one grid and labelled."""

import hashlib
import math
import pathlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from fedjax_dp.data.slides import Slide
from fedjax_dp.data.store.layout import Recipe
from fedjax_dp.data.store.writing import StoredTile
from fedjax_dp.data.tiles import IGNORE_INDEX

_BLOCK_PIXELS = 2048
"""Tiles are visited block by block, so that neighbours find the file's own tiles still decoded."""


class Labels(Protocol):
    """The annotation of one slide; see `annotations.reading.RegionLabels`."""

    def label_region(
        self, x: float, y: float, width: int, height: int, scale_x: float, scale_y: float
    ) -> np.ndarray:
        """uint8 [height, width] of output pixels that begin at level-0 (x, y)."""
        ...


class Tissue(Protocol):
    """Where a slide shows tissue; see `tissue.TissueMask`."""

    def fraction(self, x: float, y: float, width: float, height: float) -> float:
        """Of a rectangle in level-0 pixels."""
        ...


class TileGrid(NamedTuple):
    """The grid over what was scanned of one slide.

    Attributes:
        x: of the grid's corner, level-0 pixels.
        y: likewise.
        step: (x, y), level-0 pixels from tile to tile.
        columns: tiles side by side.
        rows: tiles one below the other.
    """

    x: int
    y: int
    step: tuple[float, float]
    columns: int
    rows: int


def tile_grid(slide: Slide, recipe: Recipe) -> TileGrid:
    """Tiles that cover all that was scanned, each level-0 pixel in exactly one."""
    bounds = slide.bounds
    step = tuple(recipe.tile_size * recipe.mpp / mpp for mpp in slide.mpp)
    return TileGrid(
        x=bounds.x,
        y=bounds.y,
        step=(step[0], step[1]),
        columns=max(1, math.ceil(bounds.width / step[0] - 1e-9)),
        rows=max(1, math.ceil(bounds.height / step[1] - 1e-9)),
    )


def cut_slide(slide: Slide, labels: Labels, tissue: Tissue, recipe: Recipe) -> Iterator[StoredTile]:
    """The tiles of a slide that are worth keeping.

    Guarantees: tiles share no pixel; a tile in which anything but background is annotated is kept
    whatever its tissue; one of which nothing may be seen (all ignored) is not. Pixels beyond the
    slide are white, and ignored.

    Args:
        slide: open.
        labels: its annotation.
        tissue: where it shows tissue.
        recipe: scale, size and threshold.

    Yields:
        The tiles, block by block of the slide.

    Raises:
        SlideError: the file is damaged, or changed meanwhile.
    """
    grid = tile_grid(slide, recipe)
    side, scale = recipe.tile_size, tuple(recipe.mpp / mpp for mpp in slide.mpp)
    per_block = max(1, _BLOCK_PIXELS // math.ceil(max(grid.step)))
    for row, column in _in_blocks(grid, per_block):
        x, y = grid.x + column * grid.step[0], grid.y + row * grid.step[1]
        of_tile = labels.label_region(x, y, side, side, scale[0], scale[1])
        of_tile = _without_outside(of_tile, slide, x, y, scale)
        fraction = tissue.fraction(x, y, *grid.step)
        is_annotated = ((of_tile != 0) & (of_tile != IGNORE_INDEX)).any()
        if (of_tile == IGNORE_INDEX).all() or not (is_annotated or fraction >= recipe.min_tissue):
            continue
        image = slide.read_region(x, y, side, side, recipe.mpp)
        yield StoredTile(x, y, fraction, image, of_tile)
    slide.check_unchanged()


def _in_blocks(grid: TileGrid, per_block: int) -> Iterator[tuple[int, int]]:
    """(row, column) of every tile, block by block."""
    for top in range(0, grid.rows, per_block):
        for left in range(0, grid.columns, per_block):
            for row in range(top, min(top + per_block, grid.rows)):
                for column in range(left, min(left + per_block, grid.columns)):
                    yield row, column


def _without_outside(
    labels: np.ndarray, slide: Slide, x: float, y: float, scale: tuple[float, ...]
) -> np.ndarray:
    """Labels with 255 where a pixel's centre lies beyond the slide."""
    height, width = labels.shape
    right = x + (np.arange(width) + 0.5) * scale[0] >= slide.dimensions[0]
    below = y + (np.arange(height) + 0.5) * scale[1] >= slide.dimensions[1]
    if right.any() or below.any():
        labels = labels.copy()
        labels[:, right] = IGNORE_INDEX
        labels[below] = IGNORE_INDEX
    return labels


def file_digest(path: pathlib.Path) -> str:
    """BLAKE2b, in hex, of a file's bytes: one of the private facts about a slide."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
