"""Unlike events together: against direct composition, against weaker bounds, and never below."""

import math

import pytest
from dp_accounting import dp_event

from fedjax_dp.privacy import accounting
from fedjax_dp.privacy.composition import Charge, composed_epsilon, strongest
from fedjax_dp.privacy.events import MixtureDpEvent

DELTA = 1e-5


def gaussian(z):
    return dp_event.GaussianDpEvent(z)


def poisson(q, z):
    return dp_event.PoissonSampledDpEvent(q, gaussian(z))


def truncated(z, capacity=12):
    return dp_event.TruncatedSubsampledGaussianDpEvent(
        dataset_size=50, sampling_probability=0.1, truncated_batch_size=capacity, noise_multiplier=z
    )


GROUP = dp_event.MixtureOfGaussiansDpEvent(20.0, (0.0, 1.0, 2.0), (0.5, 0.3, 0.2))
MIXTURE = MixtureDpEvent(events=(poisson(0.2, 1.5), gaussian(1.5)), probs=(0.9, 0.1))
EVENTS = [gaussian(2.0), poisson(0.1, 1.0), truncated(1.0), MIXTURE]


def test_gaussian_runs_compose_to_one_of_less_noise():
    charges = [Charge(gaussian(10.0), 50, "zero_out"), Charge(gaussian(20.0), 100, "zero_out")]
    z = (50 / 10**2 + 100 / 20**2) ** -0.5
    expected = accounting.epsilon(gaussian(z), 1, DELTA)
    assert composed_epsilon(charges, DELTA) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("event", [*EVENTS, GROUP])
def test_equal_runs_compose_to_one_that_is_longer(event):
    charges = [Charge(event, rounds, "zero_out") for rounds in (5, 7, 8)]
    expected = accounting.epsilon(event, 20, DELTA)
    assert composed_epsilon(charges, DELTA) == pytest.approx(expected, rel=1e-9)


def test_nothing_costs_nothing_and_no_noise_costs_all():
    assert composed_epsilon([], DELTA) == 0.0
    charges = [Charge(gaussian(1.0), 1, "zero_out"), Charge(gaussian(0.0), 1, "zero_out")]
    assert composed_epsilon(charges, DELTA) == math.inf


@pytest.mark.parametrize("event", EVENTS)
def test_replace_one_covers_zero_out(event):
    """The lemma that lets unlike relations be composed under the stronger one."""
    for rounds in (1, 10, 60):
        for delta in (1e-3, 1e-5, 1e-8):
            weaker = accounting.epsilon(event, rounds, delta, "zero_out")
            stronger = accounting.epsilon(event, rounds, delta, "replace_one")
            assert stronger >= weaker * (1 - 1e-8)  # a cut batch is worth the same in both


@pytest.mark.parametrize("event", [gaussian(2.0), poisson(0.1, 1.0), GROUP])
def test_add_or_remove_without_a_cut_is_zero_out(event):
    expected = accounting.epsilon(event, 10, DELTA, "add_or_remove")
    assert composed_epsilon([Charge(event, 10, "add_or_remove")], DELTA) == pytest.approx(
        expected, rel=1e-9
    )
    both = [Charge(event, 4, "add_or_remove"), Charge(event, 6, "zero_out")]
    assert composed_epsilon(both, DELTA) == pytest.approx(expected, rel=1e-9)


def test_unlike_relations_compose_to_the_least_of_the_proven_bounds():
    charges = [Charge(poisson(0.1, 1.0), 40, "zero_out"), Charge(truncated(2.0), 20, "replace_one")]
    found = composed_epsilon(charges, DELTA)
    alone = [accounting.epsilon(c.event, c.rounds, DELTA, c.relation) for c in charges]
    added = sum(accounting.epsilon(c.event, c.rounds, DELTA / 2, c.relation) for c in charges)
    assert max(alone) < found < added
    # Where the replace-one part is nothing, treating all as replace-one would double the rest.
    little = [charges[0], Charge(gaussian(1e4), 1, "replace_one")]
    assert composed_epsilon(little, DELTA) == pytest.approx(alone[0], rel=0.02)


def test_gaussians_of_both_relations_compose_exactly():
    charges = [Charge(gaussian(40.0), 5, "zero_out"), Charge(gaussian(80.0), 5, "replace_one")]
    expected = accounting.epsilon(gaussian(40.0), 10, DELTA)
    assert composed_epsilon(charges, DELTA) == pytest.approx(expected, rel=1e-9)


def test_an_event_without_a_replace_one_bound_is_added():
    charges = [Charge(GROUP, 10, "zero_out"), Charge(gaussian(50.0), 10, "replace_one")]
    with pytest.raises(ValueError, match="No accounting"):
        accounting.epsilon(GROUP, 10, DELTA, "replace_one")
    group, one = (
        lambda delta, c=c: accounting.epsilon(c.event, c.rounds, delta, c.relation) for c in charges
    )
    shared = [group(part * DELTA) + one((1 - part) * DELTA) for part in (0.1, 0.5, 0.9)]
    assert composed_epsilon(charges, DELTA) == pytest.approx(min(shared), rel=1e-9)
    # Delta spent twice would be a smaller number, and no bound.
    assert composed_epsilon(charges, DELTA) > 1.01 * (group(DELTA) + one(DELTA))


def test_an_event_that_nobody_can_account_is_an_error():
    unknown = dp_event.LaplaceDpEvent(1.0)
    with pytest.raises(ValueError, match="No accounting"):
        composed_epsilon([Charge(unknown, 1, "zero_out")], DELTA)


def test_less_noise_of_the_same_event_is_evidently_the_strongest():
    quiet, loud = (Charge(truncated(z), 10, "zero_out") for z in (1.0, 2.0))
    assert strongest([loud, quiet]) == strongest([quiet, loud]) == [quiet]
    nested = [Charge(MixtureDpEvent((poisson(0.2, z),), (1.0,)), 3, "zero_out") for z in (3, 2, 1)]
    assert strongest(nested) == nested[-1:]
    repeated = [Charge(dp_event.SelfComposedDpEvent(gaussian(z), 2), 1, "zero_out") for z in (1, 2)]
    assert strongest(repeated) == repeated[:1]
    unlimited = truncated(1.0, capacity=50)  # never cut: the plain Poisson event
    charges = [Charge(e, 3, "zero_out") for e in (poisson(0.1, 2.0), unlimited, gaussian(0.0))]
    assert strongest(charges[:2]) == [charges[1]]
    assert strongest(charges) == [charges[2]]


@pytest.mark.parametrize("relation", ["zero_out", "replace_one"])
def test_a_larger_probability_of_poisson_sampling_loses_no_less(relation):
    often, seldom = (Charge(poisson(q, 1.0), 10, relation) for q in (0.2, 0.1))
    assert strongest([seldom, often]) == strongest([often, seldom]) == [often]
    for rounds, delta in ((1, 1e-3), (30, 1e-5), (30, 1e-8)):
        low, high = (accounting.epsilon(c.event, rounds, delta, relation) for c in (seldom, often))
        assert low < high
    other = Charge(poisson(0.1, 0.9), 10, relation)
    assert strongest([often, other]) == [often, other]


@pytest.mark.parametrize(
    "other",
    [
        Charge(truncated(2.0), 10, "replace_one"),
        Charge(truncated(2.0), 11, "zero_out"),
        Charge(truncated(2.0, capacity=13), 10, "zero_out"),
        Charge(gaussian(2.0), 10, "zero_out"),
        Charge(dp_event.ComposedDpEvent([truncated(2.0), gaussian(9.0)]), 10, "zero_out"),
    ],
)
def test_where_it_is_not_evident_both_count(other):
    one = Charge(truncated(1.0), 10, "zero_out")
    assert strongest([one, other]) == [one, other]
