"""Privacy loss distributions of events, composed from one cached base.

Losses are rounded up on a grid; events whose losses would not fit `_MAX_CELLS` cells get a coarser
grid, which is looser and never wrong.
"""

import functools

from dp_accounting import dp_event
from dp_accounting.pld import privacy_loss_distribution as pld_lib

from fedjax_dp.privacy import events
from fedjax_dp.privacy.events import NEIGHBOURS, Parts, Relation

_MAX_CELLS = 400_000
_MAX_MIXTURE_CELLS = 40_000  # a cell of a mixture of Gaussians costs 25 us, a bisection each


@functools.lru_cache(maxsize=32)
def composed(parts: Parts, relation: Relation, grid: float) -> pld_lib.PrivacyLossDistribution:
    """The distribution of all parts together, both directions.

    Raises:
        ValueError: for an event without a known distribution.
    """
    grid = max([grid, *(_coarsest(event, relation, grid) for event, _ in parts)])
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


def _coarsest(event: dp_event.DpEvent, relation: Relation, grid: float) -> float:
    """The cell at which the losses of `event` fill `_MAX_CELLS` cells."""
    if isinstance(event, events.MixtureDpEvent):
        return max(_coarsest(events.simplify(child), relation, grid) for child in event.events)
    noise = events.noise_of(event)
    if not noise:
        return grid
    distance = 2.0 if relation == "replace_one" else 1.0
    cells = _MAX_CELLS
    if isinstance(event, dp_event.TruncatedSubsampledGaussianDpEvent):
        distance = 4.0  # an overflow may replace, at half the multiplier
    if isinstance(event, dp_event.MixtureOfGaussiansDpEvent):
        distance, cells = max(event.sensitivities), _MAX_MIXTURE_CELLS
    ratio = distance / noise
    return (ratio**2 + 20 * ratio) / cells
