"""What protection costs, as a picture: Dice against epsilon, a line a placement."""

import math
import os
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fedjax_dp.reporting.contours import DPI, save_figure

_COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7f7f7f", "#8c564b",
)  # fmt: skip


def plot_tradeoff(
    points: Sequence[tuple[str, float, float, float]], path: str | os.PathLike[str]
) -> None:
    """Mean Dice and worst site's Dice against epsilon, as a PNG.

    Args:
        points: (series, epsilon, Dice, Dice of the worst site); points of one series are joined,
            one without a finite epsilon is a level that the others are held against.
        path: the PNG to write.
    """
    figure = Figure(figsize=(11.0, 4.4), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    for which, (panel, title) in enumerate(
        zip(axes, ("Dice, mean over sites", "Dice, worst site"), strict=True)
    ):
        _panel(panel, [(name, eps, (dice, worst)[which]) for name, eps, dice, worst in points])
        panel.set_title(title, loc="left", fontsize=11, fontweight="bold")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    save_figure(figure, path)


def _panel(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    finite = sorted({eps for _, eps, _ in points if math.isfinite(eps)})
    series = [name for name, eps, _ in points if math.isfinite(eps)]
    levels = [(name, value) for name, eps, value in points if not math.isfinite(eps)]
    for index, name in enumerate(dict.fromkeys(series)):
        mine = sorted((eps, value) for own, eps, value in points if own == name)
        colour = _COLOURS[index % len(_COLOURS)]
        axes.plot(*zip(*mine, strict=True), "o-", color=colour, label=name, lw=1.6, ms=5)
    for index, (name, value) in enumerate(levels):
        style = ("--", ":", "-.", (0, (1, 3)))[index % 4]
        axes.axhline(value, color="#444444", ls=style, lw=1.1, label=f"{name} (no guarantee)")
    axes.set_xscale("log")
    axes.set_xlabel("epsilon of the worst client")
    if finite:
        # A tick at every epsilon that was run: a target of 8 ends at 7.99.
        axes.xaxis.set_major_locator(FixedLocator(sorted({round(eps, 1) for eps in finite})))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", lw=0.6)
