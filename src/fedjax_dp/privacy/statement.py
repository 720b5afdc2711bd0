"""The privacy statement of a run: what is promised to whom, and all that is needed to check it.

The statement is plain JSON. `recompute_epsilon` reads nothing else: it rebuilds the events from it
and composes them anew, so a reader of `privacy.json` need not trust the program that wrote it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedjax_dp.privacy import accounting, events
from fedjax_dp.privacy.mechanism import Guarantee, Mechanism

INFINITY = "infinity"

_DELTAS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
_TRUST = (
    "Each site trusts its own computers and code. The server is honest but curious: it runs the "
    "protocol and may analyse all it receives. Sites do not collude with it against each other; "
    "the guarantees of a site do not depend on it."
)
_WEAK_POINTS = (
    "Noise and augmentation keys are threefry keys of 64 bits; sampling uses Philox keyed by 128 "
    "bits, which is no cryptographic generator.",
    "Floating-point noise is hardened, not proven.",
    "Validation, test and external patients have no guarantee.",
    "Numbers of units, sampling probabilities, capacities and weights are public.",
)
_NOT_ACCOUNTED = (
    "everything logged under nonprivate/, checkpoints of client state, pictures, step times and "
    "throughput (numbers of tiles drawn): they must stay with who holds the data",
    "other runs on the same data: epsilons of runs add up",
)


def statement(
    mechanisms: Mapping[str, Mechanism],
    rounds: Mapping[str, int],
    *,
    target_delta: float,
    is_private_randomness: bool,
    trust: str = _TRUST,
    unit_note: str = "",
    weak_points: Sequence[str] = (),
    not_accounted: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Describes the guarantees of a run.

    Args:
        mechanisms: client -> its mechanism.
        rounds: client -> rounds charged to it (the write-ahead log's counts); absent means none.
        target_delta: delta of every epsilon below, in (0, 1).
        is_private_randomness: False where the secrets follow from an integer seed.
        trust: who trusts whom.
        unit_note: what the unit is really known to be, where patients are unknown.
        weak_points: more of them, beside those of every run.
        not_accounted: more of what was released or used without account.
        warnings: of `make_mechanisms`.

    Returns:
        A dict of JSON types; an infinite epsilon is the string "infinity".

    Raises:
        ValueError: rounds of an unknown client, or clients of unlike placement or unit.
    """
    unknown = sorted(set(rounds) - set(mechanisms))
    if unknown:
        raise ValueError(f"Expected rounds of clients with a mechanism, got also {unknown}.")
    kinds = {(m.placement, m.unit, m.relation) for m in mechanisms.values()}
    if len(kinds) != 1:
        raise ValueError(f"Expected one placement, unit and relation for all, got {sorted(kinds)}.")
    ((placement, unit, relation),) = kinds
    clients = {
        client: _client(mechanism, rounds.get(client, 0), target_delta)
        for client, mechanism in mechanisms.items()
    }
    epsilons = {client: _decode(entry["epsilon"]) for client, entry in clients.items()}
    worst = max(epsilons, key=lambda client: epsilons[client])
    headline = next(iter(mechanisms.values())).headline
    weak = [*_WEAK_POINTS, *weak_points]
    if not is_private_randomness:
        weak.insert(0, "NOT PRIVATE: the randomness follows from an integer seed, see `private`.")
    return {
        "format": 1,
        "private": is_private_randomness and placement != "none",
        "randomness": (
            "a 256-bit secret per client from the operating system"
            if is_private_randomness
            else "an integer seed: reproducible, and not private to anyone who knows the seed"
        ),
        "placement": placement,
        "unit": unit,
        "unit_note": unit_note,
        "protected": headline.unit,
        "relation": relation,
        "adversary": headline.adversary,
        "trust": trust,
        "sampler": (
            "Poisson over units, afresh in each local step, cut uniformly at random above the "
            "capacity; accounted as that truncated draw; sampling of clients amplifies nothing"
        ),
        "accountant": accounting.ACCOUNTANT,
        "grid": accounting.DEFAULT_GRID,
        "target_delta": target_delta,
        "epsilon": {"max": _encode(epsilons[worst]), "worst_client": worst},
        "clients": clients,
        "warnings": list(warnings),
        "weak_points": weak,
        "not_accounted": [*_NOT_ACCOUNTED, *not_accounted],
    }


def recompute_epsilon(value: Mapping[str, Any]) -> dict[str, float]:
    """Headline epsilon of every client, from the statement alone.

    Args:
        value: what `statement` returned, after a way through JSON.

    Returns:
        client -> epsilon at the statement's target_delta.
    """
    epsilons = {}
    for client, entry in value["clients"].items():
        row = entry["guarantees"][0]
        if row["event"] is None:
            epsilons[client] = math.inf if entry["rounds"] else 0.0
            continue
        epsilons[client] = accounting.epsilon(
            events.event_from_json(row["event"]),
            entry["rounds"],
            value["target_delta"],
            row["accountant_relation"],
            grid=value["grid"],
        )
    return epsilons


def _client(mechanism: Mechanism, rounds: int, delta: float) -> dict[str, Any]:
    """All that is said of one client."""
    headline = mechanism.headline
    marks = sorted(
        {max(1, math.ceil(rounds * part / 5)) for part in range(6)} & set(range(1, rounds + 1))
    )
    patient = mechanism.patient_guarantee
    return {
        "rounds": rounds,
        "epsilon": _encode(_epsilon(headline, rounds, delta)),
        "epsilon_curve": [
            {"delta": d, "epsilon": _encode(_epsilon(headline, rounds, d))}
            for d in sorted({*_DELTAS, delta}, reverse=True)
        ],
        "epsilon_by_round": [
            {"round": mark, "epsilon": _encode(_epsilon(headline, mark, delta))} for mark in marks
        ],
        "patient_epsilon": {
            "epsilon": _encode(_epsilon(patient, rounds, delta)) if patient.is_valid else None,
            "reason": patient.reason,
        },
        "one_over_n": 1 / mechanism.num_units,
        "delta_below_one_over_n": delta < 1 / mechanism.num_units,
        "expected_batch_size": mechanism.expected_batch_size,
        "noise_stddev": mechanism.noise_stddev,
        "rdp_epsilon_without_truncation": _cross_check(headline, rounds, delta),
        "mechanism": mechanism.descriptor(),
        "fingerprint": mechanism.fingerprint(),
        "guarantees": [_row(row, rounds, delta) for row in mechanism.guarantees()],
    }


def _row(row: Guarantee, rounds: int, delta: float) -> dict[str, Any]:
    return {
        "name": row.name,
        "adversary": row.adversary,
        "unit": row.unit,
        "relation": row.relation,
        "sensitivity": _encode(row.sensitivity),
        "epsilon": _encode(_epsilon(row, rounds, delta)),
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
    return None if value is None else _encode(value)


def _encode(value: float) -> float | str:
    return INFINITY if math.isinf(value) else float(value)


def _decode(value: float | str) -> float:
    return math.inf if isinstance(value, str) else value
