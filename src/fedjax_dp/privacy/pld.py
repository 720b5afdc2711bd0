"""Privacy loss distributions of events, composed from one cached base.

Losses are rounded up on a grid, so every grid gives an upper bound, a finer one a smaller. What a
grid costs follows from the event: a loss between two grid points is split between them, which adds
at most a quarter of a squared cell to the variance of a step, and a sixth where losses spread over
many cells. `suited_grid` keeps that small beside the variance which the step has by itself.

dp-accounting makes the distribution of one step. Composing it and reading off epsilon is done here,
as training asks after every round: by the same transform, but over the cells that a composition
fills rather than those that one step could, ten times fewer. The library is the tests' oracle.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from dp_accounting import dp_event
from dp_accounting.pld import privacy_loss_distribution as pld_lib
from dp_accounting.pld.pld_pmf import PLDPmf
from scipy import fft, signal

from fedjax_dp.privacy import events
from fedjax_dp.privacy.events import NEIGHBOURS, Parts, Relation

CELLS_PER_DEVIATION = 16
"""Cells of the grid in one standard deviation of a step's privacy loss.

They cost 0.04 % of epsilon, and of that of a single step up to 0.1 %.
"""

_COARSEST_GRID = 5e-3  # between grid points delta's curve is a chord, whatever a step loses
_MAX_CELLS = 400_000  # of a grid that is given
_MAX_SUITED_CELLS = 2**15  # of one that is chosen: 0.1 s for the base
_MAX_MIXTURE_CELLS = 40_000  # a cell of a mixture of Gaussians costs 25 us, a bisection each
_REACH = 10.0  # standard deviations of the noise beyond which dp-accounting cuts off e**-50
_HOPELESS_GRID = 500.0  # its exponential is near the largest float; epsilon would be above it
_TAIL_MASS = 1e-15  # of a composition, beyond the cells that are kept: dp-accounting's default
_ROUNDING = 2.0**-52  # times 4 + sqrt(steps): measured errors of delta are a tenth of it at most
_ORDERS = 2.0 ** np.arange(
    -22, 3
)  # per cell; the best is within a factor of sqrt(2) of one of them


class Losses(NamedTuple):
    """The privacy loss of one or many steps, in one direction, rounded up on the grid.

    Attributes:
        grid: the cell.
        lowest: the smallest loss, in cells.
        probs: of the losses from there on, cell by cell; none is negative.
        infinity: probability of an infinite loss, and of whatever was left out.
    """

    grid: float
    lowest: int
    probs: np.ndarray
    infinity: float

    def delta(self, epsilon: float) -> float:
        """The hockey-stick divergence at `epsilon`."""
        losses = self.grid * (self.lowest + np.arange(len(self.probs)))
        above = losses > epsilon
        finite = -float(np.expm1(epsilon - losses[above]) @ self.probs[above])
        return min(1.0, self.infinity + finite)

    def epsilon(self, delta: float) -> float:
        """The smallest epsilon >= 0 at which the hockey-stick divergence is at most `delta`.

        Between the grid points l-h and l it is U - exp(epsilon - l + h) M, with U the mass of all
        losses from l on and M their sum weighed by exp(l - h - loss). M is a recursion downwards,
        by one factor exp(-h) a cell, so that no exponential of a loss itself occurs.
        """
        if self.infinity > delta:
            return math.inf
        probs = self.probs[max(0, 1 - self.lowest) :][::-1]  # of losses > 0, the largest first
        if not len(probs):
            return 0.0
        decay = math.exp(-self.grid)
        upper = self.infinity + np.cumsum(probs)
        lower = signal.lfilter([decay], [1.0, -decay], probs)
        if upper[-1] <= delta:
            return 0.0
        reached = (upper > delta) & (upper - lower >= delta)  # at the next grid point below
        k = int(np.argmax(reached)) if reached.any() else len(probs) - 1
        below = self.lowest + len(self.probs) - 2 - k
        if lower[k] == 0:
            return (below + 1) * self.grid
        return max(0.0, below * self.grid + math.log((upper[k] - delta) / lower[k]))


class _Step(NamedTuple):
    """The losses of one step in one direction, in the form in which they are composed.

    Attributes:
        grid: the cell.
        lowest: the smallest loss, in cells.
        tails: with p_i the probability of the loss lowest + i, at i >= centre the sum of those
            above i, below it minus the sum of those up to i.
        centre: the i that is nearest to the mean.
        log_mass: log of the sum of all p_i.
        log_moments: log of the sum of p_i exp(order i), at `_ORDERS` and at -`_ORDERS`.
        infinity: probability of an infinite loss.
    """

    grid: float
    lowest: int
    tails: np.ndarray
    centre: int
    log_mass: float
    log_moments: np.ndarray
    infinity: float


def suited_grid(parts: Parts, relation: Relation) -> float:
    """The cell for the composition of `parts`; the same for every number of equal rounds.

    A `CELLS_PER_DEVIATION`-th of the standard deviation of the loss of a step, on average over all
    steps, but at most `_COARSEST_GRID`, and not so fine that a step's loss fills more than
    `_MAX_SUITED_CELLS` cells. A function of the events alone, so that whoever knows them finds the
    same epsilon.
    """
    steps = sum(times for _, times in parts)
    variance = sum(times * _variance(event, relation) for event, times in parts) / steps
    grid = min(math.sqrt(variance) / CELLS_PER_DEVIATION, _COARSEST_GRID)
    return max([grid, *(_finest(event, relation, _MAX_SUITED_CELLS) for event, _ in parts)])


@functools.lru_cache(maxsize=8)  # for the deltas of one curve; epsilons are remembered elsewhere
def composed(parts: Parts, relation: Relation, grid: float) -> tuple[Losses, ...]:
    """The losses of all parts together, in each direction; once where both are the same.

    A function of its arguments alone: no composition is made from an earlier one, so that epsilon
    is the same in sequence, after a resume and from the statement.

    Args:
        parts: elementary events and their repetitions.
        relation: which datasets are neighbours.
        grid: cell of the privacy loss; a coarser one is taken for an event whose losses would not
            fit `_MAX_CELLS`.

    Raises:
        ValueError: for an event without a known distribution.
    """
    grid = max([grid, *(_finest(event, relation, _MAX_CELLS) for event, _ in parts)])
    if grid > _HOPELESS_GRID:
        return (Losses(_HOPELESS_GRID, 0, np.zeros(1), 1.0),)
    bases = [_base(event, relation, grid) for event, _ in parts]
    times = [times for _, times in parts]
    directions = max(map(len, bases))
    return tuple(
        _convolved([base[min(direction, len(base) - 1)] for base in bases], times)
        for direction in range(directions)
    )


def _convolved(steps: Sequence[_Step], times: Sequence[int]) -> Losses:
    """The losses of all steps together, each so many times.

    As dp-accounting does it: the discrete Fourier transform of a window of cells, outside of which
    lies at most `_TAIL_MASS`, by Chernoff's bound. That is charged as an infinite loss; whatever of
    it the transform wraps around into the window comes on top. So is the transform's own rounding.
    """
    taken = list(zip(steps, times, strict=True))
    cells = sum(n * (len(step.tails) - 1) for step, n in taken)
    log_moments = np.sum([n * step.log_moments for step, n in taken], axis=0)
    # Equation (5) of dp-accounting's "Privacy Loss Distributions", half of the mass at either end.
    above, below = (log_moments + math.log(2 / _TAIL_MASS)) / _ORDERS
    first = max(0, math.floor(-np.min(below)))
    last = min(cells, math.ceil(np.min(above)))
    size = fft.next_fast_len(last - first + 1, real=True)
    log_modulus, phase = np.sum([n * _log_transform(step, size) for step, n in taken], axis=0)
    modulus = np.exp(log_modulus)
    probs = fft.irfft(modulus * np.cos(phase) + 1j * (modulus * np.sin(phase)), size)
    centre = sum(n * step.centre for step, n in taken)
    finite = sum(n * math.log1p(-step.infinity) for step, n in taken)
    return Losses(
        grid=steps[0].grid,
        lowest=first + sum(n * step.lowest for step, n in taken),
        probs=np.maximum(np.roll(probs, (centre - first) % size)[: last - first + 1], 0.0),
        infinity=_TAIL_MASS + _ROUNDING * (4 + math.sqrt(sum(times))) - math.expm1(finite),
    )


def _log_transform(step: _Step, size: int) -> np.ndarray:
    """Logarithm, real and imaginary part, of the Fourier transform of a step, from its centre on.

    An error of 1e-16 in the transform X would be one of n 1e-16 in X**n. Therefore its difference
    from one is computed, which is small wherever X**n is not: summed by parts,

        sum_k p_k (1 - exp(-i w k)) = (1 - exp(-i w)) sum_k T_k exp(-i w k),

    T the tails of p. What is left of the error grows with the square root of n. A step that is
    wider than the window is wrapped around itself, which changes nothing: the transform knows cells
    modulo its size only.
    """
    cell = (np.arange(len(step.tails)) - step.centre) % size
    frequency = (2 * math.pi / size) * np.arange(size // 2 + 1)
    lack = -np.expm1(-1j * frequency) * fft.rfft(np.bincount(cell, step.tails, size))
    lack *= math.exp(-step.log_mass)
    square = lack.real * (lack.real - 2) + lack.imag**2  # |X|**2 - 1
    log_modulus = 0.5 * np.log1p(np.maximum(square, -0.5))
    far = square < -0.5  # where the square of a small |X| would have lost its digits
    with np.errstate(divide="ignore"):  # of zero
        log_modulus[far] = np.log(np.hypot(1 - lack.real[far], lack.imag[far]))
    return np.stack([log_modulus + step.log_mass, np.arctan2(-lack.imag, 1 - lack.real)])


def _base(event: dp_event.DpEvent, relation: Relation, grid: float) -> tuple[_Step, ...]:
    """One step, in each direction; remembered, within bounds of memory."""
    is_small = grid >= _finest(event, relation, _MAX_MIXTURE_CELLS)
    return (_small_base if is_small else _large_base)(event, relation, grid)


def _make_base(event: dp_event.DpEvent, relation: Relation, grid: float) -> tuple[_Step, ...]:
    pld = _base_pld(event, relation, grid)
    pmfs = (pld._pmf_remove,) if pld._symmetric else (pld._pmf_remove, pld._pmf_add)
    return tuple(map(_step, pmfs))


_small_base = functools.lru_cache(maxsize=1024)(_make_base)  # of up to 1 MB, as a rule 0.1
_large_base = functools.lru_cache(maxsize=8)(_make_base)  # of up to 10 MB, of a grid that is given


def _step(pmf: PLDPmf) -> _Step:
    """What dp-accounting has made, as `composed` needs it."""
    dense = pmf.to_dense_pmf()
    probs, infinity = np.array(dense._probs, float), float(dense._infinity_mass)
    index = np.flatnonzero(probs)
    if infinity >= 1 or not len(index):
        raise ValueError(f"Expected a finite loss of some probability, got {infinity=}.")
    logs = np.log(probs[index])
    moments = []
    for order in (*_ORDERS, *-_ORDERS):
        exponents = logs + order * index
        largest = exponents.max()
        moments.append(largest + math.log(np.exp(exponents - largest).sum()))
    mass = math.fsum(probs)
    centre = round(float(probs @ np.arange(len(probs))) / mass)
    tails = np.append(np.cumsum(probs[:0:-1])[::-1], 0.0)
    tails[:centre] = -np.cumsum(probs[:centre])
    return _Step(
        grid=dense._discretization,
        lowest=int(dense._lower_loss),
        tails=tails,
        centre=centre,
        log_mass=max(math.log(mass), math.log1p(-infinity)) + 2.0**-52,  # rounded up
        log_moments=np.reshape(moments, (2, -1)),
        infinity=infinity,
    )


def _base_pld(
    event: dp_event.DpEvent, relation: Relation, grid: float
) -> pld_lib.PrivacyLossDistribution:
    """The privacy loss distribution of one elementary event, both directions."""
    settings = {"value_discretization_interval": grid, "pessimistic_estimate": True}
    neighbours = NEIGHBOURS[relation]
    if isinstance(event, dp_event.NoOpDpEvent):  # only inside a mixture
        return pld_lib.identity(grid)
    if isinstance(event, dp_event.GaussianDpEvent):
        return pld_lib.from_gaussian_mechanism(
            event.noise_multiplier, neighboring_relation=neighbours, **settings
        )
    if isinstance(event, dp_event.PoissonSampledDpEvent) and isinstance(
        event.event, dp_event.GaussianDpEvent
    ):
        return pld_lib.from_gaussian_mechanism(
            event.event.noise_multiplier,
            sampling_prob=event.sampling_probability,
            neighboring_relation=neighbours,
            **settings,
        )
    if isinstance(event, dp_event.TruncatedSubsampledGaussianDpEvent):
        return pld_lib.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=event.dataset_size,
            sampling_probability=event.sampling_probability,
            truncated_batch_size=event.truncated_batch_size,
            noise_multiplier=event.noise_multiplier,
            value_discretization_interval=grid,
            neighboring_relation=neighbours,
        )
    if isinstance(event, dp_event.MixtureOfGaussiansDpEvent) and relation != "replace_one":
        return pld_lib.from_mixture_gaussian_mechanism(
            event.standard_deviation, event.sensitivities, event.sampling_probs, **settings
        )
    if isinstance(event, events.MixtureDpEvent):
        total, weight = None, 0.0
        for child, prob in zip(event.events, event.probs, strict=True):
            if prob == 0:
                continue
            pld = _base_pld(events.simplify(child), relation, grid)
            weight += prob
            total = pld if total is None else pld.compute_mixture(total, prob / weight)
        return total
    raise ValueError(f"No accounting of {event} under {relation=}.")


def _variance(event: dp_event.DpEvent, relation: Relation) -> float:
    """Variance of the loss of one step, up to a factor near one: chi-squared of its pair.

    The grid is compared with it; no bound rests on it. Where single losses are so large that it is
    no variance of theirs any more, it is beyond what `_COARSEST_GRID` lets through.
    """
    if isinstance(event, events.MixtureDpEvent):
        return sum(
            prob * _variance(events.simplify(child), relation)
            for child, prob in zip(event.events, event.probs, strict=True)
        )
    if isinstance(event, dp_event.MixtureOfGaussiansDpEvent):
        with np.errstate(over="ignore"):
            means = np.minimum(np.array(event.sensitivities) / event.standard_deviation, 1e3)
        probs = np.array(event.sampling_probs)
        products = np.minimum(np.outer(means, means), 700.0)
        return float(probs @ np.expm1(products) @ probs)
    z = events.noise_of(event)
    if not z:
        return 0.0
    product = min((1 / z) * (1 / z), 700.0)  # a power would raise an error for tiny z
    square = 4 * math.sinh(product) if relation == "replace_one" else math.expm1(product)
    return _sampling_prob(event) ** 2 * square


def _finest(event: dp_event.DpEvent, relation: Relation, cells: int) -> float:
    """The cell at which the losses of `event` fill so many cells."""
    if isinstance(event, events.MixtureDpEvent):
        return max(_finest(events.simplify(child), relation, cells) for child in event.events)
    noise = events.noise_of(event)
    if not noise:
        return 0.0
    if isinstance(event, dp_event.MixtureOfGaussiansDpEvent):
        return _width(1.0, max(event.sensitivities) / noise) / _MAX_MIXTURE_CELLS
    if isinstance(event, dp_event.TruncatedSubsampledGaussianDpEvent):
        # An overflow may replace, at half the multiplier, whom it finds among those drawn.
        prob = max(event.sampling_probability, event.truncated_batch_size / event.dataset_size)
        return 2 * _width(min(prob, 1.0), 2 / noise) / cells
    sides = 2 if relation == "replace_one" else 1
    return sides * _width(_sampling_prob(event), 1 / noise) / cells


def _width(prob: float, ratio: float) -> float:
    """About how far the losses of one step reach, of means `ratio` deviations of the noise apart.

    From log(1 - q), nothing drawn, or its like in the noise's lower tail, to log(1 + q (e^a - 1))
    where a is the loss of the one who is drawn in the noise's upper tail.
    """
    tail = ratio * ratio / 2 + _REACH * ratio
    upper = float(np.logaddexp(math.log(prob) + tail, math.log1p(-prob) if prob < 1 else -np.inf))
    return upper + (min(tail, -math.log1p(-prob)) if prob < 1 else tail)


def _sampling_prob(event: dp_event.DpEvent) -> float:
    return float(getattr(event, "sampling_probability", 1.0))
