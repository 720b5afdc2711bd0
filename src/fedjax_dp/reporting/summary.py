"""Runs side by side: what privacy cost, in points and relative, for Markdown and the terminal."""

import dataclasses
import math
from collections.abc import Sequence

_SCORES = {"dice": "Dice", "jaccard": "Jaccard", "accuracy": "Accuracy"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One run of a comparison.

    Attributes:
        name: what the reader calls the run.
        dice: headline Dice in [0, 1], None where nothing was measured.
        jaccard: headline Jaccard in [0, 1] or None.
        accuracy: headline pixel accuracy in [0, 1] or None.
        tile_epsilon: worst epsilon of any client for one tile; `math.inf` without a guarantee,
            None where no valid statement exists.
        patient_epsilon: the same for one patient.
    """

    name: str
    dice: float | None
    jaccard: float | None
    accuracy: float | None
    tile_epsilon: float | None = None
    patient_epsilon: float | None = None


def comparison_table(rows: Sequence[ComparisonRow], *, baseline: str | None = None) -> str:
    """The runs as a Markdown table.

    Args:
        rows: the runs, in the order to show.
        baseline: name of the run the others are held against: their difference is shown in
            points (hundredths of the score) and in percent of the baseline's score.

    Returns:
        Markdown, a line per run, ending in a newline.

    Raises:
        ValueError: no run, two of one name, or no run called `baseline`.
    """
    header, *body = _cells(rows, baseline)
    rule = ["---"] + ["---:"] * (len(header) - 1)
    lines = ["| " + " | ".join(c.replace("|", "\\|") for c in r) + " |" for r in (header, *body)]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]]) + "\n"


def plain_table(rows: Sequence[ComparisonRow], *, baseline: str | None = None) -> str:
    """The same table in aligned plain text for a terminal."""
    cells = _cells(rows, baseline)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]]) + "\n"


def cost_sentence(rows: Sequence[ComparisonRow], *, baseline: str, tile: str, patient: str) -> str:
    """One sentence: what protecting single tiles and whole patients cost in Dice.

    Args:
        rows: the runs.
        baseline: name of the run without privacy.
        tile: name of the run whose privacy unit is the tile.
        patient: name of the run whose privacy unit is the patient.

    Raises:
        ValueError: a named run is missing.
    """
    reference = _named(rows, baseline)
    tile_row, patient_row = _named(rows, tile), _named(rows, patient)
    return (
        f"Against {_score(reference.dice)} Dice without privacy, protecting each tile "
        f"(epsilon {epsilon_text(tile_row.tile_epsilon)}) cost {_cost(tile_row, reference)}, and "
        f"protecting each patient with all of their tiles (epsilon "
        f"{epsilon_text(patient_row.patient_epsilon)}) cost {_cost(patient_row, reference)}."
    )


def _cells(rows: Sequence[ComparisonRow], baseline: str | None) -> list[list[str]]:
    """The header and a list of cells per run."""
    names = [row.name for row in rows]
    if not rows or len(set(names)) < len(names):
        raise ValueError(f"Expected one or more runs of different names, got {names}.")
    reference = None if baseline is None else _named(rows, baseline)
    header = ["run"]
    for title in _SCORES.values():
        header += [title] if reference is None else [title, f"vs {baseline}"]
    cells = [[*header, "epsilon, tile", "epsilon, patient"]]
    for row in rows:
        line = [row.name]
        for field in _SCORES:
            value = getattr(row, field)
            line.append(_score(value))
            if reference is not None:
                line.append("" if row is reference else _change(value, getattr(reference, field)))
        cells.append([*line, epsilon_text(row.tile_epsilon), epsilon_text(row.patient_epsilon)])
    return cells


def _named(rows: Sequence[ComparisonRow], name: str) -> ComparisonRow:
    for row in rows:
        if row.name == name:
            return row
    raise ValueError(f"Expected a run called {name!r}, got {[row.name for row in rows]}.")


def _score(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _change(value: float | None, reference: float | None) -> str:
    """The signed difference in points and relative, as "-3.1 (-3.9 %)"."""
    if value is None or reference is None or math.isnan(value) or math.isnan(reference):
        return "-"
    difference = value - reference
    relative = f"{100 * difference / reference:+.1f} %" if reference else "-"
    return f"{100 * difference:+.1f} ({relative})"


def _cost(row: ComparisonRow, reference: ComparisonRow) -> str:
    """The Dice lost in words; nothing lost is said so."""
    if row.dice is None or reference.dice is None:
        return "an unmeasured amount"
    points = 100 * (reference.dice - row.dice)
    if points <= 0:
        return f"nothing ({_score(row.dice)})"
    share = f", {100 * (1 - row.dice / reference.dice):.1f} %"
    return f"{points:.1f} points{share} ({_score(row.dice)})"


def epsilon_text(value: float | None) -> str:
    """Two decimals, rounded up: a guarantee must not look better than it is."""
    if value is None or math.isnan(value):
        return "not stated"
    return "infinite" if math.isinf(value) else f"{round_up(value):.2f}"


def round_up(epsilon: float) -> float:
    """The smallest number of two decimals that is not below `epsilon`."""
    return math.ceil(round(100 * epsilon, 6)) / 100
