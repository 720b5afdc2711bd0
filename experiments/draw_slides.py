r"""Slides of the synthetic hospitals with their annotations: to try everything without a patient.

    python -m experiments.draw_slides --output=runs/slides
    python -m experiments.prepare_tiles --slides=runs/slides/slides --sites=runs/slides/sites.csv \
        --classes="background; nucleus" --unannotated=ignore --tile_size=128 --output=runs/store

Each slide is a JPEG pyramid of glass with pieces of drawn tissue, and beside it lies a GeoJSON as
QuPath writes it: a region of interest around each piece, and the outline of every object in it.
"""

import csv
import pathlib
import sys

import numpy as np
import tifffile
from absl import app, flags
from tqdm import tqdm

from fedjax_dp.data.synthetic_tile import CLASS_NAMES, SITE_NAMES, TileId, TileSpec, draw_tile
from fedjax_dp.inference.overview import default_colours
from fedjax_dp.inference.polygons import Region, trace
from fedjax_dp.inference.qupath import write_geojson

_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder of slides and table.", required=True, allow_override=True
)
_SITES = flags.DEFINE_integer(
    "sites", 3, "Hospitals.", lower_bound=1, upper_bound=5, allow_override=True
)
_PER_SITE = flags.DEFINE_integer(
    "slides_per_site", 4, "Slides of each; the last is for testing.", allow_override=True
)
_SIDE = flags.DEFINE_integer(
    "side", 2048, "Of a slide, pixels.", lower_bound=1024, allow_override=True
)
_PIECES = flags.DEFINE_integer(
    "pieces", 5, "Pieces of tissue on a slide.", lower_bound=1, allow_override=True
)
_TASK = flags.DEFINE_enum(
    "task", "nuclei", sorted(CLASS_NAMES), "What is annotated.", allow_override=True
)
_MPP = flags.DEFINE_float("mpp", 0.5, "Micrometres per pixel.", allow_override=True)
_SEED = flags.DEFINE_integer("seed", 0, "Of the drawing.", lower_bound=0, allow_override=True)

_PIECE = 512
_GLASS = (244, 242, 245)


def draw_slide(site: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture uint8 [S, S, 3] and labels uint8 [S, S] of one slide; 255 is glass."""
    spec = TileSpec(
        seed=_SEED.value,
        task=_TASK.value,  # type: ignore[arg-type]
        tile_size=_PIECE,
        mpp=_MPP.value,
        variation="sites",
    )
    side = _SIDE.value
    rng = np.random.default_rng([_SEED.value, site, number])
    image = np.array(_GLASS) + rng.normal(0, 1.5, (side, side, 1))
    image = np.clip(image, 0, 255).astype(np.uint8)
    labels = np.full((side, side), 255, np.uint8)
    places = (side - 1) // (_PIECE + 16)  # apart, so that no object is in two pieces
    for tile, place in enumerate(rng.permutation(places**2)[: _PIECES.value]):
        y, x = (int(v) * (_PIECE + 16) + 16 for v in divmod(int(place), places))
        y, x = min(y, side - _PIECE), min(x, side - _PIECE)
        box = np.s_[y : y + _PIECE, x : x + _PIECE]
        image[box], labels[box] = draw_tile(spec, TileId(site, number, tile))
    return image, labels


def write_slide(path: pathlib.Path, image: np.ndarray) -> None:
    """A pyramidal TIFF with JPEG tiles."""
    per_centimetre = 1e4 / _MPP.value
    with tifffile.TiffWriter(path) as writer:
        level = image
        while True:
            writer.write(
                level,
                tile=(256, 256),
                compression="jpeg",
                compressionargs={"level": 92},
                photometric="rgb",
                subfiletype=0 if level is image else 1,
                resolution=(per_centimetre, per_centimetre),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
            if len(level) < 512:
                return
            height, width = (side // 2 * 2 for side in level.shape[:2])
            halves = level[:height, :width].reshape(height // 2, 2, width // 2, 2, 3)
            level = halves.mean((1, 3)).astype(np.uint8)


class _Labels:
    """A label map in memory, for `trace`."""

    def __init__(self, labels: np.ndarray) -> None:
        self._labels, (self.height, self.width) = labels, labels.shape

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """See `label_file.LabelMap`."""
        return self._labels[y : y + height, x : x + width]


def annotate(path: pathlib.Path, labels: np.ndarray) -> None:
    """The GeoJSON: regions of interest, and objects of every class but the background."""
    names = (*CLASS_NAMES[_TASK.value], "Region*")
    regions = trace(_Labels((labels != 255).astype(np.uint8)))
    shapes = [Region(len(names) - 1, region.polygon) for region in regions]
    write_geojson(
        path,
        [*shapes, *trace(_Labels(labels))],
        class_names=names,
        colours=default_colours(len(names)),
        scale=(1.0, 1.0),
        mpp=(_MPP.value, _MPP.value),
    )


def main(argv: list[str]) -> int:
    """Draws all slides and the table of sites."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
    output = pathlib.Path(_OUTPUT.value)
    if output.exists() and any(output.iterdir()):
        print(f"Expected an empty folder, got {output}. Choose another --output.", file=sys.stderr)
        return 1
    (output / "slides").mkdir(parents=True)
    rows = []
    jobs = [(site, number) for site in range(_SITES.value) for number in range(_PER_SITE.value)]
    for site, number in tqdm(jobs, unit="slide", dynamic_ncols=True):
        name = f"{SITE_NAMES[site]}-{number}"
        image, labels = draw_slide(site, number)
        write_slide(output / "slides" / f"{name}.tif", image)
        annotate(output / "slides" / f"{name}.geojson", labels)
        split = "test" if number == _PER_SITE.value - 1 else "train"
        rows.append((f"{name}.tif", SITE_NAMES[site], f"patient {name}", split))
    with (output / "sites.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("slide", "site", "patient", "split"))
        writer.writerows(rows)
    print(f"{len(rows)} slides and sites.csv in {output}.")
    return 0


if __name__ == "__main__":
    app.run(main)
