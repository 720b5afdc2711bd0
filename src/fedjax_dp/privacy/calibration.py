"""The rounds that a budget allows, and the noise that a number of rounds needs."""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

from dp_accounting import dp_event

from fedjax_dp.privacy import accounting, events
from fedjax_dp.privacy.accounting import Relation

_COARSER = 8
"""A guess is made on a grid so many times as coarse, where compositions are cheap."""


def max_rounds(
    event: dp_event.DpEvent,
    target_epsilon: float,
    delta: float,
    relation: Relation = "zero_out",
    *,
    limit: int = 1_000_000,
    start: int | None = None,
    grid: float | None = None,
) -> int:
    """The most repetitions of `event` within the budget: this many stay, one more exceeds.

    Args:
        event: what one round is charged.
        target_epsilon: the budget, >= 0.
        delta: in (0, 1).
        relation: which datasets are neighbours.
        limit: the answer is at most this.
        start: where the answer is looked for first, >= 1: a good guess saves compositions. None
            guesses on a coarser grid, where they are cheap.
        grid: cell of the privacy loss; None: as `accounting.epsilon` chooses.

    Returns:
        A number of rounds in [0, limit].
    """
    if not target_epsilon >= 0:
        raise ValueError(f"Expected target_epsilon >= 0, got {target_epsilon=}.")

    def fits(rounds: int) -> bool:
        return accounting.epsilon(event, rounds, delta, relation, grid=grid) <= target_epsilon

    if start is None:
        coarse = _COARSER * accounting.grid_for(event, relation)
        if grid is None or grid < coarse:
            start = max_rounds(
                event, target_epsilon, delta, relation, limit=limit, start=1, grid=coarse
            )
    start = max(start or 1, 1)
    low, high, step = 0, min(start, limit), max(1, start // 256)
    while high < limit and fits(high):
        low, high, step = high, high + step, 2 * step
    if high >= limit:
        high = limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def calibrate_noise_multiplier(
    make_event: Callable[[float], dp_event.DpEvent],
    count: int,
    target_epsilon: float,
    target_delta: float,
    relation: Relation = "zero_out",
    *,
    rtol: float = 1e-4,
    grid: float | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> float:
    """The smallest noise multiplier, up to `rtol` upwards, whose epsilon stays within the target.

    Guarantees:
        `epsilon(make_event(z), count, target_delta) <= target_epsilon` was evaluated for the
        returned z, also for one read from the cache.

    Args:
        make_event: noise multiplier -> event, whose epsilon falls with the multiplier.
        count: repetitions, >= 1.
        target_epsilon: > 0 and finite.
        target_delta: in (0, 1).
        relation: which datasets are neighbours.
        rtol: how far above the smallest possible multiplier the answer may lie.
        grid: cell of the privacy loss; None: as `accounting.epsilon` chooses.
        cache_dir: where answers are kept between runs; nowhere if None.

    Returns:
        The multiplier, in [0.01, 1e6].

    Raises:
        ValueError: an argument is out of range, or no multiplier up to 1e6 meets the target.
    """
    if not 0 < target_epsilon < math.inf:
        raise ValueError(f"Expected a finite target_epsilon > 0, got {target_epsilon=}.")
    if count < 1:
        raise ValueError(f"Expected count >= 1, got {count=}.")

    def fits(*, is_guess: bool = False) -> Callable[[float], float]:
        # log of epsilon over target: <= 0 meets the target, and it is smooth for the secant.
        @functools.cache
        def excess(z: float) -> float:
            event, cell = make_event(z), grid
            if is_guess:
                cell = max(_COARSER * accounting.grid_for(event, relation), grid or 0.0)
            value = accounting.epsilon(event, count, target_delta, relation, grid=cell)
            return math.log(max(value, 1e-12)) - math.log(target_epsilon)

        return excess

    fine = fits()
    path = None
    if cache_dir is not None:
        arguments = [
            accounting.ACCOUNTANT, accounting.GRID, count, target_epsilon, target_delta, relation,
            rtol, grid,
            events.event_to_json(make_event(1.0)), events.event_to_json(make_event(2.0)),
        ]  # fmt: skip
        name = hashlib.sha256(json.dumps(arguments).encode()).hexdigest()[:32]
        path = Path(cache_dir) / f"noise-{name}.json"
        if path.exists():
            z = float(json.loads(path.read_text()))
            if fine(z) <= 0:
                return z
    coarse = fits(is_guess=True)
    low, high = _bracket(coarse, start=1.0, factor=2.0)
    if high > 0.01:
        _, near = _close_in(coarse, low, high, rtol=1e-2)
        low, high = _bracket(fine, start=near, factor=1.02)
        if high > 0.01:
            _, high = _close_in(fine, low, high, rtol=rtol)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(high))
        os.replace(partial, path)
    return high


def _bracket(excess: Callable[[float], float], start: float, factor: float) -> tuple[float, float]:
    """(low, high) around the root: high meets the target, low does not (or is the floor)."""
    low = high = start
    if excess(start) <= 0:
        while excess(low) <= 0:
            high = low
            if low <= 0.01:
                return low, high
            low, factor = max(low / factor, 0.01), factor**1.5
    else:
        while excess(high) > 0:
            low = high
            if high >= 1e6:
                raise ValueError(
                    "No noise multiplier up to 1e6 meets the target. Use fewer rounds, a smaller "
                    "sampling probability or a larger target_epsilon."
                )
            high, factor = min(high * factor, 1e6), factor**1.5
    return low, high


def _close_in(
    excess: Callable[[float], float], low: float, high: float, rtol: float
) -> tuple[float, float]:
    """Shrinks a bracket to a ratio of 1 + rtol by the Illinois secant in log coordinates."""
    a, b = math.log(low), math.log(high)
    fa, fb = excess(low), excess(high)
    margin = math.log1p(rtol)
    side = 0
    while b - a > margin:
        is_secant = math.inf > fa > 0 >= fb
        x = b - fb * (b - a) / (fb - fa) if is_secant else 0.5 * (a + b)
        # Land a little above the root, so that both ends of the bracket move.
        x = min(max(x + 0.4 * margin, a + 0.4 * margin), b - 0.4 * margin)
        fx = excess(math.exp(x))
        if fx > 0:
            a, fa = x, fx
            fb = 0.5 * fb if side == 1 else fb
            side = 1
        else:
            b, fb = x, fx
            high = math.exp(x)
            fa = 0.5 * fa if side == -1 else fa
            side = -1
    return math.exp(a), high
