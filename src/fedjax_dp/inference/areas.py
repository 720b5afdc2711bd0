"""How much of a slide each class covers, in square millimetres."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedjax_dp.data.store.layout import write_text
from fedjax_dp.data.store.pseudonyms import table_text
from fedjax_dp.inference.label_file import NOT_ANALYSED, LabelMap

_BAND_PIXELS = 2**24
ANALYSED, REST = "analysed", "not analysed"


class Area(NamedTuple):
    """One line of the table.

    Attributes:
        name: of the class; or `ANALYSED` (all classes together), or `REST`.
        pixels: how many.
        mm2: their area.
        fraction: of the analysed area; of the whole for the two last lines.
    """

    name: str
    pixels: int
    mm2: float
    fraction: float


def area_table(
    labels: LabelMap, class_names: Sequence[str], mpp: tuple[float, float]
) -> tuple[Area, ...]:
    """Counts pixels band by band.

    Args:
        labels: the map.
        class_names: K names.
        mpp: (x, y) micrometres per pixel.
    """
    counts = np.zeros(256, np.int64)
    rows = max(1, _BAND_PIXELS // labels.width)
    for top in range(0, labels.height, rows):
        some = labels.read(top, 0, min(rows, labels.height - top), labels.width)
        counts += np.bincount(some.ravel(), minlength=256)
    pixel = mpp[0] * mpp[1] * 1e-6
    rest, total = int(counts[NOT_ANALYSED]), int(counts.sum())
    analysed = total - rest
    lines = [
        Area(name, int(counts[label]), counts[label] * pixel, counts[label] / max(analysed, 1))
        for label, name in enumerate(class_names)
    ]
    return (
        *(Area(n, p, float(a), float(f)) for n, p, a, f in lines),
        Area(ANALYSED, analysed, analysed * pixel, analysed / total),
        Area(REST, rest, rest * pixel, rest / total),
    )


def write_csv(path: pathlib.Path, table: Sequence[Area]) -> None:
    """Writes the table, whole or not at all."""
    rows = [(a.name, a.pixels, f"{a.mm2:.6f}", f"{a.fraction:.6f}") for a in table]
    write_text(path, table_text(("class", "pixels", "mm2", "fraction"), rows))
