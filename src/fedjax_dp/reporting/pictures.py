"""The run in pictures: curves, and what was segmented at each site.

Drawn on figures of their own, without pyplot, so a picture from the training loop leaves a
notebook's figures alone. A picture of private tiles is as private as the tiles.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedjax_dp.reporting.contours import (
    DPI,
    INK,
    PREDICTION_COLOUR,
    class_legend,
    dice_text,
    name_row,
    panel_grid,
    save_figure,
    show_contours,
    show_tile,
)
from fedjax_dp.reporting.summary import round_up

_SITE_COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7f7f7f", "#8c564b",
)  # fmt: skip
_FAINT = "#8a9099"
_MAX_NAMED_SITES = 8


def plot_curves(lines: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Validation Dice, training loss and epsilon against the round, as a PNG.

    Reads of each line, and does without what is missing: "round"; "epsilon", a number or
    {"max": number}; "nonprivate" {"loss": number, "validation": {"dice": number, "per_site":
    {site: {"dice": number}}}}. An epsilon of "infinity" is said in words, not drawn.

    Args:
        lines: the lines of metrics.jsonl.
        path: the PNG to write; its folder is made if missing.
    """
    figure = Figure(figsize=(13.5, 3.9), dpi=DPI, layout="constrained")
    dice_axes, loss_axes, epsilon_axes = figure.subplots(1, 3, width_ratios=(1.45, 1, 1))
    _plot_dice(dice_axes, lines)

    rounds, losses = _series(lines, "nonprivate", "loss")
    _plot_line(loss_axes, rounds, losses, color=INK)
    _dress(loss_axes, "Training loss", note="" if rounds else "nothing measured yet")

    rounds, epsilons = _series(lines, "epsilon", "max")
    if not rounds:
        rounds, epsilons = _series(lines, "epsilon")
    finite = [(r, e) for r, e in zip(rounds, epsilons, strict=True) if np.isfinite(e)]
    _plot_line(epsilon_axes, *(zip(*finite, strict=True) if finite else ((), ())), color="#b3261e")
    is_infinite = bool(rounds) and not finite
    note = "epsilon is infinite:\nno privacy guarantee" if is_infinite else "not measured"
    _dress(epsilon_axes, "Epsilon spent, worst client", note="" if finite else note)
    if finite:
        epsilon_axes.set_ylim(0, 1.12 * finite[-1][1])
        epsilon_axes.annotate(
            f"{round_up(finite[-1][1]):.2f}", finite[-1], (-4, 6), textcoords="offset points",
            ha="right", color="#b3261e", fontweight="bold",
        )  # fmt: skip
    save_figure(figure, path)


def overlay(
    image: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    *,
    class_names: Sequence[str] = ("background", "foreground"),
    title: str = "",
    path: str | os.PathLike[str] | None = None,
) -> np.ndarray:
    """One tile three times: image, truth, prediction with its Dice.

    Args:
        image: uint8 or float in [0, 1], [H, W, 3].
        truth: class index [H, W], 255 = ignore (greyed out in every panel).
        prediction: class index [H, W].
        class_names: K names; class 0 is the background and is not drawn.
        title: written at the left.
        path: the PNG to write, or None.

    Returns:
        The picture, uint8 [h, w, 3].
    """
    rows = [(title, [(image, truth, prediction)])]
    return save_figure(_panels(rows, class_names), path)


def site_overlays(
    tiles: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]],
    path: str | os.PathLike[str] | None,
    *,
    class_names: Sequence[str] = ("background", "foreground"),
) -> np.ndarray:
    """A row per site: some tiles, each as image, truth and prediction with its Dice.

    Args:
        tiles: per site the (image, truth, prediction) of one or more tiles, as in `overlay`.
        path: the PNG to write, or None.
        class_names: K names; class 0 is the background and is not drawn.

    Returns:
        The picture, uint8 [h, w, 3].

    Raises:
        ValueError: no tile at all.
    """
    rows = [(site, list(of_site)) for site, of_site in tiles.items() if len(of_site)]
    if not rows:
        raise ValueError(f"Expected at least one tile of one site, got {tiles=}.")
    return save_figure(_panels(rows, class_names), path)


def comparison(
    image: np.ndarray,
    truth: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    path: str | os.PathLike[str] | None,
    *,
    class_names: Sequence[str] = ("background", "foreground"),
    row_names: Sequence[str] = (),
) -> np.ndarray:
    """One tile many ways: image, truth, and each prediction with its Dice, side by side.

    Args:
        image: one tile as in `overlay`, or R tiles [R, H, W, 3], a row each.
        truth: class index [H, W] or [R, H, W], 255 = ignore.
        predictions: per column title the class index, shaped like `truth`.
        path: the PNG to write, or None.
        class_names: K names; class 0 is the background and is not drawn.
        row_names: written at the left of the rows; none by default.

    Returns:
        The picture, uint8 [h, w, 3].
    """
    images = np.asarray(image)[None] if np.ndim(image) == 3 else np.asarray(image)
    truths = np.reshape(truth, images.shape[:3])
    maps = {name: np.reshape(labels, images.shape[:3]) for name, labels in predictions.items()}
    figure, axes = panel_grid(
        len(images),
        2 + len(maps),
        num_classes=len(class_names),
        has_names=bool(row_names),
        title_lines=2,
    )
    for row, (tile, labels) in enumerate(zip(images, truths, strict=True)):
        show_tile(axes[row][0], tile, labels, title="" if row else "image")
        show_contours(axes[row][1], tile, labels, labels, class_names, title="" if row else "truth")
        for axis, (name, map_) in zip(axes[row][2:], maps.items(), strict=True):
            dice = dice_text(map_[row], labels, len(class_names))
            title = dice if row else f"{name}\n{dice}"
            show_contours(axis, tile, labels, map_[row], class_names, title=title,
                          single_colour=PREDICTION_COLOUR)  # fmt: skip
        if row < len(row_names):
            name_row(axes[row][0], row_names[row])
    class_legend(figure, class_names)
    return save_figure(figure, path)


def _panels(
    rows: Sequence[tuple[str, Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]]],
    class_names: Sequence[str],
) -> Figure:
    """Rows of (image, truth, prediction) triples, a named row per site."""
    figure, axes = panel_grid(
        len(rows),
        3 * max(len(tiles) for _, tiles in rows),
        num_classes=len(class_names),
        group=3,
        has_names=any(name for name, _ in rows),
    )
    for row, (name, tiles) in enumerate(rows):
        for column, (image, truth, prediction) in enumerate(tiles):
            first, second, third = axes[row][3 * column : 3 * column + 3]
            show_tile(first, image, truth, title="" if row else "image")
            show_contours(second, image, truth, truth, class_names, title="" if row else "truth")
            dice = dice_text(prediction, truth, len(class_names))
            title = dice if row else f"prediction   {dice}"
            show_contours(third, image, truth, prediction, class_names, title=title,
                          single_colour=PREDICTION_COLOUR)  # fmt: skip
        for axis in axes[row][3 * len(tiles) :]:
            axis.set_axis_off()
        name_row(axes[row][0], name)
    class_legend(figure, class_names)
    return figure


def _plot_dice(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    """Validation Dice per site, thin, and the mean over sites, thick."""
    by_site: dict[str, tuple[list[float], list[float]]] = {}
    for line in lines:
        for site in _at(line, ("nonprivate", "validation", "per_site")) or {}:
            by_site.setdefault(site, ([], []))
    keys = ("nonprivate", "validation")
    by_site = {site: _series(lines, *keys, "per_site", site, "dice") for site in by_site}
    are_named = len(by_site) <= _MAX_NAMED_SITES
    for index, (site, (rounds, values)) in enumerate(sorted(by_site.items())):
        colour = _SITE_COLOURS[index % len(_SITE_COLOURS)] if are_named else _FAINT
        label = site if are_named else None if index else f"{len(by_site)} sites"
        _plot_line(axes, rounds, values, color=colour, linewidth=1.1, alpha=0.85, label=label)
    rounds, values = _series(lines, *keys, "dice")
    _plot_line(axes, rounds, values, color=INK, linewidth=2.6, label="mean over sites", zorder=5)
    _dress(axes, "Validation Dice", note="" if rounds else "nothing measured yet")
    axes.set_ylim(0, 1)
    if rounds:
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _plot_line(axes: Axes, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    """A line, with dots while the points are so few that a line would hide them."""
    axes.plot(
        x,
        y,
        **({"linewidth": 1.8, "marker": "o" if len(x) <= 12 else "", "markersize": 3.5} | style),
    )


def _dress(axes: Axes, title: str, *, note: str) -> None:
    """Title, round axis, light grid; `note` in the middle of an empty plot."""
    axes.set_title(title, fontsize=11, loc="left", color=INK, fontweight="bold")
    axes.set_xlabel("round", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.tick_params(labelsize=8, colors=_FAINT)
    axes.grid(color="#e6e8eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c5cad1")
    if note:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, note, ha="center", va="center", transform=axes.transAxes, color=_FAINT)


def _series(lines: Sequence[Mapping[str, Any]], *keys: str) -> tuple[list[float], list[float]]:
    """(rounds, values) of the lines that have a number, or "infinity", at `keys`."""
    rounds, values = [], []
    for line in lines:
        value = _at(line, keys)
        if value == "infinity":
            value = np.inf
        if isinstance(value, int | float):
            rounds.append(float(line["round"]))
            values.append(float(value))
    return rounds, values


def _at(tree: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
