"""Holds a privacy statement against itself: nothing but the file is needed.

Three questions. Do the rows' epsilons follow from their events? Do the rows follow from the
settings that the file describes? Do the sums (worst site, patient, curve) follow from the rows?
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from fedjax_dp.privacy.mechanism import mechanism_from_descriptor
from fedjax_dp.privacy.statement import SECRET_RANDOMNESS, decode, recompute, statement

RTOL = 1e-6
"""Figures of one accountant agree to rounding; another version of it may be further off."""

_SAID_OF_THE_RUN = (
    "accountant", "unit_note", "warnings", "weak_points", "not_accounted", "across_runs",
)  # fmt: skip
"""What the run or the version of the code adds, and nothing in the file can prove."""


def disagreements(value: Mapping[str, Any]) -> list[str]:
    """Everything in a statement that does not follow from the rest of it.

    An altered epsilon, event, number of rounds, relation or setting is found. Whether the settings
    are those that ran, and the rounds those that were charged, no file can prove.

    Args:
        value: what `statement` returned, after a way through JSON.

    Returns:
        One line for each disagreement; none where all follows.
    """
    try:
        recomputed = recompute(value)
        mechanisms = {
            client: mechanism_from_descriptor(entry["mechanism"])
            for client, entry in value["clients"].items()
        }
        again = statement(
            mechanisms,
            {client: entry["rounds"] for client, entry in value["clients"].items()},
            target_delta=value["target_delta"],
            is_private_randomness=value["randomness"] == SECRET_RANDOMNESS,
            client_is=value["client_is"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"the statement cannot be read: {type(error).__name__}: {error}"]
    found = []
    for client, entry in value["clients"].items():
        for row in entry["guarantees"]:
            figure = recomputed[client][row["name"]]
            if not _is_close(decode(row["epsilon"]), figure):
                found.append(
                    f"clients/{client}/{row['name']}: epsilon {row['epsilon']} is stated, "
                    f"{figure:.6g} follows from the row's event and the rounds"
                )
    for name in dict.fromkeys([*value, *again]):
        if name not in _SAID_OF_THE_RUN:
            found += _differences(value.get(name), again.get(name), name)
    missing = [line for line in again["weak_points"] if line not in value.get("weak_points", ())]
    return found + [f"weak_points: missing is {line!r}" for line in missing]


def _differences(stated: Any, follows: Any, path: str) -> Iterator[str]:
    """Lines for what is unlike in two trees of JSON types."""
    if isinstance(stated, Mapping) and isinstance(follows, Mapping):
        for name in dict.fromkeys([*stated, *follows]):
            yield from _differences(stated.get(name), follows.get(name), f"{path}/{name}")
    elif isinstance(stated, list) and isinstance(follows, list | tuple):
        if len(stated) != len(follows):
            yield f"{path}: {len(stated)} entries are stated, {len(follows)} follow"
        for i, (one, other) in enumerate(zip(stated, follows, strict=False)):
            name = one.get("name", i) if isinstance(one, Mapping) else i
            yield from _differences(one, other, f"{path}/{name}")
    elif isinstance(stated, int | float) and isinstance(follows, int | float):
        if not _is_close(float(stated), float(follows)):
            yield f"{path}: {stated} is stated, {follows:.6g} follows from the settings"
    elif isinstance(follows, tuple):
        yield from _differences(stated, list(follows), path)
    elif stated != follows:
        yield f"{path}: {stated!r} is stated, {follows!r} follows from the settings"


def _is_close(one: float, other: float) -> bool:
    return one == other or math.isclose(one, other, rel_tol=RTOL)
