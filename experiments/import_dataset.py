r"""Published data sets, from the layouts of their authors to a manifest for training.

    python -m experiments.import_dataset --layout=bcss --source=BCSS --output=data/bcss
    python -m experiments.feddp --workdir=runs/bcss --config.data.manifest=data/bcss/manifest.csv \
        --config.data.class_names=other,tumour,stroma,lymphocytic,necrosis

Layouts: bcss, monuseg, glas, consep; what each expects is told by `fedjax_dp.data.importers`.
Patches that overlap are put together to whole images. An image that cannot be read is listed and
left out, and the exit code is then 1. The data are to be had from their authors, under their terms.
"""

import pathlib
import sys

from absl import app, flags
from tqdm import tqdm

from fedjax_dp.data.importers.bcss import read_bcss
from fedjax_dp.data.importers.consep import read_consep
from fedjax_dp.data.importers.glas import read_glas
from fedjax_dp.data.importers.monuseg import read_monuseg
from fedjax_dp.data.importers.writing import write_manifest

_LAYOUTS = {
    "bcss": read_bcss,
    "monuseg": read_monuseg,
    "glas": read_glas,
    "consep": read_consep,
}
_LAYOUT = flags.DEFINE_enum(
    "layout", None, sorted(_LAYOUTS), "Of the source.", required=True, allow_override=True
)
_SOURCE = flags.DEFINE_string(
    "source", None, "Folder of the data set.", required=True, allow_override=True
)
_TARGET = flags.DEFINE_string(
    "output", None, "Folder of manifest and images.", required=True, allow_override=True
)


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
        with tqdm(total=len(data.regions), unit="image", dynamic_ncols=True) as bar:
            errors = write_manifest(data, output, tell=bar.update)
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
