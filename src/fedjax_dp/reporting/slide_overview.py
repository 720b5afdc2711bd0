"""One picture of a slide at low power: what was taken for tissue, and which tiles were cut."""

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fedjax_dp.data.slides import Slide
from fedjax_dp.data.tissue import TissueMask
from fedjax_dp.reporting.contours import save_figure

_DPI = 100
_TISSUE, _TILE = "#009E73", "#0072B2"
_MAX_TILES = 20_000
"""Drawn one by one; of more, the picture would show a blue area anyway."""


def save_overview(
    path: pathlib.Path,
    slide: Slide,
    tissue: TissueMask,
    *,
    tiles_xy: Sequence[tuple[float, float]],
    tile_size: tuple[float, float],
    title: str,
    max_side: int = 1600,
) -> None:
    """Draws a slide with the outline of its tissue and its tiles.

    Args:
        path: of the PNG.
        slide: open.
        tissue: what was found.
        tiles_xy: corners of the tiles, level-0 pixels.
        tile_size: (width, height) of a tile, level-0 pixels.
        title: in the picture; whoever sees the picture sees the slide, too.
        max_side: of the picture, pixels.
    """
    width, height = (side * own for side, own in zip(slide.dimensions, slide.mpp, strict=True))
    mpp = max(max(width, height) / max_side, *slide.mpp)
    size = max(1, round(width / mpp)), max(1, round(height / mpp))
    pixels = slide.read_region(0, 0, *size, mpp)
    figure = Figure(figsize=(max(size[0], 500) / _DPI, size[1] / _DPI + 0.5), dpi=_DPI)
    axes = figure.add_axes((0, 0, 1, size[1] / (size[1] + 0.5 * _DPI)))
    extent = (0, slide.dimensions[0], slide.dimensions[1], 0)
    axes.imshow(pixels, extent=extent)
    if tissue.mask.any() and not tissue.mask.all() and min(tissue.mask.shape) > 1:
        shape = tissue.mask.shape
        x, y = ((np.arange(n) + 0.5) * s for n, s in zip(shape[::-1], tissue.scale, strict=True))
        axes.contour(x, y, tissue.mask.astype(float), [0.5], colors=_TISSUE, linewidths=1.0)
    patches = [Rectangle(corner, *tile_size) for corner in tiles_xy[:_MAX_TILES]]
    axes.add_collection(
        PatchCollection(patches, facecolor="none", edgecolor=_TILE, linewidth=0.5, alpha=0.8)
    )
    axes.set(xlim=extent[:2], ylim=extent[2:])
    axes.set_axis_off()
    found = tissue.mask.sum() * float(np.prod(np.multiply(tissue.scale, slide.mpp))) * 1e-6
    figure.suptitle(
        f"{title}: {len(tiles_xy):,} tiles (blue), {found:.2f} mm² of tissue (green)",
        fontsize=10,
        y=0.995,
    )
    save_figure(figure, path)
