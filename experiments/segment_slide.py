r"""Segments a slide with the model of a finished run, and writes what QuPath and others open.

    python -m experiments.segment_slide --checkpoint=runs/feddp --slide=a.svs --output=a
    python -m experiments.segment_slide --checkpoint=runs/feddp --slide=a.svs --output=a \
        --mpp=0.5 --kind=detection --min_area_um2=10

`--checkpoint` is the workdir of the run. Into --output come labels.ome.tif (0 background, 255 not
analysed), colours.ome.tif, objects.geojson, open_in_qupath.groovy, overlay.png, areas.csv and
summary.json. A call that was stopped goes on where it was. Memory does not grow with the slide.
"""

import json
import pathlib
import sys

from absl import app, flags, logging
from tqdm import tqdm

from experiments.launcher import EXIT_STOPPED, split_cpu
from fedjax_dp.processor import use_huge_pages

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Workdir of a finished run.", required=True, allow_override=True
)
_SLIDE = flags.DEFINE_string("slide", None, "The slide.", required=True, allow_override=True)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder of the results.", required=True, allow_override=True
)
_MPP = flags.DEFINE_float(
    "mpp", 0.0, "Of the model's tiles, micrometres; 0 = as the run says.", allow_override=True
)
_SLIDE_MPP = flags.DEFINE_float(
    "slide_mpp", 0.0, "Of the slide; 0 = as its file says.", allow_override=True
)
_WINDOW = flags.DEFINE_integer(
    "window", 0, "Side, pixels; 0 = that of the training tiles.", allow_override=True
)
_OVERLAP = flags.DEFINE_float(
    "overlap", 0.25, "Of neighbouring windows, a fraction.", allow_override=True
)
_BLOCK = flags.DEFINE_integer(
    "block", 4096, "Pixels that are finished together.", allow_override=True
)
_BATCH = flags.DEFINE_integer("batch_size", 8, "Windows at once.", allow_override=True)
_TISSUE = flags.DEFINE_string(
    "tissue",
    "saturation",
    "saturation, none (everywhere), or a GeoJSON of outlines.",
    allow_override=True,
)
_MIN_AREA = flags.DEFINE_float(
    "min_area_um2", 0.0, "Smaller objects are left out of the GeoJSON.", allow_override=True
)
_KIND = flags.DEFINE_enum(
    "kind",
    "auto",
    ["auto", "annotation", "detection"],
    "auto: two classes are detections.",
    allow_override=True,
)
_ORIGIN = flags.DEFINE_enum(
    "origin",
    "file",
    ["file", "bounds"],
    "From where QuPath counts: level 0, or the slide's bounds.",
    allow_override=True,
)


def main(argv: list[str]) -> int:
    """Segments and exports; returns 0, 1 for a user's mistake, 130 where it was stopped."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
    logging.set_verbosity(logging.WARNING)
    split_cpu(0)
    try:
        segment_slide()
    except KeyboardInterrupt:
        print("Stopped. Finished blocks are kept; the same command goes on.", file=sys.stderr)
        return EXIT_STOPPED
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def segment_slide() -> None:
    """What the flags say."""
    # jax starts here, after the devices are set up.
    from fedjax_dp.data.annotations.reading import read_polygons
    from fedjax_dp.data.preparation import file_digest
    from fedjax_dp.data.slides import open_slide
    from fedjax_dp.data.tissue import everywhere, tissue_from_outlines, tissue_mask
    from fedjax_dp.inference.exports import Exports, export
    from fedjax_dp.inference.model import load_run, predictor
    from fedjax_dp.inference.sliding_window import WindowPlan, segment

    run = load_run(pathlib.Path(_CHECKPOINT.value))
    mpp = _MPP.value or run.mpp
    if not mpp:
        raise ValueError(
            "Expected --mpp: the run does not say at how many micrometres per pixel its tiles are."
        )
    window = _WINDOW.value or run.config.data.tile_size
    plan = WindowPlan(mpp=mpp, window=window, overlap=_OVERLAP.value, block=_BLOCK.value)
    output = pathlib.Path(_OUTPUT.value)
    with open_slide(_SLIDE.value, _SLIDE_MPP.value or None) as slide:
        tissue_identity = _TISSUE.value
        if _TISSUE.value == "none":
            tissue = everywhere(slide)
        elif _TISSUE.value == "saturation":
            tissue = tissue_mask(slide)
        else:
            outlines = pathlib.Path(_TISSUE.value)
            tissue = tissue_from_outlines(slide, read_polygons(outlines))
            tissue_identity = file_digest(outlines)  # the same path may hold another drawing
        with tqdm(unit="block", desc="segmenting", dynamic_ncols=True) as bar:

            def tell(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            labels, fields = segment(
                slide,
                predictor(run, window=window, batch_size=_BATCH.value),
                tissue,
                plan,
                output / "work",
                num_classes=len(run.class_names),
                identity={
                    "model": run.digest,
                    "slide": list(slide.state),
                    "slide_mpp": list(slide.mpp),
                    "tissue": tissue_identity,
                },
                tell=tell,
            )
        kind = _KIND.value
        if kind == "auto":
            kind = "detection" if len(run.class_names) == 2 else "annotation"
        summary = export(
            output,
            slide,
            labels,
            fields,
            Exports(
                class_names=run.class_names,
                mpp=mpp,
                kind=kind,
                min_area_um2=_MIN_AREA.value,
                from_bounds=_ORIGIN.value == "bounds",
            ),
        )
        labels.close()
    print(json.dumps(summary, indent=1))
    print(f"Open {_SLIDE.value} in QuPath and run {output / 'open_in_qupath.groovy'}.")


def call(argv: list[str]) -> int:
    """Starts anew with large pages where that helps, and then is `main`."""
    use_huge_pages()
    return main(argv)


if __name__ == "__main__":
    app.run(call)
