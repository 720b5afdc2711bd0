"""GlaS, or Warwick-QU (Sirinukunwattana et al., MedIA 2017): glands of the colon, one hospital.

Images and masks lie side by side (train_1.bmp, train_1_anno.bmp), with Grade.csv, or images in
`images` and masks of the same names in `masks_instance_bmp` or `masks_binary`, with grade.csv. The
official split shares patients; it is not used, and the keyed hash of the patient decides.
"""

import csv
import functools
import pathlib

import numpy as np

from fedjax_dp.data.images import read_image, read_mask
from fedjax_dp.data.importers.regions import DataSet, LayoutError, SourceRegion, check_sizes

CLASS_NAMES = ("background", "gland")
_SITE, _HOSPITAL = "uhcw", "University Hospitals Coventry and Warwickshire"
_MPP = 0.62005
_ENDINGS = (".bmp", ".png")


def read_glas(root: pathlib.Path) -> DataSet:
    """The images, each with the patient that the table of grades names.

    Raises:
        LayoutError: no such layout.
    """
    patients = _patients(root)
    regions = []
    for image, mask in _pairs(root):
        regions.append(
            SourceRegion(
                name=image.stem,
                site=_SITE,
                hospital=_HOSPITAL,
                patient=patients.get(image.stem, ""),
                mpp=_MPP,
                load=functools.partial(_load, image, mask),
            )
        )
    if not regions:
        raise LayoutError(
            f"Expected pairs like train_1.bmp and train_1_anno.bmp in {root}, or folders images "
            "and masks_instance_bmp, got neither."
        )
    return DataSet(regions=tuple(regions), class_names=CLASS_NAMES)


def _pairs(root: pathlib.Path) -> list[tuple[pathlib.Path, pathlib.Path]]:
    beside = [
        (path, path.with_name(f"{path.stem}_anno{path.suffix}"))
        for path in sorted(root.iterdir() if root.is_dir() else ())
        if path.suffix.lower() in _ENDINGS and not path.stem.endswith("_anno")
    ]
    images = root / "images"
    if beside or not images.is_dir():
        return beside
    masks = [root / name for name in ("masks_instance_bmp", "masks_binary", "masks")]
    masks = [folder for folder in masks if folder.is_dir()]
    found = []
    for path in sorted(p for p in images.iterdir() if p.suffix.lower() in _ENDINGS):
        # Masks may be named with a suffix; of several folders the first that knows the image.
        options = [m for f in masks for m in sorted(f.glob(f"{path.stem}*")) if _is_of(m, path)]
        found.append((path, options[0] if options else root / "masks" / path.name))
    return found


def _is_of(mask: pathlib.Path, image: pathlib.Path) -> bool:
    rest = mask.stem.removeprefix(image.stem)
    return mask.suffix.lower() in _ENDINGS and (not rest or rest[0] == "_")


def _patients(root: pathlib.Path) -> dict[str, str]:
    """Image -> patient, from Grade.csv; empty without it."""
    for name in ("Grade.csv", "grade.csv"):
        if (root / name).exists():
            with (root / name).open(encoding="utf-8-sig", newline="") as file:
                rows = [[c.strip() for c in row] for row in csv.reader(file) if row]
            header = [c.casefold() for c in rows[0]]
            column = next((i for i, c in enumerate(header) if "patient" in c), None)
            if column is None:
                raise LayoutError(f"Expected a column with the patient in {root / name}.")
            return {row[0]: row[column] for row in rows[1:] if len(row) > column}
    return {}


def _load(image_path: pathlib.Path, mask_path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    image = read_image(image_path)
    labels = (read_mask(mask_path) > 0).astype(np.uint8)
    check_sizes(image_path.name, image, labels)
    return image, labels
