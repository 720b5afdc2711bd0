"""Mutated slides: each is read, or refused with an error, and never anything else.

    python -m tests.fuzz_slides --count=10000

prints a tally for each container. Every file is opened in a process with limited memory and time;
what was read without an error is compared with tifffile's own reading of the same bytes. A process
that dies, an exception that is no `SlideError`, a file that takes too long and pixels that differ
are failures, and their bytes are kept in --keep.
"""

import argparse
import collections
import json
import multiprocessing
import pathlib
import resource
import struct
import sys
import tempfile
import time

import numpy as np
import tifffile

from fedjax_dp.data.slides import SlideError, open_slide
from tests.slide_files import painted, write_generic, write_ome, write_svs

MEMORY = 3 * 2**30
SECONDS = 20.0
BATCH = 200
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


def bases(folder):
    """Container -> the bytes of a small slide of it."""
    image = painted(150, 170)
    found = {}
    for name, write in BASES.items():
        path = folder / "base.tif"
        write(path, image)
        found[name] = path.read_bytes()
    return found


def mutated(data, rng):
    """The bytes with one to six changes: of bits, of tags, of lengths, or of what is where."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 7)) if rng.random() < 0.7 else 1):
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
    except SlideError:
        return "refused", bool(decoded)
    return compare(path, found), True


def compare(path, found):
    """Whether tifffile reads the same pixels where it reads any."""
    try:
        with tifffile.TiffFile(path, is_ndpi=False) as tiff:
            pages = [*tiff.pages[:64], *(tiff.pages.first.pages or ())]
            for level in found:
                there = [p for p in pages if (p.imagelength, p.imagewidth) == level.shape[:2]]
                if not any(equal(level, page) for page in there):
                    return "differs"
    except Exception:
        return "read, and tifffile refuses"
    return "read"


def equal(level, page):
    pixels = page.asarray()
    if page.compression == 33003 or page.samplesperpixel in (2, 4):
        return True  # converted on purpose
    if pixels.ndim == 3 and pixels.shape[0] == 3 != pixels.shape[2]:
        pixels = np.moveaxis(pixels, 0, -1)
    pixels = pixels.reshape(*level.shape[:2], -1)
    if page.photometric == 0 and pixels.shape[2] == 1:
        pixels = ~pixels
    missing = np.asarray(page.databytecounts) == 0
    return bool((pixels == level).all()) or bool(missing.any())


def work(seed, numbers, originals, folder, sender):
    """Opens mutated files one after the other, and tells of each before and after."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    names = sorted(originals)
    for number in numbers:
        rng = np.random.default_rng([seed, number])
        name = names[number % len(names)]
        path = folder / f"{number}.tif"
        path.write_bytes(mutated(originals[name], rng))
        sender.send((number, name, "begun", False, 0.0))
        start = time.monotonic()
        try:
            outcome, is_decoded = look(path)
        except Exception as error:
            outcome, is_decoded = f"raised {type(error).__name__}", True
        sender.send((number, name, outcome, is_decoded, time.monotonic() - start))
        if outcome in ("read", "refused", "read, and tifffile refuses"):
            path.unlink()
    sender.send(None)


def batch(seed, numbers, originals, folder):
    """Outcomes (name, outcome, decoded, seconds) of files, in processes that may die."""
    context = multiprocessing.get_context("fork")
    numbers = list(numbers)
    while numbers:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(seed, numbers, originals, folder, sender))
        process.start()
        sender.close()
        current = None
        try:
            while receiver.poll(SECONDS):
                message = receiver.recv()
                if message is None:
                    numbers = []
                    break
                number, name, outcome, is_decoded, seconds = message
                if outcome == "begun":
                    current = number, name
                    continue
                yield name, outcome, is_decoded, seconds
                numbers = numbers[numbers.index(number) + 1 :]
                current = None
            else:
                process.kill()
                yield current[1], f"hangs ({current[0]})", True, SECONDS
                numbers = numbers[numbers.index(current[0]) + 1 :]
        except EOFError:
            process.join()
            yield current[1], f"dies ({process.exitcode}, {current[0]})", True, 0.0
            numbers = numbers[numbers.index(current[0]) + 1 :]
        process.join()


def run(count, seed, folder):
    """Container -> outcome -> number, and the fraction that reached pixels, and the longest."""
    originals = bases(folder)
    tally = collections.defaultdict(collections.Counter)
    decoded, longest = 0, 0.0
    for start in range(0, count, BATCH):
        for name, outcome, is_decoded, seconds in batch(
            seed, range(start, min(start + BATCH, count)), originals, folder
        ):
            tally[name][outcome] += 1
            decoded += is_decoded
            longest = max(longest, seconds)
    return {name: dict(tally[name]) for name in sorted(tally)}, decoded / count, longest


def failures(tally):
    good = ("read", "refused", "read, and tifffile refuses")
    return {
        name: bad
        for name, outcomes in tally.items()
        if (bad := {o: n for o, n in outcomes.items() if o not in good})
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", default="", help="Folder for files that failed.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(options.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tally, reached, longest = run(options.count, options.seed, folder)
    print(json.dumps(tally, indent=1))
    print(f"{options.count} files, {reached:.0%} reached pixels, the longest took {longest:.1f} s")
    sys.exit(bool(failures(tally)))


if __name__ == "__main__":
    main()
