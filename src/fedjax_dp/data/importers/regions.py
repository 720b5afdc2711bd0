"""What every importer yields: images with labels, and whose they are."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np


class LayoutError(ValueError):
    """A folder that is not laid out as expected; the message says how it should be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceRegion:
    """One image of a data set.

    Attributes:
        name: unique within the data set; becomes the file name.
        site: who holds it.
        patient: whose tissue it is; empty where the data set does not say.
        hospital: where it was taken; empty where the data set does not say.
        split: one of `splits.SPLITS`; empty where the keyed hash of the patient shall decide.
        mpp: micrometres per pixel; None where the data set does not say.
        load: returns the image uint8 [H, W, 3] and labels uint8 [H, W], 255 = ignore; raises a
            ValueError where the files are missing or damaged.
    """

    name: str
    site: str
    patient: str = ""
    hospital: str = ""
    split: str = ""
    mpp: float | None = None
    load: Callable[[], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """The regions of a data set, and the names of its classes."""

    regions: tuple[SourceRegion, ...]
    class_names: tuple[str, ...]


def folder_of(root: pathlib.Path, names: Sequence[str], what: str) -> pathlib.Path:
    """The first folder of these names below `root`.

    Raises:
        LayoutError: there is none.
    """
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise LayoutError(
        f"Expected a folder {' or '.join(names)} with {what} in {root}. Check the layout and path."
    )


def tcga(name: str) -> tuple[str, str]:
    """(tissue source site, patient) of a TCGA barcode, both lower case but the patient.

    Raises:
        LayoutError: the name is none.
    """
    parts = name.split("-")
    if len(parts) < 3 or parts[0] != "TCGA" or len(parts[1]) != 2:
        raise LayoutError(f"Expected a TCGA barcode like TCGA-A2-A0T2-…, got {name!r}.")
    return f"tcga-{parts[1].lower()}", "-".join(parts[:3])


def check_sizes(name: str, image: np.ndarray, labels: np.ndarray) -> None:
    """Refuses a mask of another size than its image."""
    if image.shape[:2] != labels.shape:
        raise LayoutError(
            f"Expected a mask of the image's size in {name}, got {labels.shape} beside "
            f"{image.shape[:2]}."
        )
