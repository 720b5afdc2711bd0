"""Who takes part: cohorts of clients, and the Poisson draw of units in fixed capacity.

The draws of this file are the ones `privacy/mechanism.py` accounts for; it calls them with its own
sampling probability and capacity, so that what runs and what is accounted cannot differ.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

CohortMode = Literal["all", "fixed", "poisson"]

_COINS = 0  # counter word of a step's unit draw; unit u has word u + 1


class Plan(NamedTuple):
    """The tiles one client visits in one round: S steps, U slots of units, T tiles of a unit."""

    tile_index: np.ndarray  # int32 [S, U, T], indices into the pool, 0 where padded
    num_units: np.ndarray  # int32 [S], units drawn; they fill the first slots
    num_tiles: np.ndarray  # int32 [S, U], tiles drawn of each unit, 0 where padded


def default_capacity(num_units: int, sampling_prob: float, tail: float = 1e-7) -> int:
    """The smallest capacity that a Poisson draw exceeds with probability at most `tail`.

    Truncation then costs nothing measurable; that it costs something at all is in the event.

    Args:
        num_units: units of the client, n.
        sampling_prob: probability of each unit, in [0, 1].
        tail: P(Binomial(n, sampling_prob) > capacity) allowed, per step.

    Returns:
        A capacity in [1, n] (0 for a client without units).

    Raises:
        ValueError: an argument is out of range.
    """
    _check_draw(num_units, sampling_prob, capacity=max(num_units, 1))
    if not 0 < tail < 1:
        raise ValueError(f"Expected 0 < tail < 1, got {tail=}.")
    if num_units == 0:
        return 0
    capacities = np.arange(1, num_units + 1)
    # The survival function falls, so the first capacity within the tail is the smallest.
    return int(capacities[stats.binom.sf(capacities, num_units, sampling_prob) <= tail][0])


def poisson_sample(
    rng: np.random.Generator, num_units: int, sampling_prob: float, capacity: int
) -> np.ndarray:
    """Draws every unit independently; above `capacity`, a uniform subset of the draw stays.

    One uniform number is used per unit, in unit order, whatever is drawn: the coins of one unit
    never depend on another's.

    Args:
        rng: the generator; the only source of randomness.
        num_units: units to draw from, n.
        sampling_prob: probability of each unit; 1 draws all.
        capacity: the most units returned.

    Returns:
        int32 [m], m <= capacity, ascending unit indices; may be empty.

    Raises:
        ValueError: an argument is out of range.
    """
    _check_draw(num_units, sampling_prob, capacity)
    drawn = np.flatnonzero(rng.random(num_units) < sampling_prob)
    if len(drawn) > capacity:
        drawn = np.sort(rng.choice(drawn, capacity, replace=False))
    return drawn.astype(np.int32)


def draw_plan(
    rng: np.random.Generator,
    unit_tiles: Sequence[np.ndarray],
    *,
    sampling_prob: float,
    capacity: int,
    local_steps: int,
    tiles_per_unit: int,
    num_slots: int | None = None,
) -> Plan:
    """Draws the units of every local step afresh, and tiles of every drawn unit.

    Guarantees:
        Units of a step are a Poisson draw cut at `capacity` (`poisson_sample`), steps are
        independent. Of a unit with more than T tiles, T are drawn without replacement, anew in each
        step. Every (step, unit) owns a counter-based stream, so neither the presence of a unit nor
        the number of its tiles moves another unit's tiles or any step's coins.

    Args:
        rng: the client's sampling generator of this round; one 128-bit key is taken from it.
        unit_tiles: for each unit int [n_j >= 1], the tiles it owns as indices into the pool.
        sampling_prob: probability of each unit.
        capacity: the most units in a step.
        local_steps: steps of the round, S.
        tiles_per_unit: the most tiles of a unit in a step, T.
        num_slots: U of the arrays, at least `capacity`, so that unlike clients share one shape;
            `capacity` where None.

    Returns:
        The plan, real units and tiles first.

    Raises:
        ValueError: an argument is out of range, or a unit has no tile.
    """
    num_slots = capacity if num_slots is None else num_slots
    _check_draw(len(unit_tiles), sampling_prob, capacity)
    if num_slots < capacity:
        raise ValueError(
            f"Expected num_slots >= capacity, got {num_slots=}, {capacity=}. Pass the largest "
            "capacity of all clients."
        )
    for name, value in (("local_steps", local_steps), ("tiles_per_unit", tiles_per_unit)):
        if value < 1:
            raise ValueError(f"Expected {name} >= 1, got {value}.")
    for unit, tiles in enumerate(unit_tiles):
        if len(tiles) == 0:
            raise ValueError(f"Expected every unit to own a tile, got none for unit {unit}.")

    key = rng.integers(0, 2**64, size=2, dtype=np.uint64)
    plan = Plan(
        tile_index=np.zeros((local_steps, num_slots, tiles_per_unit), np.int32),
        num_units=np.zeros((local_steps,), np.int32),
        num_tiles=np.zeros((local_steps, num_slots), np.int32),
    )
    for step in range(local_steps):
        units = poisson_sample(_stream(key, step, _COINS), len(unit_tiles), sampling_prob, capacity)
        plan.num_units[step] = len(units)
        for slot, unit in enumerate(units):
            tiles = np.asarray(unit_tiles[unit])
            if len(tiles) > tiles_per_unit:
                chosen = _stream(key, step, int(unit) + 1).choice(
                    len(tiles), tiles_per_unit, replace=False
                )
                tiles = tiles[chosen]
            plan.num_tiles[step, slot] = len(tiles)
            plan.tile_index[step, slot, : len(tiles)] = tiles
    return plan


def draw_cohort(
    rng: np.random.Generator,
    num_clients: int,
    *,
    mode: CohortMode,
    size: int | None = None,
    prob: float | None = None,
) -> np.ndarray:
    """Draws the clients that take part in one round.

    No placement of this version is amplified by it: the server sees who takes part.

    Args:
        rng: the server's generator of this round.
        num_clients: clients to draw from, C.
        mode: "all"; "fixed", `size` of them uniformly without replacement; "poisson", each with
            probability `prob`.
        size: for "fixed", in [1, C].
        prob: for "poisson", in (0, 1].

    Returns:
        int32 [m] ascending client indices; may be empty for "poisson".

    Raises:
        ValueError: an argument is missing, superfluous or out of range.
    """
    if mode not in ("all", "fixed", "poisson"):
        raise ValueError(f'Expected mode in "all", "fixed", "poisson", got {mode=}.')
    if (size is not None) != (mode == "fixed") or (prob is not None) != (mode == "poisson"):
        raise ValueError(
            f'Expected `size` with mode "fixed" and `prob` with mode "poisson" alone, got {mode=}, '
            f"{size=}, {prob=}."
        )
    if size is not None:
        if not 1 <= size <= num_clients:
            raise ValueError(f"Expected 1 <= size <= num_clients, got {size=}, {num_clients=}.")
        return np.sort(rng.choice(num_clients, size, replace=False)).astype(np.int32)
    if prob is not None:
        if not 0 < prob <= 1:
            raise ValueError(f"Expected 0 < prob <= 1, got {prob=}.")
        return np.flatnonzero(rng.random(num_clients) < prob).astype(np.int32)
    return np.arange(num_clients, dtype=np.int32)


def _stream(key: np.ndarray, step: int, word: int) -> np.random.Generator:
    """The stream of one (step, word) under `key`; 2^64 blocks lie between any two streams."""
    return np.random.Generator(np.random.Philox(key=key, counter=[0, word, step, 0]))


def _check_draw(num_units: int, sampling_prob: float, capacity: int) -> None:
    if num_units < 0:
        raise ValueError(f"Expected num_units >= 0, got {num_units=}.")
    if not 0 <= sampling_prob <= 1:
        raise ValueError(f"Expected 0 <= sampling_prob <= 1, got {sampling_prob=}.")
    if capacity < 0 or (capacity == 0 and num_units > 0):
        raise ValueError(f"Expected capacity >= 1 for {num_units=}, got {capacity=}.")
