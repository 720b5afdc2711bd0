r"""What memory and time does a segmented slide take, as slides grow?

    python -m benchmarks.segmentation --output=benchmarks/results/segmentation.jsonl

Slides of --sides pixels are JPEG pyramids made here, of which --tissue is tissue, in pieces of half
a millimetre. Each is segmented and exported (label map, colours, objects, overlay, areas) in a
process of its own. The model is a stub: the class follows the brightness of squares of 64 px. What
is told is the process's largest memory, and seconds on the clock.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from absl import app, flags

from benchmarks import harness
from benchmarks.harness import Record, Verdict

_SIDES = flags.DEFINE_list("sides", ["20000", "40000", "80000"], "Pixels.", allow_override=True)
_TISSUE = flags.DEFINE_float("tissue", 0.05, "Fraction of the slide.", allow_override=True)
_OUTPUT = flags.DEFINE_string("output", "", "JSON lines file to append to.", allow_override=True)

GROWTH = "largest memory, the largest slide / the smallest"
_TILE, _BANK = 512, 16


def write_slide(path: pathlib.Path, side: int) -> pathlib.Path:
    """A tiled JPEG pyramid, its tiles encoded once and written again and again."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(_BANK):
        coarse = np.kron(rng.normal(0, 25, (_TILE // 64, _TILE // 64, 1)), np.ones((64, 64, 1)))
        pixels = np.array((215, 150, 190)) + coarse + rng.normal(0, 6, (_TILE, _TILE, 1))
        pixels = np.clip(pixels, 0, 255).astype(np.uint8)
        encoded.append(imagecodecs.jpeg8_encode(pixels, level=75, colorspace=2, outcolorspace=2))

    def tiles(side: int) -> Iterator[bytes]:
        count = -(-side // _TILE)
        for number in range(count * count):
            yield encoded[(number * 7 + number // count) % _BANK]

    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        level = side
        while level >= _TILE:
            writer.write(
                tiles(level),
                shape=(level, level, 3),
                dtype=np.uint8,
                tile=(_TILE, _TILE),
                compression="jpeg",
                photometric="rgb",
                subfiletype=0 if level == side else 1,
                resolution=(2e4, 2e4),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
            level //= 2
    return path


def stub(images: np.ndarray) -> np.ndarray:
    """Probabilities float32 [n, W, W, 2] by the brightness of squares of 64 px."""
    count, side = images.shape[:2]
    means = images[..., 1].reshape(count, side // 64, 64, side // 64, 64).mean((2, 4))
    bright = np.kron((means > 150)[..., None], np.ones((1, 64, 64, 1), bool)).reshape(
        count, side, side
    )
    first = np.where(bright, 0.9, 0.1).astype(np.float32)
    return np.stack([1 - first, first], -1)


def pieces(slide: Any, fraction: float) -> Any:
    """Tissue in squares of 1,024 px, strewn over the slide."""
    from fedjax_dp.data.tissue import TissueMask

    count = -(-slide.dimensions[0] // 1024)
    mask = np.random.default_rng(1).random((count, count)) < fraction
    return TissueMask(mask, (1024.0, 1024.0), "strewn")


def child(path: str, folder: str, fraction: float) -> None:
    """Segments and exports one slide; prints its largest memory and how long it took."""
    import resource
    import time

    from fedjax_dp.data.slides import open_slide
    from fedjax_dp.inference.exports import Exports, export
    from fedjax_dp.inference.sliding_window import WindowPlan, segment

    start = time.perf_counter()
    output = pathlib.Path(folder)
    with open_slide(path) as slide:
        labels, fields = segment(
            slide,
            stub,
            pieces(slide, fraction),
            WindowPlan(mpp=0.5, window=512),
            output / "work",
            num_classes=2,
            identity={},
        )
        middle = time.perf_counter()
        summary = export(
            output, slide, labels, fields, Exports(("background", "bright"), 0.5, "detection")
        )
    found = {
        "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "segment_seconds": middle - start,
        "export_seconds": time.perf_counter() - middle,
        "objects": summary["objects"],
    }
    print(json.dumps(found))


def measure(side: int, folder: pathlib.Path, fraction: float) -> Record:
    """One slide in a process of its own."""
    path = write_slide(folder / f"{side}.tif", side)
    words = [sys.executable, "-m", "benchmarks.segmentation", "child"]
    words += [str(path), str(folder / str(side)), str(fraction)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    path.unlink()
    seconds = found["segment_seconds"]
    record = harness.summary(
        "segmentation", "stub", [seconds], {"side": side, "tissue": fraction, **found}
    )
    return harness.dataclasses.replace(record, process_bytes=found["bytes"])


def main(argv: Sequence[str]) -> None:
    """Measures and reports."""
    if len(argv) > 1 and argv[1] == "child":
        child(argv[2], argv[3], float(argv[4]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        records = [
            measure(int(side), pathlib.Path(temporary), _TISSUE.value) for side in _SIDES.value
        ]
    sizes = [record.process_bytes or 0 for record in records]
    verdict = Verdict(GROWTH, max(sizes) / min(sizes), 1.1, 1.02, is_at_most=True)
    harness.report(records, _OUTPUT.value, verdicts=[verdict])
    for record in records:
        print(record.settings)


if __name__ == "__main__":
    app.run(main)
