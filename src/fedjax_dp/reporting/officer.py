"""The privacy statement on one page, for a reader who protects data and does not compute.

Written from the statement's JSON alone, so that page and file cannot tell unlike things.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from fedjax_dp.reporting.summary import epsilon_text, round_up

WIDTH = 100
_CURVE_POINTS = 5

_WHOSE = {
    "patient": "each patient whose tissue was trained on",
    "slide": "each source image that was trained on",
    "tile": "each tile (a small square of an image) that was trained on",
}
_WHAT = {
    "patient": "all tissue of that patient",
    "slide": "that source image",
    "tile": "that tile",
}
_CLIENTS = {
    "site": ("each site as a whole", "all data of that site", "whole site"),
    "patient": ("each patient whose tissue was trained on", "all data of that patient", "patient"),
    "pool": ("the pool of all sites as a whole", "all data of the pool", "whole pool"),
}
_MAX_SITES = 16


def statement_page(value: Mapping[str, Any]) -> str:
    """A page of Markdown that says what is promised, to whom, against whom, and what is not.

    Epsilons are rounded up to two decimals, never down.

    Args:
        value: what `privacy.statement.statement` returned, or what `privacy.json` holds.

    Returns:
        Markdown, wrapped to `WIDTH` but for tables.
    """
    parts = [
        "# Privacy statement",
        _wrap(f"**{_promise(value)}**"),
        _wrap(_explanation(value)),
        _sites(value),
        *([_wrap(" ".join(notes))] if (notes := _notes(value)) else []),
        *_curve(value),
        "## Against whom, and whom one must trust",
        *_adversaries(value),
        _wrap(value["trust"]),
        _wrap(_sentence(f"how: {value['noise']}")),
        "## What is not protected, and weak points",
        _bullets([*value["not_accounted"], *value["weak_points"]]),
        *_all_runs(value),
        *_warnings(value),
        "## How to check this page",
        _wrap(
            "Every figure is in the file `privacy.json` beside it, with all that it follows from. "
            "This command computes them anew from that file, and tells what does not follow:"
        ),
        "    python -m experiments.check_statement --statement=privacy.json",
        _wrap(
            f"For the technical reader: {value['sampler']}. Accountant: {value['accountant']}. "
            f"Randomness: {value['randomness']}."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _number(value: float | str | None) -> float | None:
    return math.inf if isinstance(value, str) else value


def _epsilon(value: float | str | None) -> str:
    """An epsilon in a cell."""
    return "no valid conversion" if value is None else epsilon_text(_number(value))


def _words(value: Mapping[str, Any], protected: str = "") -> tuple[str, str, str]:
    """Who is protected: as the one promised to, as the data that would be missing, in a cell."""
    protected = protected or value["protected"]
    if protected == "client":
        return _CLIENTS[value["client_is"]]
    return _WHOSE[protected], _WHAT[protected], protected


def _shown(value: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The clients that a page has room for: of many, those that lose most."""
    clients = list(value["clients"].items())
    if len(clients) <= _MAX_SITES:
        return clients
    return sorted(clients, key=lambda c: -(_number(c[1]["epsilon"]) or 0.0))[:_MAX_SITES]


def _converted(entry: Mapping[str, Any]) -> list[str]:
    """Cells of one patient and one tile; without any guarantee there is nothing to convert."""
    if entry["epsilon"] == "infinity":
        return [_epsilon("infinity")] * 2
    return [_epsilon(entry[f"{unit}_epsilon"]["epsilon"]) for unit in ("patient", "tile")]


def _promise(value: Mapping[str, Any]) -> str:
    """The first sentence."""
    worst = _number(value["epsilon"]["max"])
    assert worst is not None  # the headline always has a number, which may be infinite
    if math.isinf(worst):
        reasons = (row["reason"] for c in value["clients"].values() for row in c["guarantees"][:1])
        why = next((reason for reason in reasons if reason), "there is too little noise")
        return f"Nothing is promised to anyone: epsilon is infinite, because {why}."
    if not any(entry["rounds"] for entry in value["clients"].values()):
        return "No site has sent anything yet, so nothing is revealed and nothing promised."
    if not value["private"]:
        return (
            "NOT PRIVATE: the noise follows from an integer seed, so nothing is promised to anyone "
            "against whoever knows or guesses that seed; the figures below are what the same run "
            "would promise with secret randomness."
        )
    return (
        f"Promised to {_words(value)[0]}: epsilon at most {epsilon_text(worst)} at delta "
        f"{value['target_delta']:g}, against {value['adversary']}."
    )


def _explanation(value: Mapping[str, Any]) -> str:
    """What epsilon means, with this run's number."""
    worst = _number(value["epsilon"]["max"])
    if worst is None or math.isinf(worst):
        return (
            "Epsilon bounds how much one person's data can change what others see. Where it is "
            "infinite, what leaves the sites may reveal anything about anyone whose tissue was "
            "trained on."
        )
    what = _words(value)[1]
    known = f"how many {value['unit']}s a site has"
    if value["protected"] == "client":
        known = f"how many {value['client_is']}s there are"
    without = {
        "zero_out": f"Without means that it counts for nothing; {known} stays known.",
        "add_or_remove": "Without means as if it had never been there.",
    }[value["relation"]]
    return (
        f"In words: whatever they look for in what they see, the chances to find it with and "
        f"without {what} differ at most by the factor e^epsilon = {_factor(worst)}, and by delta = "
        f"{value['target_delta']:g} on top. {without} Epsilon 1 is a factor of 2.7, epsilon 8 one "
        "of 2,981; above 10 or so the promise says little by itself. It limits what is learnt from "
        "taking part, not what is true of people in general."
    )


def _factor(epsilon: float) -> str:
    """e^epsilon in figures, rounded up as epsilon is."""
    up = round_up(epsilon)
    if up >= 20:
        return f"e^{up:.2f}"
    return f"{round_up(math.exp(up)):.2f}" if up < 7 else f"{math.ceil(math.exp(up)):,}"


def _sites(value: Mapping[str, Any]) -> str:
    """The table, a line per site."""
    header = [
        value["client_is"], "protects one", "of its", "rounds", "epsilon", "one patient",
        "one tile", "delta below 1/n",
    ]  # fmt: skip
    body = []
    for site, entry in _shown(value):
        units = entry["mechanism"]["num_units"]
        below = "yes" if entry["delta_below_one_over_n"] else "NO"
        declared = " (declared)" if value["relation"] == "add_or_remove" else ""
        body.append([
            site,
            _words(value)[2],
            f"{units:,} {value['unit']}{'s' * (units != 1)}{declared}",
            str(entry["rounds"]),
            _epsilon(entry["epsilon"]),
            *_converted(entry),
            f"{below} (1/n = {entry['one_over_n']:.3g})",
        ])  # fmt: skip
    return _table(header, body)


def _notes(value: Mapping[str, Any]) -> list[str]:
    """What the columns of the table mean, and why a cell has no number."""
    of = next(iter(value["clients"].values()))["hides_among"]["of"]
    notes = []
    if value["unit_note"] and value["unit_note"] != "as configured":
        notes.append(f"Unit: {value['unit_note'].removeprefix('privacy unit as known: ')}.")
    if (hidden := len(value["clients"]) - _MAX_SITES) > 0:
        notes.append(f"{hidden} more are in `privacy.json`, none with a larger epsilon.")
    if value["epsilon"]["max"] == "infinity":
        return notes
    notes.append(
        f"Each round charged to a site costs; epsilon is of all of them, at delta "
        f"{value['target_delta']:g}. The columns one patient and one tile say what the same run "
        f"promises to those. A delta of 1/n or more would allow to publish one of the n {of}s "
        "outright."
    )
    for unit in ("patient", "tile"):
        reasons = dict.fromkeys(
            entry[f"{unit}_epsilon"]["reason"]
            for entry in value["clients"].values()
            if entry[f"{unit}_epsilon"]["epsilon"] is None
        )
        notes += [f"No valid conversion to one {unit}: {reason}." for reason in reasons]
    return notes


def _adversaries(value: Mapping[str, Any]) -> list[str]:
    """A table of all that can be meant by others; none where that is one."""
    if len(value["epsilon_by_adversary"]) == 1:
        return []  # the first sentence names them
    header = ["against", "protects one", "epsilon, worst site", "one patient", "one tile"]
    body = [
        [
            adversary,
            _words(value, entry["protected"])[2],
            f"{_epsilon(entry['epsilon'])} ({entry['worst_client']})",
            *_converted(entry),
        ]
        for adversary, entry in value["epsilon_by_adversary"].items()
    ]
    return [_table(header, body)]


def _all_runs(value: Mapping[str, Any]) -> list[str]:
    """What this run and all others on the same data cost together."""
    part = value.get("across_runs")
    if part is None:
        return []
    if "error" in part:
        return [
            _wrap(_sentence(f"what all runs on the same data cost together is {part['error']}"))
        ]
    name = _words(value)[2]
    unit = "patient" if name == "patient" else value["protected"]
    lines = []
    for site, told in part["sites"].items():
        total = told["epsilon_if_all_released"][unit]
        epsilon, runs = _number(total["epsilon"]), len(told["runs"])
        # No row that holds for all of them is no promise at all.
        text = "no valid promise" if math.isinf(epsilon or 0.0) else epsilon_text(epsilon)
        lines.append(f"{site} {text} ({runs} run{'s' * (runs != 1)})")
    return [
        _wrap(
            f"All runs on the same data add up. If all of them are released, epsilon of one {name} "
            f"at delta {part['target_delta']:g}, against whoever sees most of each, is: "
            f"{', '.join(lines)}."
        )
    ]


def _warnings(value: Mapping[str, Any]) -> list[str]:
    lines = [_wrap(line, "- ", "  ") for line in value["warnings"]]  # they begin with a site's name
    return ["## Warnings", "\n".join(lines)] if lines else []


def _curve(value: Mapping[str, Any]) -> list[str]:
    """The worst site's epsilon for a few deltas, that of the statement among them."""
    worst, target = value["epsilon"]["worst_client"], value["target_delta"]
    curve = value["clients"][worst]["epsilon_curve"]
    if any(isinstance(point["epsilon"], str) for point in curve):
        return []
    near = sorted(curve, key=lambda p: abs(math.log(p["delta"] / target)))[:_CURVE_POINTS]
    points = sorted(near, key=lambda point: -point["delta"])
    header = ["delta", *(f"{point['delta']:g}" for point in points)]
    return [
        _wrap(f"The same promise of the worst site, {worst}, can be read at other deltas:"),
        _table(header, [["epsilon", *(_epsilon(point["epsilon"]) for point in points)]]),
    ]


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(_wrap(_sentence(line), "- ", "  ") for line in lines)


def _sentence(text: str) -> str:
    """A text that begins with a capital and ends with a full stop."""
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _wrap(text: str, first: str = "", later: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=later,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = (header, ["---"] * len(header), *body)
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows)
