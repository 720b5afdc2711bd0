"""What an attacker rebuilt, beside what he was after."""

import os
from collections.abc import Mapping

import numpy as np

from fedjax_dp.reporting.contours import INK, name_row, panel_grid, save_figure


def save_panel(
    original: np.ndarray,
    columns: Mapping[str, np.ndarray],
    path: str | os.PathLike[str] | None,
    *,
    original_title: str = "original",
) -> np.ndarray:
    """A row for every victim, a column for every setting; pixels as they are, not smoothed.

    Args:
        original: uint8 [V, H, W, 3], the tiles that were sent about.
        columns: title, which may have several lines -> uint8 [V, H, W, 3], what was rebuilt.
        path: the PNG to write; None = none.
        original_title: of the first column.

    Returns:
        The picture, uint8.
    """
    shown = {original_title: original} | dict(columns)
    lines = max(title.count("\n") + 1 for title in shown)
    figure, axes = panel_grid(len(original), len(shown), num_classes=2, group=1, title_lines=lines)
    for column, (title, tiles) in enumerate(shown.items()):
        for row, tile in enumerate(tiles):
            axis = axes[row][column]
            axis.imshow(tile, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        axes[0][column].set_title(title, fontsize=9, color=INK, pad=4)
    for row in range(len(original)):
        name_row(axes[row][0], f"tile {row + 1}")
    return save_figure(figure, path)
