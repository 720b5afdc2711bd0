"""One picture of a site's images: what is annotated, how much of it, and how large it is."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from scipy import ndimage

from fedjax_dp.data.tiles import IGNORE_INDEX
from fedjax_dp.reporting.contours import (
    CLASS_COLOURS,
    INK,
    TRUTH_COLOUR,
    class_legend,
    show_contours,
)

MAX_SIDE = 384
"""Larger images are shown by their middle, at full resolution."""

NUCLEUS_DIAMETER = (4.0, 14.0)
"""Micrometres; nearly all nuclei in H&E sections lie in it, lymphocytes as well as tumour cells."""

_MIN_OBJECT_PIXELS = 9
_COLUMNS = 4
_PICTURE_INCHES, _CHART_INCHES = 4.0, 3.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One image on the sheet.

    Attributes:
        title: what stands above it.
        image: uint8 [H, W, 3].
        labels: uint8 [H, W], 255 = ignore.
    """

    title: str
    image: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sheet:
    """Everything a site's sheet shows.

    Attributes:
        title: headline.
        class_names: K names, background first.
        pictures: the images shown.
        pixel_counts: int64 [K + 1], pixels of each class over all images; the last is ignored.
        diameters: float [n], of all objects.
        unit: "µm", or "px" where the resolution is not known.
        is_instance: whether objects were counted by their numbers, or are connected areas.
    """

    title: str
    class_names: tuple[str, ...]
    pictures: Sequence[Picture]
    pixel_counts: np.ndarray
    diameters: np.ndarray
    unit: str
    is_instance: bool


def shows_nuclei(sheet: Sheet) -> bool:
    """Whether the objects are nuclei whose size in micrometres is known."""
    return sheet.unit == "µm" and sheet.class_names[1:] == ("nucleus",)


def middle(image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Middle of an image and its labels, at most `MAX_SIDE` pixels a side, as copies."""
    height, width = labels.shape
    y, x = max(0, height - MAX_SIDE) // 2, max(0, width - MAX_SIDE) // 2
    part = (slice(y, y + MAX_SIDE), slice(x, x + MAX_SIDE))
    return image[part].copy(), labels[part].copy()


def object_diameters(mask: np.ndarray, *, is_instance: bool) -> np.ndarray:
    """Diameters in pixels, float [n], of circles as large as the objects of `mask` [H, W].

    Objects that touch the border are left out, as they may be cut off, and so are specks below
    nine pixels. In a class map an object is a connected area of one class: touching ones are
    one, which makes the right tail of a histogram heavier and moves its peak little.
    """
    if is_instance:
        values = np.unique(mask[mask != 0])
        objects = (np.searchsorted(values, mask) + 1) * (mask != 0)
        count = len(values)
    else:
        objects, count = np.zeros(mask.shape, np.int64), 0
        for value in np.unique(mask):
            if value not in (0, IGNORE_INDEX):
                found, more = ndimage.label(mask == value)
                objects += (found + count) * (found != 0)
                count += more
    areas = np.bincount(objects.ravel(), minlength=count + 1)
    areas[0] = 0
    for edge in (objects[0], objects[-1], objects[:, 0], objects[:, -1]):
        areas[edge] = 0
    return np.sqrt(areas[areas >= _MIN_OBJECT_PIXELS] * (4 / np.pi))


def save(sheet: Sheet, path: pathlib.Path) -> None:
    """Writes the sheet as a PNG."""
    rows = max(1, -(-len(sheet.pictures) // _COLUMNS))
    has_legend = len(sheet.class_names) > 2
    height = 0.6 + _PICTURE_INCHES * rows + _CHART_INCHES + 0.4 * has_legend
    foot = 0.4 * has_legend / height
    layout = ConstrainedLayoutEngine(rect=(0, foot, 1, 1 - foot - 0.45 / height))
    figure = Figure(figsize=(14, height), dpi=100, layout=layout)
    figure.text(0.5, 1 - 0.12 / height, sheet.title, size=15, color=INK, ha="center", va="top")
    parts = figure.subfigures(
        2,
        1,
        height_ratios=(_PICTURE_INCHES * rows, _CHART_INCHES + 0.4 * has_legend),
        squeeze=False,
    )
    axes = parts[0, 0].subplots(rows, _COLUMNS, squeeze=False)
    for ax in axes.ravel():
        ax.set_axis_off()
    for ax, picture in zip(axes.ravel(), sheet.pictures, strict=False):
        show_contours(
            ax,
            picture.image,
            picture.labels,
            picture.labels,
            sheet.class_names,
            title=picture.title,
        )
    classes, sizes = parts[1, 0].subplots(1, 2, width_ratios=(1, 1.6))
    _draw_classes(classes, sheet)
    _draw_diameters(sizes, sheet)
    if has_legend:
        class_legend(figure, sheet.class_names)
    figure.savefig(path)


def _draw_classes(ax: Axes, sheet: Sheet) -> None:
    """Share of the pixels in each class."""
    names = [*sheet.class_names, "ignored"]
    counts = sheet.pixel_counts.astype(np.float64)
    if not counts[-1]:
        names, counts = names[:-1], counts[:-1]
    share = 100 * counts / max(counts.sum(), 1.0)
    of_class = CLASS_COLOURS if len(sheet.class_names) > 2 else (TRUTH_COLOUR,)
    of_classes = [of_class[i % len(of_class)] for i in range(len(sheet.class_names) - 1)]
    colours = ["#c9c9c9", *of_classes, "#777777"]
    bars = ax.barh(names, share, color=colours[: len(names)], edgecolor="#444444", linewidth=0.6)
    ax.bar_label(bars, labels=[f"{value:.1f} %" for value in share], padding=3, fontsize=9)
    ax.set_xlim(0, max(share.max(), 1.0) * 1.2)
    ax.invert_yaxis()
    ax.set_xlabel("share of all pixels of the site, %")
    ax.spines[["top", "right"]].set_visible(False)


def _draw_diameters(ax: Axes, sheet: Sheet) -> None:
    """Histogram of object diameters, with the range of nuclei where it applies."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_ylabel("objects")
    kind = "numbered objects" if sheet.is_instance else "connected areas, touching ones are one"
    ax.set_xlabel(f"diameter of a circle of the same area, {sheet.unit} ({kind})")
    if not len(sheet.diameters):
        ax.text(0.5, 0.5, "no objects", transform=ax.transAxes, ha="center", va="center")
        return
    median = float(np.median(sheet.diameters))
    end = max(float(np.quantile(sheet.diameters, 0.99)) * 1.15, 1.0)
    if shows_nuclei(sheet):
        low, high = NUCLEUS_DIAMETER
        label = f"most nuclei: {low:g} to {high:g} µm"
        ax.axvspan(low, high, facecolor="#d7ecd7", edgecolor="#7fb77f", zorder=0, label=label)
        end = max(end, NUCLEUS_DIAMETER[1] * 1.2)
    ax.hist(sheet.diameters, bins=np.linspace(0, end, 49).tolist(), color="#5b6fb0", zorder=2)
    text = f"median {median:.1f} {sheet.unit}, {len(sheet.diameters):,} objects"
    ax.axvline(median, color="#c0392b", linewidth=1.5, zorder=3, label=text)
    ax.set_xlim(0, end)
    ax.legend(fontsize=9, loc="upper right", framealpha=1.0, edgecolor="none")
