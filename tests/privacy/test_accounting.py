import math

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant

from fedjax_dp.privacy import accounting, pld
from fedjax_dp.privacy.events import NEIGHBOURS, MixtureDpEvent
from tests.privacy.dp_events import DELTA, EVENTS, gaussian, group, poisson, truncated


def test_goldens_of_the_sampled_gaussian():
    event = poisson(0.01, 1.0)
    for relation in ("zero_out", "add_or_remove"):
        fine = accounting.epsilon(event, 1000, DELTA, relation, grid=1e-4)
        assert fine == pytest.approx(1.8282, abs=1e-4)
    assert accounting.epsilon(event, 1, DELTA) == pytest.approx(0.199, abs=1e-3)
    assert accounting.rdp_epsilon(event, 1000, DELTA) == pytest.approx(2.1014, abs=1e-4)
    assert accounting.rdp_epsilon(event, 1, DELTA) == pytest.approx(0.956, abs=1e-3)
    assert accounting.epsilon(event, 1000, DELTA, "replace_one") == pytest.approx(2.843, abs=2e-3)
    assert accounting.rdp_epsilon(event, 1000, DELTA, "replace_one") is None


def test_the_default_grid_is_looser_and_by_little():
    event = poisson(0.01, 1.0)
    coarse, fine = (accounting.epsilon(event, 1000, DELTA, grid=g) for g in (1e-3, 1e-4))
    assert fine < coarse < 1.0005 * fine


@pytest.mark.parametrize(
    ("event", "steps"),
    [
        (truncated(20_000, 0.003, 90, 3.7), 1292),
        (truncated(300, 0.05, 40, 0.8), 200),
        (truncated(300, 0.05, 17, 20.0), 200),
        (poisson(0.003, 3.7), 1292),
        (poisson(1e-3, 1.0), 1000),
        (poisson(0.5, 0.3), 10),
        (poisson(0.01, 100.0), 50),
        (MixtureDpEvent((poisson(0.02, 2.0), gaussian(2.0)), (0.99, 0.01)), 50),
        (group(2, 0.02, 6.0), 100),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else str(value),
)
def test_the_grid_follows_the_event(event, steps):
    """A finer one, of four times as many cells, would gain a thousandth of epsilon at most."""
    is_group = isinstance(event, dp_event.MixtureOfGaussiansDpEvent)  # not known for replacement
    for relation in ("zero_out",) if is_group else ("zero_out", "replace_one"):
        suited, finer = (
            accounting.epsilon(event, steps, DELTA, relation, grid=grid)
            for grid in (None, accounting.grid_for(event, relation) / 4)
        )
        assert finer * (1 - 1e-9) <= suited <= finer * (1 + 1e-3)


def test_the_grid_is_a_function_of_the_event_alone():
    """Not of how often it is repeated, so that rounds are one base composed, and figures repeat."""
    event = truncated(20_000, 0.003, 90, 3.7)
    grid = accounting.grid_for(event)
    assert grid < 1e-4
    assert accounting.grid_for(dp_event.SelfComposedDpEvent(event, 77)) == grid
    for steps in (1, 77):
        given = accounting.epsilon(event, steps, DELTA, grid=grid)
        assert accounting.epsilon(event, steps, DELTA) == given
    nothing = dp_event.NoOpDpEvent()
    assert accounting.grid_for(nothing) == 0.0
    assert accounting.epsilon(MixtureDpEvent((nothing,), (1.0,)), 3, DELTA) == 0.0


@pytest.mark.parametrize(
    "event",
    [
        truncated(5_000_000, 1e-5, 100, 0.6),
        truncated(800_000, 1e-4, 150, 1.0),
        poisson(1e-6, 0.5),
        poisson(0.9, 0.02),
        MixtureDpEvent((poisson(1e-4, 1.0), gaussian(1.0)), (1 - 1e-9, 1e-9)),
    ],
    ids=lambda event: type(event).__name__,
)
def test_no_event_gets_more_cells_than_can_be_composed_between_rounds(event):
    """Tightness has a limit where a step's losses span too much."""
    grid = accounting.grid_for(event)
    for step in pld._base(event, "zero_out", grid):
        assert len(step.tails) < 1.2 * 2**15


def test_a_given_grid_is_limited_too():
    event = poisson(0.5, 0.1)
    for losses in pld.composed(((event, 1),), "zero_out", 1e-6):
        assert len(losses.probs) < 1.2 * 400_000


def test_golden_of_the_gaussian_is_exact():
    assert accounting.epsilon(gaussian(10.0), 100, DELTA) == pytest.approx(4.377178, abs=1e-6)
    assert accounting.delta_for(gaussian(10.0), 100, 4.377178) == pytest.approx(DELTA, rel=1e-5)
    twice_as_far = accounting.epsilon(gaussian(20.0), 100, DELTA, "replace_one")
    assert twice_as_far == pytest.approx(4.377178, abs=1e-6)


@pytest.mark.parametrize(
    ("capacity", "golden", "digits"), [(100, 10.8, 0.05), (120, 5.3, 0.05), (150, 1.831, 1e-3)]
)
def test_goldens_of_truncation(capacity, golden, digits):
    event = truncated(10_000, 0.01, capacity, 1.0)
    assert accounting.epsilon(event, 1000, DELTA) == pytest.approx(golden, abs=digits)


@pytest.mark.slow
def test_golden_of_truncation_at_130():
    assert accounting.epsilon(truncated(10_000, 0.01, 130, 1.0), 1000, DELTA) == pytest.approx(
        3.7, abs=0.05
    )


@pytest.mark.slow
@pytest.mark.parametrize(("k", "golden"), [(2, 3.98), (5, 11.6), (10, 27.9), (100, 913)])
def test_goldens_of_a_patient_of_k_tiles(k, golden):
    assert accounting.epsilon(group(k, 0.01, 1.0), 1000, DELTA) == pytest.approx(golden, rel=1e-2)


def test_a_group_of_one_is_the_sampled_gaussian():
    ours = accounting.epsilon(group(1, 0.01, 1.0), 1000, DELTA)
    assert ours == pytest.approx(accounting.epsilon(poisson(0.01, 1.0), 1000, DELTA), rel=5e-3)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_steps_inside_an_event_are_rounds_outside(event):
    inside = accounting.epsilon(dp_event.SelfComposedDpEvent(event, 5), 4, DELTA)
    assert inside == accounting.epsilon(event, 20, DELTA)


@pytest.mark.parametrize("event", EVENTS[1:3], ids=lambda event: type(event).__name__)
def test_one_shot_is_incremental(event):
    """The cached base composed t times is what an accountant fed round by round says."""
    one_by_one = PLDAccountant(NEIGHBOURS["zero_out"], accounting.grid_for(event))
    for rounds in range(1, 6):
        one_by_one.compose(event)
        ours = accounting.epsilon(event, rounds, DELTA)
        assert ours == pytest.approx(one_by_one.get_epsilon(DELTA), rel=1e-6)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_delta_for_inverts_epsilon(event):
    (pair,) = accounting.epsilon_curve(event, 10, [1e-6])
    assert pair == (1e-6, accounting.epsilon(event, 10, 1e-6))
    assert accounting.delta_for(event, 10, pair[1]) == pytest.approx(1e-6, rel=1e-3)


def test_capacity_of_everything_is_no_truncation():
    assert accounting.epsilon(truncated(50, 0.1, 50, 1.0), 9, DELTA) == (
        accounting.epsilon(poisson(0.1, 1.0), 9, DELTA)
    )
    assert accounting.epsilon(truncated(50, 1.0, 50, 2.0), 9, DELTA) == (
        accounting.epsilon(gaussian(2.0), 9, DELTA)
    )


@pytest.mark.parametrize("capacity", [20, 60, 120, 150, 199])
def test_every_capacity_can_be_accounted_and_costs(capacity):
    free = accounting.epsilon(poisson(0.05, 1.0), 10, DELTA)
    assert accounting.epsilon(truncated(200, 0.05, capacity, 1.0), 10, DELTA) >= free * (1 - 1e-9)


def test_a_mixture_lies_between_its_events():
    low, high = poisson(0.1, 1.5), gaussian(1.5)
    values = [
        accounting.epsilon(MixtureDpEvent((low, high), (1 - b, b)), 10, DELTA)
        for b in (0.0, 1e-9, 0.1, 0.5, 1.0)
    ]
    assert values == sorted(values)
    assert values[0] == pytest.approx(accounting.epsilon(low, 10, DELTA), rel=1e-6)
    assert values[-1] == pytest.approx(accounting.epsilon(high, 10, DELTA), rel=1e-3)


def test_nothing_costs_nothing_and_no_noise_costs_everything():
    assert accounting.epsilon(poisson(0.1, 1.0), 0, DELTA) == 0
    assert accounting.epsilon(dp_event.NoOpDpEvent(), 5, DELTA) == 0
    assert accounting.delta_for(poisson(0.1, 1.0), 0, 1.0) == 0
    for event in (dp_event.NonPrivateDpEvent(), gaussian(0.0), poisson(0.1, 0.0)):
        assert accounting.epsilon(event, 1, DELTA) == math.inf
        assert accounting.rdp_epsilon(event, 1, DELTA) == math.inf
        assert accounting.delta_for(event, 1, 1.0) == 1


@pytest.mark.parametrize("z", [0.05, 0.02])
def test_tiny_noise_is_bounded_in_work_and_still_an_upper_bound(z):
    exact = accounting.epsilon(gaussian(z), 3, DELTA)
    nearly = accounting.epsilon(poisson(1 - 1e-9, z), 3, DELTA)
    assert exact * (1 - 1e-6) <= nearly < 1.01 * exact


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accounting.epsilon(gaussian(1.0), 1, 0.0), "delta"),
        (lambda: accounting.epsilon(gaussian(1.0), 1, float("nan")), "delta"),
        (lambda: accounting.epsilon(gaussian(1.0), -1, DELTA), "count"),
        (lambda: accounting.epsilon(gaussian(1.0), 1, DELTA, "replace"), "relation"),
        (lambda: accounting.epsilon(dp_event.LaplaceDpEvent(1.0), 1, DELTA), "No accounting"),
        (lambda: accounting.epsilon(group(2, 0.1, 1.0), 1, DELTA, "replace_one"), "No accounting"),
        (lambda: accounting.delta_for(gaussian(1.0), 1, -1.0), "target_epsilon"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
