"""Mutated annotations: each is read, or refused with an error, and never anything else.

    python -m tests.fuzz_annotations --count=10000

prints a tally for each format. Every file is opened with limited memory and time, and painted on a
grid; an exception that is no `AnnotationError`, a process that dies and a file that takes too long
are failures, and their bytes are kept in --keep.
"""

import argparse
import collections
import json
import multiprocessing
import pathlib
import resource
import sys
import tempfile
import time

import numpy as np
from PIL import Image

from fedjax_dp.data.annotations.classes import ClassTable
from fedjax_dp.data.annotations.reading import open_labels
from fedjax_dp.data.annotations.shapes import AnnotationError

MEMORY, SECONDS, BATCH = 3 * 2**30, 20.0, 250
TABLE = ClassTable.from_text("background; tumour = Tumor; stroma")
TOKENS = (
    b"null", b"NaN", b"1e400", b"-1", b"[]", b"{}", b'""', b"[[", b"]]", b"<", b"/>", b"&amp;",
    b"0", b"9" * 20, b'"type"', b"true", b"\xff\xfe", b"\x00", b'Type="2"', b'NegativeROA="1"',
)  # fmt: skip


def star(rng, points=9):
    angle = np.sort(rng.uniform(0, 2 * np.pi, points))
    radius = rng.uniform(5, 40, points)
    centre = rng.uniform(20, 180, 2)
    return (
        (np.stack([np.cos(angle), np.sin(angle)], -1) * radius[:, None] + centre).round(2).tolist()
    )


def bases(folder):
    """Format -> the bytes of a small annotation of it."""
    rng = np.random.default_rng(0)
    stars = [star(rng) for _ in range(8)]
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[*s, s[0]]]},
            "properties": {
                "objectType": "annotation",
                "classification": {"name": ("Tumor", "Stroma", "Ignore*", "Region*")[i % 4]},
            },
        }
        for i, s in enumerate(stars)
    ]
    vertices = lambda s: "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in s)  # noqa: E731
    regions = "".join(
        f'<Region Id="{i}" Type="{i % 3}" NegativeROA="{int(i == 5)}"><Vertices>{vertices(s)}'
        "</Vertices></Region>"
        for i, s in enumerate(stars)
    )
    points = lambda s: "".join(  # noqa: E731
        f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in enumerate(s)
    )
    asap = "".join(
        f'<Annotation Type="{("Polygon", "Spline")[i % 2]}" PartOfGroup="Tumor"><Coordinates>'
        f"{points(s)}</Coordinates></Annotation>"
        for i, s in enumerate(stars)
    )
    mask = np.zeros((200, 200), np.uint8)
    mask[20:90, 30:120], mask[100:150, 90:180] = 1, 2
    found = {
        "geojson": json.dumps({"type": "FeatureCollection", "features": features}).encode(),
        "geojson list": json.dumps(features).encode(),
        "aperio": (
            '<Annotations><Annotation Name="Tumor" LineColor="65280"><Regions>'
            f"{regions}</Regions></Annotation></Annotations>"
        ).encode(),
        "asap": f"<ASAP_Annotations><Annotations>{asap}</Annotations></ASAP_Annotations>".encode(),
    }
    for name in ("png", "tif"):
        Image.fromarray(mask).save(folder / f"base.{name}")
        found[f"mask {name}"] = (folder / f"base.{name}").read_bytes()
    return found


def mutated(data, rng):
    """The bytes with one to five changes: of bits and bytes, of tokens, of what is where."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        place, size = int(rng.integers(0, len(data))), int(rng.integers(1, 80))
        kind = rng.choice(["bit", "byte", "token", "cut", "copy", "drop", "digit"])
        if kind == "bit":
            data[place] ^= 1 << int(rng.integers(0, 8))
        elif kind == "byte":
            data[place] = int(rng.integers(0, 256))
        elif kind == "token":
            token = TOKENS[int(rng.integers(0, len(TOKENS)))]
            data[place : place + int(rng.integers(0, 12))] = token
        elif kind == "cut" and rng.random() < 0.1:
            del data[max(place, 4) :]
        elif kind == "copy":
            other = int(rng.integers(0, len(data)))
            data[place:place] = data[other : other + size]
        elif kind == "drop":
            del data[place : place + int(rng.integers(1, 12))]
        elif kind == "digit":
            digits = [i for i in range(place, min(place + 200, len(data))) if 48 <= data[i] <= 57]
            if digits:
                data[digits[0]] = 48 + int(rng.integers(0, 10))
    return bytes(data)


def look(path):
    """What became of one file."""
    try:
        found = open_labels(
            path,
            table=TABLE,
            dimensions=(200, 200),
            unannotated="background",
            unknown="ignore",
        )
        labels = found.label_region(-10, -10, 120, 120, 2.0, 2.0)
    except AnnotationError:
        return "refused"
    good = labels.shape == (120, 120) and set(np.unique(labels)) <= {0, 1, 2, 255}
    return "read" if good else "nonsense"


def work(seed, numbers, originals, folder, sender):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    names = sorted(originals)
    for number in numbers:
        name = names[number % len(names)]
        path = folder / f"{number}.bin"
        path.write_bytes(mutated(originals[name], np.random.default_rng([seed, number])))
        sender.send((number, name, "begun", 0.0))
        start = time.monotonic()
        try:
            outcome = look(path)
        except Exception as error:
            outcome = f"raised {type(error).__name__}: {error}"[:90]
        sender.send((number, name, outcome, time.monotonic() - start))
        if outcome in ("read", "refused"):
            path.unlink()
    sender.send(None)


def outcomes(seed, numbers, originals, folder):
    """(format, outcome, seconds) of files, in processes that may die."""
    context = multiprocessing.get_context("fork")
    numbers = list(numbers)
    while numbers:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(seed, numbers, originals, folder, sender))
        process.start()
        sender.close()
        current = (numbers[0], "")
        try:
            while receiver.poll(SECONDS):
                message = receiver.recv()
                if message is None:
                    numbers = []
                    break
                number, name, outcome, seconds = message
                current = number, name
                if outcome != "begun":
                    yield name, outcome, seconds
                    numbers = numbers[numbers.index(number) + 1 :]
            else:
                process.kill()
                yield current[1], f"hangs ({current[0]})", SECONDS
                numbers = numbers[numbers.index(current[0]) + 1 :]
        except EOFError:
            process.join()
            yield current[1], f"dies ({process.exitcode}, {current[0]})", 0.0
            numbers = numbers[numbers.index(current[0]) + 1 :]
        process.join()


def run(count, seed, folder):
    """Format -> outcome -> number, and the longest time of a file."""
    originals = bases(folder)
    tally, longest = collections.defaultdict(collections.Counter), 0.0
    for start in range(0, count, BATCH):
        some = range(start, min(start + BATCH, count))
        for name, outcome, seconds in outcomes(seed, some, originals, folder):
            tally[name][outcome] += 1
            longest = max(longest, seconds)
    return {name: dict(tally[name]) for name in sorted(tally)}, longest


def failures(tally):
    found = {
        n: {o: c for o, c in t.items() if o not in ("read", "refused")} for n, t in tally.items()
    }
    return {name: bad for name, bad in found.items() if bad}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", default="", help="Folder for files that failed.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(options.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tally, longest = run(options.count, options.seed, folder)
    print(json.dumps(tally, indent=1))
    print(f"{options.count} files, the longest took {longest:.1f} s")
    sys.exit(bool(failures(tally)))


if __name__ == "__main__":
    main()
