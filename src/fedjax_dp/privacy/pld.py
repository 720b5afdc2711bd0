"""Privacy loss distributions of events, composed from one cached base.

Losses are rounded up on a grid, so every grid gives an upper bound, a finer one a smaller. What a
grid costs follows from the event: a loss between two grid points is split between them, which adds
at most a quarter of a squared cell to the variance of a step, and a sixth where losses spread over
many cells. `suited_grid` keeps that small beside the variance which the step has by itself.
"""

import functools
import math

import numpy as np
from dp_accounting import dp_event
from dp_accounting.pld import privacy_loss_distribution as pld_lib

from fedjax_dp.privacy import events
from fedjax_dp.privacy.events import NEIGHBOURS, Parts, Relation

CELLS_PER_DEVIATION = 16
"""Cells of the grid in one standard deviation of a step's privacy loss.

They cost 0.04 % of epsilon, and of that of a single step up to 0.1 %.
"""

_COARSEST_GRID = 5e-3  # between grid points delta's curve is a chord, whatever a step loses
_MAX_CELLS = 400_000  # of a grid that is given
_MAX_SUITED_CELLS = 2**15  # of one that is chosen: 0.1 s for the base, 0.04 s to compose it
_MAX_MIXTURE_CELLS = 40_000  # a cell of a mixture of Gaussians costs 25 us, a bisection each
_REACH = 10.0  # standard deviations of the noise beyond which dp-accounting cuts off e**-50


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


@functools.lru_cache(maxsize=32)
def composed(parts: Parts, relation: Relation, grid: float) -> pld_lib.PrivacyLossDistribution:
    """The distribution of all parts together, both directions.

    Args:
        parts: elementary events and their repetitions.
        relation: which datasets are neighbours.
        grid: cell of the privacy loss; a coarser one is taken for an event whose losses would not
            fit `_MAX_CELLS`.

    Raises:
        ValueError: for an event without a known distribution.
    """
    grid = max([grid, *(_finest(event, relation, _MAX_CELLS) for event, _ in parts)])
    total = None
    for event, times in parts:
        composed = _base_pld(event, relation, grid).self_compose(times)
        total = composed if total is None else total.compose(composed)
    return total


@functools.lru_cache(maxsize=32)
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
        means, probs = np.array(event.sensitivities), np.array(event.sampling_probs)
        products = np.minimum(np.outer(means, means) / event.standard_deviation**2, 700.0)
        return float(probs @ np.expm1(products) @ probs)
    z = events.noise_of(event)
    if not z:
        return 0.0
    product = min(z**-2, 700.0)
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
    tail = ratio**2 / 2 + _REACH * ratio
    upper = float(np.logaddexp(math.log(prob) + tail, math.log1p(-prob) if prob < 1 else -np.inf))
    return upper + (min(tail, -math.log1p(-prob)) if prob < 1 else tail)


def _sampling_prob(event: dp_event.DpEvent) -> float:
    return float(getattr(event, "sampling_probability", 1.0))
