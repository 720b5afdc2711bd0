"""Dice against epsilon of finished runs: one table, one picture.

    python -m experiments.tradeoff --workdirs='runs/sweep/*' --output=runs/tradeoff

Runs are grouped by placement and by whom their epsilon protects; runs without privacy are the
lines that the others are held against. Writes OUTPUT.md and OUTPUT.png.
"""

import dataclasses
import glob
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from fedjax_dp.config import names
from fedjax_dp.reporting.log import write_text
from fedjax_dp.reporting.summary import epsilon_text
from fedjax_dp.reporting.tradeoff import plot_tradeoff
from fedjax_dp.results import finished

# Other experiments have flags of these names too; one process of tests imports several.
_WORKDIRS = flags.DEFINE_string(
    "workdirs", "", "Comma-separated folders or patterns; required.", allow_override=True
)
_OUTPUT = flags.DEFINE_string(
    "output", "", "Where to write, without an ending; required.", allow_override=True
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One run as the picture needs it.

    Attributes:
        name: of the workdir.
        placement: where its noise enters.
        protected: the unit of its headline.
        epsilon: of the worst client, against the headline's adversary.
        collusion: of the worst client against a server that sees shares; None where that is no
            adversary of this placement.
        patient: the smallest that is stated for patients; None where none is valid.
        dice: mean over the test sites.
        worst: Dice of the worst test site.
    """

    name: str
    placement: str
    protected: str
    epsilon: float
    collusion: float | None
    patient: float | None
    dice: float
    worst: float


def main(argv: list[str]) -> int:
    """Reads the runs and writes table and picture; returns the exit code."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
    if not _WORKDIRS.value or not _OUTPUT.value:
        raise app.UsageError("Name runs and output: --workdirs='runs/sweep/*' --output=tradeoff.")
    folders = [f for name in names(_WORKDIRS.value) for f in sorted(glob.glob(name))]
    points = [point for folder in folders if (point := read(pathlib.Path(folder))) is not None]
    if not points:
        print(f"No finished run among {folders or _WORKDIRS.value}.", file=sys.stderr)
        return 1
    write_text(f"{_OUTPUT.value}.md", table(points))
    plot_tradeoff(
        [(label(p), p.epsilon, p.dice, p.worst) for p in points],
        pathlib.Path(f"{_OUTPUT.value}.png"),
    )
    print(table(points))
    return 0


def read(folder: pathlib.Path) -> Point | None:
    """The point of a finished run, None of any other folder."""
    summary = finished(folder)
    if summary is None:
        return None
    stated = json.loads((folder / "privacy.json").read_text("utf-8"))
    rows = [row for entry in stated["clients"].values() for row in entry["guarantees"]]
    alone = [_number(row["epsilon"]) for row in rows if row["name"].endswith("_against_shares")
             and row["unit"] == stated["protected"] and not row["reason"]]  # fmt: skip
    patients = [entry["patient_epsilon"]["epsilon"] for entry in stated["clients"].values()]
    scores = summary["test"]
    return Point(
        name=folder.name,
        placement=stated["placement"],
        protected=stated["protected"],
        epsilon=_number(stated["epsilon"]["max"]),
        collusion=max(alone, default=None),
        patient=None if None in patients else max(_number(value) for value in patients),
        dice=scores["dice"],
        worst=scores["worst_site"]["dice"],
    )


def label(point: Point) -> str:
    """The series of a point."""
    if math.isinf(point.epsilon):
        return point.name
    return f"{point.placement}, {point.protected}"


def table(points: Sequence[Point]) -> str:
    """Markdown, one line a run, the best protected first within a series."""
    lines = [
        "| run | epsilon protects a | epsilon | against colluders | patient epsilon | Dice | "
        "worst site |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for p in sorted(points, key=lambda p: (p.placement, p.protected, p.epsilon)):
        cells = [
            p.name,
            p.protected,
            epsilon_text(p.epsilon),
            "" if p.collusion is None else epsilon_text(p.collusion),
            "none valid" if p.patient is None else epsilon_text(p.patient),
            f"{p.dice:.3f}",
            f"{p.worst:.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _number(value: Any) -> float:
    return math.inf if isinstance(value, str) else float(value)


if __name__ == "__main__":
    app.run(main)
