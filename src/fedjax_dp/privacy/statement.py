"""The privacy statement of a run: what is promised to whom, and all that is needed to check it.

The statement is plain JSON. `recompute` reads nothing else: it rebuilds the events from it and
composes them anew, so a reader of `privacy.json` need not trust the program that wrote it.
`statement_check` also holds its sums against its rows, and its rows against its settings.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedjax_dp.privacy import accounting, events
from fedjax_dp.privacy.disclosure import disclosure
from fedjax_dp.privacy.mechanism import Guarantee, Mechanism

INFINITY = "infinity"
SECRET_RANDOMNESS = "a 256-bit secret per client from the operating system"
SEEDED_RANDOMNESS = "an integer seed: reproducible, and not private to anyone who knows the seed"
CLIENT_IS = ("site", "patient", "pool")

_DELTAS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
_NOT_ACCOUNTED = (
    "everything logged under nonprivate/, checkpoints of client state, pictures, step times and "
    "throughput (numbers of tiles drawn): they must stay with who holds the data",
)
_OTHER_RUNS = "other runs on the same data: epsilons of runs add up"

Epsilons = Mapping[str, float]
"""Name of a row -> its epsilon."""


def statement(
    mechanisms: Mapping[str, Mechanism],
    rounds: Mapping[str, int],
    *,
    target_delta: float,
    is_private_randomness: bool,
    client_is: str = "site",
    unit_note: str = "",
    weak_points: Sequence[str] = (),
    not_accounted: Sequence[str] = (),
    warnings: Sequence[str] = (),
    across_runs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Describes the guarantees of a run.

    Args:
        mechanisms: client -> its mechanism.
        rounds: client -> rounds charged to it (the write-ahead log's counts); absent means none.
        target_delta: delta of every epsilon below, in (0, 1).
        is_private_randomness: False where the secrets follow from an integer seed.
        client_is: what a client is: "site", "patient" or "pool" (of all sites).
        unit_note: what the unit is really known to be, where patients are unknown.
        weak_points: more of them, beside those of every run.
        not_accounted: more of what was released or used without account.
        warnings: of `make_mechanisms`.
        across_runs: what all runs on the same data cost together (`across_runs.to_json`), where
            that is known.

    Returns:
        A dict of JSON types; an infinite epsilon is the string "infinity". An epsilon is None where
        no row proves one, and a reason stands beside it.

    Raises:
        ValueError: rounds of an unknown client, clients of unlike placement or unit, or an unknown
            kind of clients.
    """
    if client_is not in CLIENT_IS:
        raise ValueError(f"Expected client_is in {CLIENT_IS}, got {client_is!r}.")
    unknown = sorted(set(rounds) - set(mechanisms))
    if unknown:
        raise ValueError(f"Expected rounds of clients with a mechanism, got also {unknown}.")
    kinds = {(m.placement, m.unit, m.relation) for m in mechanisms.values()}
    if len(kinds) != 1:
        raise ValueError(f"Expected one placement, unit and relation for all, got {sorted(kinds)}.")
    ((placement, unit, relation),) = kinds
    clients = {
        client: _client(mechanism, rounds.get(client, 0), target_delta, len(mechanisms), client_is)
        for client, mechanism in mechanisms.items()
    }
    by_adversary = _by_adversary(clients)
    first = next(iter(mechanisms.values()))
    headline = first.headline
    texts = disclosure(first)
    weak = [*texts.weak_points, *weak_points]
    if not is_private_randomness:
        weak.insert(0, "NOT PRIVATE: the randomness follows from an integer seed, see `private`.")
    return {
        "format": 2,
        "private": is_private_randomness and all(m.headline.is_valid for m in mechanisms.values()),
        "randomness": SECRET_RANDOMNESS if is_private_randomness else SEEDED_RANDOMNESS,
        "placement": placement,
        "noise": texts.noise,
        "unit": unit,
        "unit_note": unit_note,
        "client_is": client_is,
        "protected": headline.unit,
        "relation": relation,
        "adversary": headline.adversary,
        "trust": texts.trust,
        "sampler": texts.sampler,
        "accountant": accounting.RENYI_ACCOUNTANT
        if first.noise == "discrete_gaussian"
        else accounting.ACCOUNTANT,
        "grid": accounting.GRID,
        "target_delta": target_delta,
        "epsilon": {
            "max": by_adversary[headline.adversary]["epsilon"],
            "worst_client": by_adversary[headline.adversary]["worst_client"],
        },
        "epsilon_by_adversary": by_adversary,
        "clients": clients,
        "warnings": list(warnings),
        "weak_points": weak,
        "not_accounted": [
            *_NOT_ACCOUNTED,
            *([_OTHER_RUNS] if across_runs is None else []),
            *not_accounted,
        ],
        "across_runs": across_runs,
    }


def recompute(value: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Epsilon of every row of every client, from the statement alone.

    Args:
        value: what `statement` returned, after a way through JSON.

    Returns:
        client -> name of the row -> epsilon at the statement's target_delta; infinite where the row
        states no event.
    """
    return {
        client: {row["name"]: _recomputed(row, entry, value) for row in entry["guarantees"]}
        for client, entry in value["clients"].items()
    }


def recompute_epsilon(value: Mapping[str, Any]) -> dict[str, float]:
    """Headline epsilon of every client, from the statement alone: the first row of `recompute`."""
    return {
        client: _recomputed(entry["guarantees"][0], entry, value)
        for client, entry in value["clients"].items()
    }


def _recomputed(
    row: Mapping[str, Any], entry: Mapping[str, Any], value: Mapping[str, Any]
) -> float:
    if row["event"] is None:
        return math.inf if entry["rounds"] else 0.0
    return accounting.epsilon(
        events.event_from_json(row["event"]),
        entry["rounds"],
        value["target_delta"],
        row["accountant_relation"],
    )


def proven(
    rows: Sequence[Guarantee], epsilons: Epsilons, unit: str, client_is: str = "site"
) -> dict[str, Any]:
    """The smallest epsilon that one adversary's rows prove for one `unit`, or why none does.

    Args:
        rows: all against the same adversary; all of them hold, so the smallest epsilon counts.
        epsilons: of these rows.
        unit: "tile", "slide", "patient" or "client".
        client_is: as in `statement`.

    Returns:
        epsilon (None where no row is valid), the name of its row, and a reason where it is None.
    """
    covering = [row for row in rows if row.covers(unit, client_is=client_is)]
    valid = [row for row in covering if row.is_valid]
    if not valid:
        reasons = dict.fromkeys(row.reason for row in covering if row.reason)
        reason = "; ".join(reasons) or f"no row covers a {unit}"
        return {"epsilon": None, "row": None, "reason": reason}
    best = min(valid, key=lambda row: epsilons[row.name])
    return {"epsilon": encode(epsilons[best.name]), "row": best.name, "reason": ""}


def _client(
    mechanism: Mechanism, rounds: int, delta: float, num_clients: int, client_is: str
) -> dict[str, Any]:
    """All that is said of one client."""
    rows = mechanism.guarantees()
    headline = rows[0]
    epsilons = {row.name: _epsilon(row, rounds, delta) for row in rows}
    adversaries = {
        adversary: [row for row in rows if row.adversary == adversary]
        for adversary in dict.fromkeys(row.adversary for row in rows)
    }
    marks = sorted(
        {max(1, math.ceil(rounds * part / 5)) for part in range(6)} & set(range(1, rounds + 1))
    )
    is_central = mechanism.placement == "central"
    # Among how many the protected one hides: the trusted server mixes all clients.
    is_mixed = is_central and headline.unit == "client"
    among = num_clients if is_mixed else mechanism.num_units
    firsts = {
        adversary: next((row for row in some if row.unit == headline.unit), some[0])
        for adversary, some in adversaries.items()
    }
    by_adversary = {
        adversary: {
            "protected": firsts[adversary].unit,
            "relation": firsts[adversary].relation,
            "epsilon": encode(epsilons[firsts[adversary].name]),
            "patient_epsilon": proven(some, epsilons, "patient", client_is),
            "tile_epsilon": proven(some, epsilons, "tile", client_is),
        }
        for adversary, some in adversaries.items()
    }
    return {
        "rounds": rounds,
        "epsilon": encode(epsilons[headline.name]),
        "epsilon_curve": [
            {"delta": d, "epsilon": encode(_epsilon(headline, rounds, d))}
            for d in sorted({*_DELTAS, delta}, reverse=True)
        ],
        "epsilon_by_round": [
            {"round": mark, "epsilon": encode(_epsilon(headline, mark, delta))} for mark in marks
        ],
        "patient_epsilon": by_adversary[headline.adversary]["patient_epsilon"],
        "tile_epsilon": by_adversary[headline.adversary]["tile_epsilon"],
        "epsilon_by_adversary": by_adversary,
        "hides_among": {"number": among, "of": "client" if is_mixed else mechanism.unit},
        "one_over_n": 1 / among,
        "delta_below_one_over_n": delta < 1 / among,
        "expected_batch_size": mechanism.expected_batch_size,
        "noise_stddev": mechanism.server_noise_stddev if is_central else mechanism.noise_stddev,
        "noise_added_by": "server" if is_central else "site",
        "rdp_epsilon_without_truncation": _cross_check(headline, rounds, delta),
        "mechanism": mechanism.descriptor(),
        "fingerprint": mechanism.fingerprint(),
        "guarantees": [_row(row, epsilons[row.name]) for row in rows],
    }


def _by_adversary(clients: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Adversary -> the worst of all clients against it, the headline's adversary first."""
    found = {}
    for adversary in dict.fromkeys(a for c in clients.values() for a in c["epsilon_by_adversary"]):
        of_client = {
            client: entry["epsilon_by_adversary"][adversary]
            for client, entry in clients.items()
            if adversary in entry["epsilon_by_adversary"]
        }
        worst = max(of_client, key=lambda client: decode(of_client[client]["epsilon"]))
        found[adversary] = {
            **{name: of_client[worst][name] for name in ("protected", "relation", "epsilon")},
            "worst_client": worst,
            "patient_epsilon": _worst([c["patient_epsilon"] for c in of_client.values()]),
            "tile_epsilon": _worst([c["tile_epsilon"] for c in of_client.values()]),
        }
    return found


def _worst(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of several clients' `proven`: one without a guarantee leaves all of them without."""
    if reasons := dict.fromkeys(entry["reason"] for entry in entries if entry["epsilon"] is None):
        return {"epsilon": None, "reason": "; ".join(reasons)}
    return {"epsilon": max((e["epsilon"] for e in entries), key=decode), "reason": ""}


def _row(row: Guarantee, epsilon: float) -> dict[str, Any]:
    return {
        "name": row.name,
        "adversary": row.adversary,
        "unit": row.unit,
        "relation": row.relation,
        "sensitivity": encode(row.sensitivity),
        "epsilon": encode(epsilon),
        "event": None if row.event is None else events.event_to_json(row.event),
        "accountant_relation": row.accountant_relation,
        "assumptions": list(row.assumptions),
        "reason": row.reason,
    }


def _epsilon(row: Guarantee, rounds: int, delta: float) -> float:
    return row.epsilon(rounds, delta) if rounds else 0.0


def _cross_check(row: Guarantee, rounds: int, delta: float) -> float | str | None:
    """The looser epsilon of Renyi DP, which knows no truncation: of the untruncated event."""
    if row.event is None:
        return None
    value = accounting.rdp_epsilon(
        events.without_truncation(row.event), rounds, delta, row.accountant_relation
    )
    return None if value is None else encode(value)


def encode(value: float) -> float | str:
    """A number as the statement writes it: JSON knows no infinity."""
    return INFINITY if math.isinf(value) else float(value)


def decode(value: float | str) -> float:
    """The number that `encode` wrote."""
    return math.inf if isinstance(value, str) else float(value)
