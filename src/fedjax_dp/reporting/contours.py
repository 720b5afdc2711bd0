"""Tiles with outlines on them: the panels that the pictures are put together from.

Contours take greens, cyans and yellows, which H&E never does, over a dark seam that keeps them
legible on pale stroma and on glass.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from PIL import Image

from fedjax_dp.data.tiles import IGNORE_INDEX

TRUTH_COLOUR = "#39ff14"
"""Contour of a single foreground class in the truth."""

PREDICTION_COLOUR = "#00e5ff"
"""Contour of a single foreground class in a prediction."""

CLASS_COLOURS = ("#39ff14", "#00e5ff", "#ffee00", "#ff9100", "#ffffff", "#2962ff", "#000000")
"""Contours of several foreground classes, the same in truth and prediction."""

INK = "#22252a"
"""Colour of all text and of the line that matters most."""

DPI = 150
_TILE_INCHES = 2.3


def show_tile(axis: Axes, image: np.ndarray, truth: np.ndarray, *, title: str = "") -> None:
    """The bare tile; what the truth says to ignore is greyed out."""
    rgb = np.asarray(image, np.float64) / (255.0 if np.asarray(image).dtype == np.uint8 else 1.0)
    rgb = np.where((truth == IGNORE_INDEX)[..., None], 0.35 * rgb + 0.65 * 0.75, rgb)
    axis.imshow(np.clip(rgb, 0, 1), interpolation="lanczos")
    axis.set_title(title, fontsize=9, color=INK, pad=4)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def show_contours(
    axis: Axes,
    image: np.ndarray,
    truth: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    *,
    title: str = "",
    single_colour: str = TRUTH_COLOUR,
) -> None:
    """The tile with the outlines of `labels` where the truth is known, a colour per class."""
    show_tile(axis, image, truth, title=title)
    for index in range(1, len(class_names)):
        colour = single_colour if len(class_names) == 2 else _class_colour(index)
        mask = ((labels == index) & (truth != IGNORE_INDEX)).astype(np.float32)
        if not mask.any():
            continue  # older releases of contour() warn of an empty mask
        # A frame of zeros closes the outlines of what the tile's edge cuts.
        mask = np.pad(mask, 1)
        where = np.arange(-1, mask.shape[1] - 1), np.arange(-1, mask.shape[0] - 1)
        outline = axis.contour(*where, mask, levels=[0.5], colors=[colour], linewidths=1.3)
        outline.set_path_effects([withStroke(linewidth=2.3, foreground=(0, 0, 0, 0.55))])
    axis.set(xlim=(-0.5, labels.shape[1] - 0.5), ylim=(labels.shape[0] - 0.5, -0.5))


def panel_grid(
    num_rows: int,
    num_columns: int,
    *,
    num_classes: int,
    group: int = 0,
    has_names: bool = True,
    title_lines: int = 1,
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of square panels laid out in inches; a wider gap after every `group` of columns."""
    left, right, top = (0.36 if has_names else 0.08), 0.08, 0.14 + 0.17 * title_lines
    bottom = 0.45 if num_classes > 2 else 0.1
    column_gap, group_gap, row_gap = 0.07, 0.2, 0.28
    lefts, x = [], left
    for column in range(num_columns):
        lefts.append(x)
        is_last_of_group = group and (column + 1) % group == 0
        x += _TILE_INCHES + (group_gap if is_last_of_group else column_gap)
    width = lefts[-1] + _TILE_INCHES + right
    height = top + num_rows * _TILE_INCHES + (num_rows - 1) * row_gap + bottom
    figure = Figure(figsize=(width, height), dpi=DPI)
    axes = []
    for row in range(num_rows):
        y = height - top - (row + 1) * _TILE_INCHES - row * row_gap
        shape = _TILE_INCHES / width, _TILE_INCHES / height
        axes.append([figure.add_axes((x / width, y / height, *shape)) for x in lefts])
    return figure, axes


def name_row(axis: Axes, name: str) -> None:
    """Write the row's name beside its first panel."""
    axis.set_ylabel(name, fontsize=10, fontweight="bold", color=INK, labelpad=6)


def _class_colour(index: int) -> str:
    return CLASS_COLOURS[(index - 1) % len(CLASS_COLOURS)]


def class_legend(figure: Figure, class_names: Sequence[str]) -> None:
    """Names the colours of several classes; one foreground class needs no legend."""
    if len(class_names) == 2:
        return
    handles = [
        Line2D([], [], color=_class_colour(i), linewidth=3, label=name,
               path_effects=[withStroke(linewidth=4.5, foreground=INK)])
        for i, name in enumerate(class_names) if i
    ]  # fmt: skip
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False)


def dice_text(prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> str:
    """The tile's mean Dice over the foreground classes that are in truth or prediction."""
    is_valid = truth != IGNORE_INDEX
    scores = []
    for index in range(1, num_classes):
        is_true, is_predicted = (truth == index) & is_valid, (prediction == index) & is_valid
        if total := is_true.sum() + is_predicted.sum():
            scores.append(2 * (is_true & is_predicted).sum() / total)
    return f"Dice {np.mean(scores):.2f}" if scores else "nothing there"


def save_figure(figure: Figure, path: str | os.PathLike[str] | None) -> np.ndarray:
    """Write the PNG, if asked to, and return the pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, format="PNG")
    return pixels
