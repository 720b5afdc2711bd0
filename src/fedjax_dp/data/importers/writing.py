"""A data set on disk as images, masks and the manifest that training reads."""

import csv
import pathlib
from collections.abc import Callable

from PIL import Image

from fedjax_dp.data.importers.regions import DataSet
from fedjax_dp.data.splits import split_of


def write_manifest(
    data: DataSet, output: pathlib.Path, *, tell: Callable[[], None] = lambda: None
) -> tuple[str, ...]:
    """Writes images and masks as PNG, and manifest.csv.

    Where a region has no split, a keyed hash of its patient decides (see `splits.split_of`).

    Args:
        data: the data set.
        output: folder; made where absent.
        tell: called after every region.

    Returns:
        What could not be read and was left out, a line each.

    Raises:
        OSError: the folder cannot be written.
    """
    for name in ("images", "masks"):
        (output / name).mkdir(parents=True, exist_ok=True)
    rows, errors = [], []
    for region in data.regions:
        try:
            image, labels = region.load()
        except ValueError as error:
            errors.append(f"{region.name}: {error}")
        else:
            name = f"{region.name}.png"
            Image.fromarray(image).save(output / "images" / name)
            Image.fromarray(labels).save(output / "masks" / name)
            path = f"images/{name}"
            split = region.split or split_of(patient=region.patient, image=path)
            owner = (region.site, region.hospital, region.patient, split)
            rows.append((path, f"masks/{name}", *owner, region.mpp or ""))
        tell()
    with (output / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "mask", "site", "hospital", "patient", "split", "mpp"))
        writer.writerows(rows)
    return tuple(errors)
