"""One picture of a segmented slide: the slide at low power under its labels."""

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fedjax_dp.data.slides import Slide
from fedjax_dp.inference.label_file import NOT_ANALYSED, LabelMap
from fedjax_dp.reporting.contours import save_figure

_DPI = 100
_OPACITY = 0.45
_STRIP_ROWS = 256
_SAFE = ((255, 255, 255), (213, 94, 0), (0, 114, 178), (0, 158, 115), (230, 159, 0),
         (204, 121, 167), (86, 180, 233), (240, 228, 66), (100, 100, 100))  # fmt: skip
"""Okabe and Ito 2008: told apart also by who does not see red or green. Background is white."""


def default_colours(num_classes: int) -> np.ndarray:
    """Colours uint8 [K, 3] of labels; they repeat after eight foreground classes."""
    return np.array(
        [_SAFE[0]] + [_SAFE[1 + label % 8] for label in range(num_classes - 1)], np.uint8
    )


def save_overlay(
    path: pathlib.Path,
    slide: Slide,
    labels: LabelMap,
    *,
    colours: np.ndarray,
    class_names: Sequence[str],
    max_side: int = 2000,
) -> None:
    """Draws the slide with its labels laid over, a legend and a scale bar.

    Args:
        path: of the PNG.
        slide: open.
        labels: of the whole slide, at any scale.
        colours: uint8 [K, 3].
        class_names: K names.
        max_side: of the picture, pixels.
    """
    extent = tuple(side * mpp for side, mpp in zip(slide.dimensions, slide.mpp, strict=True))
    mpp = max(max(extent) / max_side, *slide.mpp)
    width, height = (max(1, round(side / mpp)) for side in extent)
    pixels = slide.read_region(0, 0, width, height, mpp)
    painted = _painted(pixels, labels, colours)
    figure = Figure(figsize=(max(width, 600) / _DPI, height / _DPI + 0.7), dpi=_DPI)
    axes = figure.add_axes(
        (0, 0.7 * _DPI / (height + 0.7 * _DPI), 1, height / (height + 0.7 * _DPI))
    )
    axes.imshow(painted, interpolation="none")
    axes.set_axis_off()
    _scale_bar(axes, width, height, mpp)
    handles = [
        Patch(facecolor=tuple((colours[label] / 255).tolist()), edgecolor="black", label=name)
        for label, name in enumerate(class_names)
        if label
    ]
    figure.legend(handles=handles, loc="lower center", ncols=max(1, min(len(handles), 6)))
    save_figure(figure, path)


def _painted(pixels: np.ndarray, labels: LabelMap, colours: np.ndarray) -> np.ndarray:
    """The picture with labels laid over, by nearest, strip by strip."""
    height, width = pixels.shape[:2]
    columns = np.minimum(
        ((np.arange(width) + 0.5) * labels.width / width).astype(int), labels.width - 1
    )
    rows = np.minimum(
        ((np.arange(height) + 0.5) * labels.height / height).astype(int), labels.height - 1
    )
    painted = pixels.copy()
    for row, source in enumerate(rows):
        line = labels.read(int(source), 0, 1, labels.width)[0, columns]
        shown = (line > 0) & (line != NOT_ANALYSED)
        mixed = (1 - _OPACITY) * pixels[row, shown] + _OPACITY * colours[line[shown]]
        painted[row, shown] = mixed.astype(np.uint8)
        dim = line == NOT_ANALYSED
        painted[row, dim] = (0.5 * pixels[row, dim] + 0.5 * 200).astype(np.uint8)
    return painted


def _scale_bar(axes: object, width: int, height: int, mpp: float) -> None:
    """A bar of a round length, about a sixth of the picture."""
    rough = width * mpp / 6
    power = 10.0 ** np.floor(np.log10(rough))
    length = power * max(step for step in (1, 2, 5) if step * power <= rough)
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    x, y = 0.03 * width, 0.97 * height
    line = Line2D([x, x + length / mpp], [y, y], color="black", linewidth=3)
    axes.add_line(line)  # type: ignore[attr-defined]
    axes.text(x, y - 0.012 * height, text, fontsize=9, va="bottom")  # type: ignore[attr-defined]
