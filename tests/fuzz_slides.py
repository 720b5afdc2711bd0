"""Mutated slides: each is read, or refused with an error, and never anything else.

    python -m tests.fuzz_slides --count=10000

prints a tally for each container. Every file is opened in a process with limited memory and time;
what was read without an error is compared with tifffile's own reading of the same bytes, and where
the file leaves segments out with what is promised for them: white, or, in a coarser level of an
SVS, the finer one resampled. A process that dies, an exception that is no `SlideError`, a file that
takes too long and pixels that differ are failures, and their bytes are kept in --keep.
"""

import struct
from typing import NamedTuple

import numpy as np
import tifffile
from PIL import Image

from fedjax_dp.data.slides import SlideError, open_slide
from tests import fuzzing
from tests.slide_files import painted, write_generic, write_ome, write_svs

WHITE = 255
BASES = {
    "svs jpeg": lambda path, image: write_svs(path, image, tile=32),
    "svs jpeg 2000": lambda path, image: write_svs(path, image, tile=32, compression=33005),
    "generic jpeg": lambda path, image: write_generic(path, image, tile=32),
    "generic lzw": lambda path, image: write_generic(path, image, tile=32, compression="lzw"),
    "generic deflate": lambda path, image: write_generic(path, image, tile=32, compression="zlib"),
    "generic zstd": lambda path, image: write_generic(path, image, tile=32, compression="zstd"),
    "strips": lambda path, image: write_generic(
        path, image, tile=None, compression=None, rowsperstrip=9
    ),
    "ome lzw": lambda path, image: write_ome(path, image, tile=32),
    "ome jpeg": lambda path, image: write_ome(path, image, tile=32, compression="jpeg"),
}
INTERESTING = (0, 1, 2, 3, 7, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1)


class Base(NamedTuple):
    """A small slide.

    Attributes:
        data: its bytes.
        counts: (place, bytes) of every number that says how long a segment is.
    """

    data: bytes
    counts: tuple[tuple[int, int], ...]


def bases(folder):
    """Container -> a small slide of it."""
    image = painted(150, 170)
    found = {}
    for name, write in BASES.items():
        path = folder / "base.tif"
        write(path, image)
        found[name] = Base(path.read_bytes(), places_of_counts(path))
    return found


def places_of_counts(path):
    found = []
    with tifffile.TiffFile(path) as tiff:
        for page in [*tiff.pages, *(tiff.pages.first.pages or ())]:
            tag = page.tags[325 if page.is_tiled else 279]
            width = {3: 2, 4: 4, 16: 8}[int(tag.dtype)]
            found += [(tag.valueoffset + width * index, width) for index in range(tag.count)]
    return tuple(found)


def mutated(base, rng):
    """The bytes with one to six changes: of bits, of tags, of lengths, or of what is where.

    Now and then segments are left out, and then perhaps nothing else changes.
    """
    data = bytearray(base.data)
    if rng.random() < 0.15:
        for chosen in rng.integers(0, len(base.counts), int(rng.integers(1, 6))):
            place, width = base.counts[chosen]
            data[place : place + width] = bytes(width)
        if rng.random() < 0.5:
            return bytes(data)
    for _ in range(int(rng.integers(1, 7)) if rng.random() < 0.7 else 1):
        if not data:  # all dropped
            break
        place = int(rng.integers(0, len(data)))
        kind = rng.choice(["bit", "byte", "tag", "number", "cut", "copy", "drop", "zero"])
        size = int(rng.integers(1, 64))
        if kind == "bit":
            data[place] ^= 1 << int(rng.integers(0, 8))
        elif kind == "byte":
            data[place] = int(rng.integers(0, 256))
        elif kind == "tag":
            change_tag(data, rng)
        elif kind == "number" and place + 4 <= len(data):
            value = INTERESTING[int(rng.integers(0, len(INTERESTING)))]
            data[place : place + 4] = struct.pack("<I", value)
        elif kind == "cut" and rng.random() < 0.2:
            del data[max(place, 8) :]
        elif kind == "copy":
            other = int(rng.integers(0, len(data)))
            data[place : place + size] = data[other : other + size]
        elif kind == "drop" and rng.random() < 0.2:
            del data[place : place + size]
        elif kind == "zero":
            data[place : place + size] = bytes(len(data[place : place + size]))
    return bytes(data)


def change_tag(data, rng):
    """One field of one entry of the first directory becomes another number."""
    big = data[2] == 43
    width, head = (20, 8) if big else (12, 2)
    (start,) = struct.unpack_from("<Q" if big else "<I", data, 8 if big else 4)
    if start + head > len(data):
        return
    (count,) = struct.unpack_from("<Q" if big else "<H", data, start)
    entry = start + head + width * int(rng.integers(0, max(1, min(count, 40))))
    field, size = ((0, 2), (2, 2), (4, 4), (width - 4, 4), (width - 4, 2))[int(rng.integers(0, 5))]
    if entry + field + size <= len(data):
        value = INTERESTING[int(rng.integers(0, len(INTERESTING)))] % 256**size
        data[entry + field : entry + field + size] = value.to_bytes(size, "little")


def look(path):
    """(outcome, whether pixels were decoded) of one file."""
    decoded = []
    try:
        with open_slide(path, mpp=0.5) as slide:
            pages = slide._pyramid._pages if hasattr(slide._pyramid, "_pages") else ()
            for page in pages:
                decode = page._decode
                page._decode = lambda *a, d=decode, **k: (decoded.append(1), d(*a, **k))[1]
            sizes = [level[:2] for level in slide.levels]
            if sum(w * h for w, h in sizes) > 2**24:
                slide.read_region(0, 0, 64, 64)
                slide.read_region(0, 0, 64, 64, 2.0)
                return "read", bool(decoded)
            found = [slide.read_level(n, 0, 0, w, h) for n, (w, h) in enumerate(sizes)]
            slide.read_region(-10, 5, 60, 50, 0.7)
            if not pages:  # another reader's file: nothing to compare with
                return "read", True
            is_aperio = slide.format == "Aperio SVS"
    except SlideError:
        return "refused", bool(decoded)
    return compare(path, found, is_aperio), True


def compare(path, found, is_aperio):
    """Whether tifffile reads the same pixels where it reads any.

    Only tifffile's own errors are caught: one of the comparison is a failure like another.
    """
    pages = tifffile_reads(path, {level.shape[:2] for level in found})
    outcome = "read"
    for number, level in enumerate(found):
        instead = made_from(found[number - 1], level) if is_aperio and number else None
        there = [(p, pixels) for p, pixels in pages or () if size(p) == level.shape[:2]]
        if any(pixels is not None and equal(level, p, pixels, instead) for p, pixels in there):
            continue
        if pages is not None and all(pixels is not None for _, pixels in there):
            return "differs"
        outcome = "read, and tifffile refuses"
    return outcome


def tifffile_reads(path, sizes):
    """[(page, its pixels or None where tifffile refuses them)] of some sizes; None for no file."""
    found = []
    try:
        with tifffile.TiffFile(path, is_ndpi=False) as tiff:
            pages = [*tiff.pages[:64], *(tiff.pages.first.pages or ())]
            for page in pages:
                if size(page) in sizes:
                    found.append((page, pixels_of(page)))
    except Exception:
        return None
    return found


def size(page):
    """(height, width)"""
    return page.imagelength, page.imagewidth


def pixels_of(page):
    # Where a gap lies behind a segment of no bytes, tifffile reads on into the gap as if it were
    # the next segment, unless the empty one has no offset either.
    pairs = zip(page.dataoffsets, page.databytecounts, strict=False)
    page.dataoffsets = tuple(offset if count else 0 for offset, count in pairs)
    try:
        return page.asarray()
    except Exception:
        return None


def missing_pixels(page):
    """bool [h, w]: where the file leaves out a segment, of any plane."""
    height, width = size(page)
    step = min(page.rowsperstrip, height), width
    if page.is_tiled:
        step = page.tilelength, page.tilewidth
    grid = -(-height // step[0]), -(-width // step[1])
    missing = (np.array(page.databytecounts).reshape(-1, *grid) == 0).any(0)
    rows, columns = np.arange(height) // step[0], np.arange(width) // step[1]
    return missing[np.ix_(rows, columns)]


def made_from(finer, level):
    """What stands for missing segments of a coarser level of an SVS: Pillow's whole-picture resize.

    Beyond the edges is white, as far as the filter sees.
    """
    scale = [a / b for a, b in zip(finer.shape[:2], level.shape[:2], strict=True)]
    margin = [int(2 * value) + 2 for value in scale]
    padded = np.pad(finer, [(m, m) for m in margin] + [(0, 0)], constant_values=WHITE)
    box = (margin[1], margin[0], margin[1] + finer.shape[1], margin[0] + finer.shape[0])
    shape = level.shape[1], level.shape[0]
    return np.asarray(Image.fromarray(padded).resize(shape, Image.Resampling.BILINEAR, box=box))


def equal(level, page, pixels, instead):
    """Whether a level shows a page's pixels, and where the file leaves them out what is promised.

    Args:
        level: what was read, uint8 [h, w, 3].
        page: tifffile's.
        pixels: tifffile's reading.
        instead: uint8 [h, w, 3] that stands for missing segments; None = they are white.
    """
    missing = missing_pixels(page)
    if instead is None:
        as_promised = (level[missing] == WHITE).all()
    else:  # to one gray level: pieces are resampled apart
        as_promised = (abs(level[missing].astype(int) - instead[missing]) <= 1).all()
    if not as_promised or page.compression == 33003 or page.samplesperpixel in (2, 4):
        return bool(as_promised)  # the latter are converted on purpose
    if pixels.ndim == 3 and pixels.shape[0] == 3 != pixels.shape[2]:
        pixels = np.moveaxis(pixels, 0, -1)
    pixels = pixels.reshape(*level.shape[:2], -1)
    if page.photometric == 0 and pixels.shape[2] == 1:
        pixels = ~pixels
    return bool((pixels == level)[~missing].all())


TARGET = fuzzing.Target(
    bases, mutated, look, ("read", "refused", "read, and tifffile refuses"), ".tif"
)


def run(count, seed, folder):
    """Container -> outcome -> number, and the fraction that reached pixels, and the longest."""
    return fuzzing.run(TARGET, count, seed, folder)


def failures(tally):
    return fuzzing.failures(tally, TARGET.good)


if __name__ == "__main__":
    fuzzing.main(TARGET, __doc__, "pixels")
