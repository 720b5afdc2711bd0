r"""Published data sets, from the layouts of their authors to a manifest for training.

    python -m experiments.import_dataset --layout=bcss --source=BCSS --output=data/bcss
    python -m experiments.feddp --workdir=runs/bcss --config.data.manifest=data/bcss/manifest.csv \
        --config.data.class_names=other,tumour,stroma,lymphocytic,necrosis

Layouts: bcss, monuseg, glas, consep; what each expects is told by `fedjax_dp.data.importers`.
Patches that overlap are put together to whole images. An image that cannot be read is listed and
left out, and the exit code is then 1. The data are to be had from their authors, under their terms.
"""

import csv
import pathlib
import sys

from absl import app, flags
from PIL import Image
from tqdm import tqdm

from fedjax_dp.data.importers.bcss import read_bcss
from fedjax_dp.data.importers.consep import read_consep
from fedjax_dp.data.importers.glas import read_glas
from fedjax_dp.data.importers.monuseg import read_monuseg
from fedjax_dp.data.importers.regions import DataSet
from fedjax_dp.data.splits import split_of

_LAYOUTS = {
    "bcss": read_bcss,
    "monuseg": read_monuseg,
    "glas": read_glas,
    "consep": read_consep,
}
_LAYOUT = flags.DEFINE_enum("layout", None, sorted(_LAYOUTS), "Of the source.", required=True)
_SOURCE = flags.DEFINE_string("source", None, "Folder of the data set.", required=True)
_TARGET = flags.DEFINE_string(
    "output", None, "Folder of manifest and images.", required=True, allow_override=True
)


def import_dataset(data: DataSet, output: pathlib.Path) -> list[str]:
    """Writes images, masks and manifest.csv; returns what could not be read, a line each."""
    (output / "images").mkdir(parents=True, exist_ok=True)
    (output / "masks").mkdir(exist_ok=True)
    rows, errors = [], []
    for region in tqdm(data.regions, unit="image", dynamic_ncols=True):
        try:
            image, labels = region.load()
        except ValueError as error:
            errors.append(f"{region.name}: {error}")
            continue
        name = f"{region.name}.png"
        Image.fromarray(image).save(output / "images" / name)
        Image.fromarray(labels).save(output / "masks" / name)
        path = f"images/{name}"
        split = region.split or split_of(patient=region.patient, image=path)
        owner = (region.site, region.hospital, region.patient, split)
        rows.append((path, f"masks/{name}", *owner, region.mpp or ""))
    with (output / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "mask", "site", "hospital", "patient", "split", "mpp"))
        writer.writerows(rows)
    return errors


def main(argv: list[str]) -> int:
    """Imports and reports."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
    output = pathlib.Path(_TARGET.value)
    if output.exists() and any(output.iterdir()):
        print(f"Expected an empty folder, got {output}. Choose another --output.", file=sys.stderr)
        return 1
    try:
        data = _LAYOUTS[_LAYOUT.value](pathlib.Path(_SOURCE.value))
        errors = import_dataset(data, output)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(data.regions) - len(errors)} images in {output / 'manifest.csv'}; classes "
          f"{','.join(data.class_names)}.")  # fmt: skip
    for line in errors:
        print(f"left out: {line}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    app.run(main)
