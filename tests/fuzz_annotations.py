"""Mutated annotations: each is read, or refused with an error, and never anything else.

    python -m tests.fuzz_annotations --count=10000

prints a tally for each format. Every file is opened with limited memory and time, and painted on a
grid; an exception that is no `AnnotationError`, a process that dies and a file that takes too long
are failures, and their bytes are kept in --keep.
"""

import json

import numpy as np
from PIL import Image

from fedjax_dp.data.annotations.classes import ClassTable
from fedjax_dp.data.annotations.reading import open_labels
from fedjax_dp.data.annotations.shapes import AnnotationError
from tests import fuzzing

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
        if not data:  # all dropped
            break
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
    """(what became of one file, whether its labels were painted)."""
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
        return "refused", False
    good = labels.shape == (120, 120) and set(np.unique(labels)) <= {0, 1, 2, 255}
    return "read" if good else "nonsense", True


TARGET = fuzzing.Target(bases, mutated, look, ("read", "refused"), ".bin")


def run(count, seed, folder):
    """Format -> outcome -> number, and the longest time of a file."""
    tally = fuzzing.run(TARGET, count, seed, folder)
    return tally.outcomes, tally.longest


def failures(tally):
    return fuzzing.failures(tally, TARGET.good)


if __name__ == "__main__":
    fuzzing.main(TARGET, __doc__, "labels")
