r"""A tile store from slides and their annotations, for training with --config.data.store.

    python -m experiments.prepare_tiles --slides=slides --annotations=annotations \
        --sites=sites.csv --classes="background; tumour = Tumor; stroma" --output=store

The table of sites has the columns slide and site, and as wanted patient, hospital, split, mpp,
annotation and tissue (see `fedjax_dp.data.slide_list`). Broken slides are skipped and listed; a
second call prepares what is missing. The exit code is 1 if any slide gave no tile. What must not
leave the site lies in the store's folder `private`: the key of the pseudonyms, paths, names and
every text that came from a file.
"""

import os
import pathlib
import sys

from absl import app, flags
from tqdm import tqdm

from fedjax_dp.data.annotations.classes import ClassTable, table_text
from fedjax_dp.data.slide_list import read_slide_list
from fedjax_dp.data.store.layout import Recipe
from fedjax_dp.preparation import SlideReport, prepare_store

_SLIDES = flags.DEFINE_string(
    "slides", None, "Folder of the slides.", required=True, allow_override=True
)
_ANNOTATIONS = flags.DEFINE_string(
    "annotations",
    "",
    "Folder of GeoJSON, XML or mask images; empty = that of the slides.",
    allow_override=True,
)
_SITES = flags.DEFINE_string(
    "sites", None, "CSV: slide,site[,patient,split,mpp,…]", required=True, allow_override=True
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder of the store.", required=True, allow_override=True
)
_CLASSES = flags.DEFINE_string(
    "classes",
    None,
    'Classes, background first, each with its other names: "background; tumour = Tumor", or a file '
    "of that form.",
    required=True,
    allow_override=True,
)
_MPP = flags.DEFINE_float("mpp", 0.5, "Micrometres per pixel of the tiles.", allow_override=True)
_TILE = flags.DEFINE_integer("tile_size", 256, "Side of a tile, pixels.", allow_override=True)
_TISSUE = flags.DEFINE_enum(
    "tissue",
    "saturation",
    ["saturation", "otsu", "none"],
    "How tissue is found. With otsu a slide's tiles depend on each other: no unit=tile.",
    allow_override=True,
)
_MIN_TISSUE = flags.DEFINE_float(
    "min_tissue", 0.5, "Tiles with less are left out, if not annotated.", allow_override=True
)
_UNANNOTATED = flags.DEFINE_enum(
    "unannotated",
    "",
    ["", "background", "ignore"],
    "What pixels in no shape are.",
    allow_override=True,
)
_UNKNOWN = flags.DEFINE_enum(
    "unknown", "error", ["error", "ignore"], "Shapes of unknown classes.", allow_override=True
)
_ORIGIN = flags.DEFINE_enum(
    "origin",
    "file",
    ["file", "bounds"],
    "Annotations count from level 0, or the slide's bounds.",
    allow_override=True,
)
_COMPRESSION = flags.DEFINE_enum(
    "compression", "zstd", ["none", "lz4", "zstd"], "Of the arrays.", allow_override=True
)
_WORKERS = flags.DEFINE_integer(
    "workers", 0, "Slides at once; 0 = one a core.", allow_override=True
)
_OVERVIEW = flags.DEFINE_bool(
    "overview", True, "Draw every slide with its tissue and tiles.", allow_override=True
)

_PRUNE = flags.DEFINE_bool(
    "prune",
    False,
    "Delete slides from the store that the table lists no more.",
    allow_override=True,
)


def main(argv: list[str]) -> int:
    """Prepares, reports, and returns the exit code."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
    try:
        classes = table_text(_CLASSES.value)
        recipe = Recipe(
            mpp=_MPP.value,
            tile_size=_TILE.value,
            class_names=ClassTable.from_text(classes).names,
            classes=classes,
            tissue=_TISSUE.value,
            min_tissue=_MIN_TISSUE.value,
            unannotated=_UNANNOTATED.value,
            unknown=_UNKNOWN.value,
            origin=_ORIGIN.value,
            compression=_COMPRESSION.value,
        )
        rows = read_slide_list(_SITES.value, _SLIDES.value, _ANNOTATIONS.value or None)
        with tqdm(total=len(rows), unit="slide", dynamic_ncols=True) as bar:

            def tell(report: SlideReport) -> None:
                bar.update()
                bar.write(line(report))

            reports = prepare_store(
                rows,
                pathlib.Path(_OUTPUT.value),
                recipe,
                workers=_WORKERS.value or len(os.sched_getaffinity(0)),
                with_overview=_OVERVIEW.value,
                prune=_PRUNE.value,
                tell=tell,
            )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped. Finished slides are kept; the same command goes on.", file=sys.stderr)
        return 130
    return summary(reports)


def line(report: SlideReport) -> str:
    """What became of one slide, for the screen."""
    if report.record is None:
        return f"{report.row.name}: FAILED: {report.error.splitlines()[0]}"
    record = report.record
    total = max(sum(record.pixels), 1)
    parts = [f"{pixels / total:.0%}" for pixels in record.pixels]
    warnings = f"; {'; '.join(report.findings)}" if report.findings else ""
    done = " (done before)" if report.is_old else ""
    return (
        f"{report.row.name} -> {report.slide}: {record.tiles:,} tiles, {record.tissue_mm2:.2f} mm2 "
        f"of tissue, mpp {record.mpp[0]:.4g}, classes {' '.join(parts[:-1])}, ignored {parts[-1]}"
        f"{warnings}{done}"
    )


def summary(reports: tuple[SlideReport, ...]) -> int:
    """Prints what was made; returns 1 if any slide gave no tile."""
    empty = [r for r in reports if r.record is None or not r.record.tiles]
    tiles = sum(r.record.tiles for r in reports if r.record is not None)
    print(f"{tiles:,} tiles of {len(reports) - len(empty)} slides in {_OUTPUT.value}.")
    if empty:
        print(f"No tile of {len(empty)} slides:", file=sys.stderr)
        for report in empty:
            why = report.error.splitlines()[0] if report.error else "no tissue and no annotation"
            print(f"  {report.row.name}: {why}", file=sys.stderr)
    print(f"Train with: python -m experiments.feddp --config.data.store={_OUTPUT.value} "
          f"--config.data.tile_size={_TILE.value}")  # fmt: skip
    return 1 if empty else 0


if __name__ == "__main__":
    app.run(main)
