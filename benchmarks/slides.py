r"""How fast are pixels read from slides and from a tile store, beside OpenSlide?

    python -m benchmarks.slides --output=benchmarks/results/slides.jsonl
    python -m benchmarks.slides --slides=a.svs,b.svs --output=benchmarks/results/slides.jsonl

Seconds are of CPU time, so that decoders with threads of their own gain nothing by them. Reads of
all readers alternate in blocks, at the same places, and their pixels are compared before. `aligned`
reads are tiles as they lie in the file, `unaligned` ones 256 px at random places. Neither reader
keeps decoded tiles, which would make small slides a matter of copying. Without --slides
the benchmark makes a JPEG pyramid of --side pixels itself. `store` reads 512-px tiles one by one,
of each compression.
"""

import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openslide
import tifffile
from absl import app, flags
from PIL import Image

from benchmarks import harness
from benchmarks.harness import Record, Verdict
from fedjax_dp.data.slides import Slide, open_slide
from fedjax_dp.data.store import layout
from fedjax_dp.data.store.reading import stored_pixels
from fedjax_dp.data.store.writing import StoredTile, write_slide

_SLIDES = flags.DEFINE_list(
    "slides", [], "Real slides; empty = a pyramid made here.", allow_override=True
)
_SIDE = flags.DEFINE_integer("side", 20_000, "Of the pyramid, pixels.", allow_override=True)
_READS = flags.DEFINE_integer("reads", 200, "Reads of a timed block.", allow_override=True)
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed blocks.", allow_override=True)
_OUTPUT = flags.DEFINE_string("output", "", "JSON lines file to append to.", allow_override=True)

_TILE = 256
ALIGNED = "tiles as they lie in the file, ours / OpenSlide"
UNALIGNED = "regions at random places, ours / OpenSlide"

Corners = list[tuple[int, int]]


def texture(seed: int, side: int = 1024) -> np.ndarray:
    """uint8 [side, side, 3]: as hard to compress as stained tissue, about 10 : 1 in JPEG."""
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.normal(0, 25, (side // 16, side // 16, 3)), np.ones((16, 16, 1)))
    fine = rng.normal(0, 6, (side, side, 1))
    return np.clip(np.array((225, 160, 200)) + coarse + fine, 0, 255).astype(np.uint8)


def write_pyramid(path: pathlib.Path, side: int) -> pathlib.Path:
    """A tiled JPEG pyramid of `side` pixels, written tile by tile."""
    # tifffile writes what it is given: colours have to be YCbCr before.
    bank = [np.asarray(Image.fromarray(texture(seed)).convert("YCbCr")) for seed in range(4)]
    per_bank = bank[0].shape[0] // _TILE

    def tiles(side: int) -> Any:
        count = -(-side // _TILE)
        for row in range(count):
            for column in range(count):
                picture = bank[(row // per_bank + column // per_bank) % len(bank)]
                y, x = (v % per_bank * _TILE for v in (row, column))
                yield picture[y : y + _TILE, x : x + _TILE]

    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        level = side
        while level >= 512:
            writer.write(
                tiles(level),
                shape=(level, level, 3),
                dtype=np.uint8,
                tile=(_TILE, _TILE),
                compression="jpeg",
                compressionargs={"level": 80},
                photometric="ycbcr",
                subfiletype=0 if level == side else 1,
                resolution=(2e4, 2e4),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
            level //= 2
    return path


def rgb(image: Any) -> np.ndarray:
    """OpenSlide's answer as RGB; what is transparent (outside) does not occur here."""
    return np.asarray(image)[..., :3]


def cpu_seconds(read: Callable[[int, int], Any], corners: Corners) -> float:
    """Of reading at all corners."""
    start = time.process_time()
    for x, y in corners:
        read(x, y)
    return time.process_time() - start


def measure_slide(
    path: pathlib.Path, reads: int, repeats: int
) -> tuple[list[Record], list[Verdict]]:
    """Both kinds of reads of one slide."""
    with open_slide(path, mpp=0.5, cache_bytes=0) as slide, openslide.OpenSlide(path) as other:
        other.set_cache(openslide.OpenSlideCache(0))
        side = slide._pyramid.segment_sizes[0]  # type: ignore[attr-defined]
        settings = {"slide": _described(slide), "reads": reads}
        found: list[Record] = []
        verdicts: list[Verdict] = []
        for kind, width, height, floor in (
            ("aligned", *side, 4.0),
            ("unaligned", _TILE, _TILE, 2.5),
        ):
            readers: dict[str, Callable[[int, int], Any]] = {
                "ours": lambda x, y, w=width, h=height: slide.read_region(x, y, w, h),
                "openslide": lambda x, y, w=width, h=height: other.read_region((x, y), 0, (w, h)),
            }
            times: dict[str, list[float]] = {name: [] for name in readers}
            for repeat in range(repeats + 1):  # the first warms up, and compares
                corners = _corners(slide, kind, (width, height), reads, repeat)
                for name in readers if repeat % 2 else reversed(readers):
                    seconds = cpu_seconds(readers[name], corners)
                    times[name] += [seconds] if repeat else []
                if not repeat:
                    for x, y in corners:
                        same = (readers["ours"](x, y) == rgb(readers["openslide"](x, y))).all()
                        if not same:
                            raise ValueError(f"Pixels of {path} differ at {(x, y)}.")
            records = [
                harness.summary(
                    "slides",
                    f"{kind} {name}",
                    some,
                    {**settings, "size": [width, height]},
                    tiles=reads,
                )
                for name, some in times.items()
            ]
            ratio = records[1].seconds / records[0].seconds
            label = {"aligned": ALIGNED, "unaligned": UNALIGNED}[kind]
            verdicts.append(Verdict(f"{label}, {slide.codec}", ratio, floor, 2 * floor))
            found += records
    return found, verdicts


def _described(slide: Slide) -> str:
    return f"{slide.format}, {slide.codec}, {slide.dimensions[0]} x {slide.dimensions[1]}"


def _corners(slide: Slide, kind: str, size: tuple[int, int], count: int, seed: int) -> Corners:
    rng = np.random.default_rng(seed)
    most = [max(1, whole - part) for whole, part in zip(slide.dimensions, size, strict=True)]
    found = np.stack([rng.integers(0, limit, count) for limit in most], -1)
    if kind == "aligned":
        found = found // size * size
    return [(int(x), int(y)) for x, y in found]


def measure_store(folder: pathlib.Path, reads: int, repeats: int) -> list[Record]:
    """Reading 512-px tiles one by one, of each compression."""
    side, count = 512, 400
    big = np.concatenate([texture(seed) for seed in range(4)])
    pixels: dict[str, Any] = {}
    for compression in ("none", "lz4", "zstd"):
        recipe = layout.Recipe(
            mpp=0.5, tile_size=side, class_names=("a", "b"), classes="", compression=compression
        )
        store = folder / compression
        layout.claim(store, recipe)
        record = layout.SlideRecord(
            slide="0" * 16, patient="", site="a", split="train", hospital="", tiles=0,
            tissue_mm2=0.0, pixels=(), mpp=(0.5, 0.5), width=1, height=1, codec="", warnings=0,
            recipe=recipe.digest(), content="",
        )  # fmt: skip
        rng = np.random.default_rng(0)
        corners = rng.integers(0, np.subtract(big.shape[:2], side), (count, 2))
        blank = np.zeros((side, side), np.uint8)
        tiles = (StoredTile(0, 0, 1, big[y : y + side, x : x + side], blank) for y, x in corners)
        record = write_slide(store, tiles, recipe, record)
        pixels[compression] = stored_pixels(store, [record], side)[0]
    times: dict[str, list[float]] = {name: [] for name in pixels}
    for repeat in range(repeats + 1):
        wanted = np.random.default_rng(repeat).integers(0, count, reads)
        for name, images in pixels.items():
            start = time.process_time()
            for number in wanted:
                images[int(number)]
            times[name] += [time.process_time() - start] if repeat else []
    return [
        harness.summary("slides", f"store {name}", some, {"tile_size": side}, tiles=reads)
        for name, some in times.items()
    ]


def main(argv: Sequence[str]) -> None:
    """Measures and reports."""
    del argv
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        made = [] if _SLIDES.value else [write_pyramid(folder / "made.tif", _SIDE.value)]
        for path in [*map(pathlib.Path, _SLIDES.value), *made]:
            records, verdicts = measure_slide(path, _READS.value, _REPEATS.value)
            print(f"\n{records[0].settings['slide']}")
            harness.report(records, _OUTPUT.value, verdicts=verdicts)
        if not _SLIDES.value:
            records = measure_store(folder / "stores", _READS.value, _REPEATS.value)
            print("\ntile store")
            harness.report(records, _OUTPUT.value)


if __name__ == "__main__":
    app.run(main)
