"""Our epsilons against accountants that are not ours, and laws that need no oracle.

`oracle_epsilons.json` holds what prv-accountant, jax-privacy and closed forms said of random
events; `oracle_epsilons.py` made it and says which of them are independent, and how.

Two errors are to be told apart from a fault. The oracle's: it proves a lower and an upper bound,
`prv_eps_error` of epsilon (and a thousandth of delta) to either side. Ours: losses are rounded to a
grid, upwards only. A loss between two grid points u < loss < v is split between them, which keeps
its probability under both neighbours and adds (loss - u) (v - loss) to its variance, and half of
that to its mean: as if mu^2 of Gaussian DP grew by this. `cost_of_grid` computes what follows. The
grid is chosen so that it stays below `LOOSENESS`; on one of 1e-3 it would be up to 13 %.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from dp_accounting import dp_event, gaussian_mechanism
from scipy import optimize, stats

from fedjax_dp.privacy import accounting
from tests.privacy.dp_events import gaussian, group, poisson, truncated

FIGURES = json.loads(Path(__file__).with_name("oracle_epsilons.json").read_text())
SAMPLED = [
    (relation, case) for relation in ("zero_out", "replace_one") for case in FIGURES[relation]
]
LOOSENESS = 1e-3
"""What rounding to the grid may add to epsilon."""
FIXED_GRID = 1e-3
"""The cell that jax-privacy was told to take."""
ESTIMATE_ERROR = FIGURES["prv_eps_error"] / 1000
"""The oracle's estimate lies in the middle of its bounds and is far better than they prove: the
closed forms say how good (`test_the_oracles_agree_with_each_other`)."""


def event_of(case, *, noise=1.0, prob=1.0):
    """The event of a case; `noise` and `prob` falsify it for negative controls."""
    return poisson(min(1.0, prob * case["sampling_prob"]), noise * case["noise_multiplier"])


def epsilon(relation, case, *, grid=None, **falsified):
    event = event_of(case, **falsified)
    return accounting.epsilon(event, case["steps"], case["delta"], relation, grid=grid)


def cost_of_grid(relation, case, grid=None):
    """How much of epsilon the rounding to `grid` adds, to leading order."""
    q, z, delta = case["sampling_prob"], case["noise_multiplier"], case["delta"]
    grid = grid or accounting.grid_for(event_of(case), relation)
    noise = np.linspace(-12, 12, 20_001)
    weight = stats.norm.pdf(noise) / stats.norm.pdf(noise).sum()
    variance = 0.0
    for mean, share in ((0, 1 - q), (1, q)):
        x = z * noise + mean
        loss = np.log1p(q * np.expm1((x - 0.5) / z**2))
        if relation == "replace_one":
            loss -= np.log1p(q * np.expm1((-x - 0.5) / z**2))
        above = np.mod(loss, grid)
        variance += share * np.sum(weight * above * (grid - above))
    exact = case["prv_accountant"]["estimate"]

    def of_gaussian(mu, delta=delta):
        return gaussian_mechanism.get_epsilon_gaussian(1 / mu, delta)

    mu = optimize.brentq(lambda mu: of_gaussian(mu) - exact, 1e-3, 30, xtol=1e-12)
    rounded = of_gaussian(math.sqrt(mu**2 + case["steps"] * variance))
    # The curve is a chord between grid points, as in `test_one_step_is_the_closed_form`.
    slope = 0.01 / (of_gaussian(mu, delta * math.exp(-0.01)) - exact)
    return (rounded + grid**2 * slope / 8) / exact - 1


def is_within_a_permille(relation, case, **falsified):
    """Not below the proven lower bound, and at most 0.1 % above the proven upper bound."""
    bounds = case["prv_accountant"]
    return bounds["lower"] <= epsilon(relation, case, **falsified) <= 1.001 * bounds["upper"]


def test_the_oracles_agree_with_each_other():
    checked = 0
    for _, case in SAMPLED:
        bounds = case["prv_accountant"]
        assert bounds["lower"] < bounds["estimate"] < bounds["upper"]
        if "closed_form" in case:
            checked += 1
            assert bounds["lower"] <= case["closed_form"] <= bounds["upper"]
            assert bounds["estimate"] == pytest.approx(case["closed_form"], rel=ESTIMATE_ERROR)
    assert checked >= 8


@pytest.mark.parametrize(("relation", "case"), SAMPLED)
def test_epsilon_is_never_below_the_oracle_and_above_it_by_the_grid_alone(relation, case):
    found, bounds = epsilon(relation, case), case["prv_accountant"]
    cost = cost_of_grid(relation, case)
    assert cost <= LOOSENESS
    assert bounds["lower"] <= found <= (1 + cost) * bounds["upper"]
    # The same to the precision of the oracle's estimate rather than to what it proves.
    relative = found / bounds["estimate"] - 1
    assert -ESTIMATE_ERROR <= relative <= cost + ESTIMATE_ERROR


def test_a_grid_that_does_not_follow_the_event_may_cost_much():
    """Negative control of `LOOSENESS`, and of `cost_of_grid` up to where it is but a first term."""
    costs = {}
    for relation, case in SAMPLED:
        if case["sampling_prob"] < 1:
            costs[cost_of_grid(relation, case, FIXED_GRID)] = (
                epsilon(relation, case, grid=FIXED_GRID) / case["prv_accountant"]["estimate"] - 1
            )
    assert 0.12 < max(costs.values()) < 0.14
    assert sum(cost > LOOSENESS for cost in costs) >= 15
    for cost, found in costs.items():
        assert found <= cost + ESTIMATE_ERROR


def test_epsilon_is_within_a_permille():
    assert [case for case in SAMPLED if not is_within_a_permille(*case)] == []


@pytest.mark.parametrize("falsified", [{"noise": 1.01}, {"noise": 0.99}, {"prob": 0.98}])
def test_events_that_are_a_little_wrong_are_noticed(falsified):
    """Negative control: 1 % of the noise, or 2 % of q where there is a q."""
    chosen = [case for case in SAMPLED if case[1]["sampling_prob"] < 1]
    assert [case for case in chosen if is_within_a_permille(*case, **falsified)] == []


def test_jax_privacy_reads_the_parameters_as_we_do():
    """It composes by dp-accounting too: this checks q, steps, delta and relation, nothing else."""
    for case in FIGURES["zero_out"]:
        found, theirs = epsilon("zero_out", case, grid=FIXED_GRID), case["jax_privacy"]
        if case["sampling_prob"] < 1:
            assert found == pytest.approx(theirs, rel=1e-6)
        else:  # ours is exact, theirs is on the grid
            assert -1e-6 <= theirs / found - 1 <= 1e-6 + cost_of_grid("zero_out", case, FIXED_GRID)


@pytest.mark.parametrize("case", FIGURES["truncated"])
def test_jax_privacy_reads_the_capacity_as_we_do(case):
    event = truncated(
        case["num_samples"], case["sampling_prob"], case["capacity"], case["noise_multiplier"]
    )
    for relation in ("zero_out", "add_or_remove"):
        steps, delta, theirs = case["steps"], case["delta"], case["jax_privacy"]
        found = accounting.epsilon(event, steps, delta, relation, grid=FIXED_GRID)
        assert found == pytest.approx(theirs, rel=1e-6)
        # Cut batches have no oracle but this one: on the grid that suits them they are near it.
        suited = accounting.epsilon(event, steps, delta, relation)
        assert suited == pytest.approx(theirs, rel=LOOSENESS)


def test_the_gaussian_is_the_closed_form():
    full = [(relation, case) for relation, case in SAMPLED if case["sampling_prob"] == 1]
    assert {relation for relation, _ in full} == {"zero_out", "replace_one"}
    for relation, case in full:
        exact = pytest.approx(case["closed_form"], abs=1e-6)
        assert epsilon(relation, case) == exact
        assert epsilon(relation, case, noise=1.00001) != exact


@pytest.mark.parametrize("case", FIGURES["one_step"])
def test_one_step_is_the_closed_form(case):
    """Sampled under both relations, and a patient of several tiles.

    The curve delta(epsilon) is exact at grid points and a chord between them: epsilon errs
    upwards, by at most grid^2 / 8 times -d log(delta) / d epsilon, which is below 20 for these
    events. Groups are slow, so they get a coarse grid.
    """
    q, z, delta, kind = (
        case[name] for name in ("sampling_prob", "noise_multiplier", "delta", "kind")
    )
    size, grid = case["group_size"], 2e-2 if kind == "group" else FIXED_GRID
    tolerance = 20 * grid**2 / 8

    def excess(z):
        event = group(size, q, z) if kind == "group" else poisson(q, z)
        relation = "replace_one" if kind == "replace_one" else "zero_out"
        return accounting.epsilon(event, 1, delta, relation, grid=grid) - case["closed_form"]

    assert -1e-7 <= excess(z) <= tolerance
    assert excess(1.02 * z) < -1e-7
    assert excess(0.98 * z) > tolerance


def sums_of_a_truncated_batch(n, q, capacity, own, others):
    """{sum: probability} over the draws, where the unit adds `own` and each other one `others`.

    The unit is not there at all if `own` is None.
    """
    sums = {}

    def add(value, prob):
        sums[value] = sums.get(value, 0.0) + prob

    for drawn, prob in enumerate(stats.binom.pmf(np.arange(n), n - 1, q)):
        without = others * min(drawn, capacity)
        if own is None:
            add(without, prob)
            continue
        kept = min(1.0, capacity / (drawn + 1))
        add(without, prob * (1 - q))
        add(own + others * (min(drawn + 1, capacity) - 1), prob * q * kept)
        add(others * capacity, prob * q * (1 - kept))
    return sums


def delta_between(first, second, z, epsilon):
    """The hockey-stick divergence of two mixtures of Gaussians, by plain summation over a grid."""
    means = [*first, *second]
    x = np.arange(min(means) - 14 * z, max(means) + 14 * z, z / 200)

    def density(sums):
        return sum(prob * stats.norm.pdf(x, mean, z) for mean, prob in sums.items())

    p, q = density(first), density(second)
    return max(
        np.maximum(a - math.exp(epsilon) * b, 0).sum() * z / 200 for a, b in ((p, q), (q, p))
    )


@pytest.mark.parametrize(
    ("n", "q", "capacity", "z", "relation"),
    [
        (100, 0.2, 10, 2.0, "zero_out"),
        (50, 0.5, 3, 1.5, "add_or_remove"),
        (12, 0.9, 2, 0.7, "add_or_remove"),
        (100, 0.2, 10, 2.0, "replace_one"),
        (12, 0.9, 2, 0.7, "replace_one"),
    ],
)
def test_no_real_batch_that_overflows_breaks_the_truncated_bound(n, q, capacity, z, relation):
    """An actual worst case, computed from the draws: whoever is cut makes room for others.

    Negative control: the bound that forgets about the capacity is broken.
    """
    delta = 1e-5
    instead = {"zero_out": 0.0, "add_or_remove": None, "replace_one": -1.0}[relation]

    def worst(event):
        bound = accounting.epsilon(event, 1, delta, relation)
        return max(
            delta_between(
                sums_of_a_truncated_batch(n, q, capacity, 1.0, others),
                sums_of_a_truncated_batch(n, q, capacity, instead, others),
                z,
                bound,
            )
            for others in (-1.0, 0.0, 1.0)
        )

    assert worst(truncated(n, q, capacity, z)) <= delta
    assert worst(poisson(q, z)) > 3 * delta


def random_events(seed, count):
    """q, z, steps, delta, of the ranges in use."""
    rng = np.random.default_rng(seed)
    return [
        (
            float(np.exp(rng.uniform(np.log(0.02), np.log(0.9)))),
            float(np.exp(rng.uniform(np.log(0.6), np.log(4)))),
            int(np.exp(rng.uniform(0, np.log(500)))),
            float(10 ** rng.uniform(-8, -3)),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("relation", ["zero_out", "replace_one"])
@pytest.mark.parametrize(("q", "z", "steps", "delta"), random_events(seed=1, count=6))
def test_epsilon_falls_with_noise_and_rises_with_sampling_and_steps(q, z, steps, delta, relation):
    def of(q, z, steps, delta, relation=relation):
        return accounting.epsilon(poisson(q, z), steps, delta, relation)

    here = of(q, z, steps, delta)
    assert of(q, 1.02 * z, steps, delta) < here < of(q, z / 1.02, steps, delta)
    assert of(q / 1.02, z, steps, delta) < here < of(1.02 * q, z, steps, delta)
    assert here < of(q, z, steps + 1, delta)
    assert here < of(q, z, steps, delta / 2)
    assert of(q, z, steps, delta, "zero_out") <= here


@pytest.mark.parametrize(("q", "z", "steps", "delta"), random_events(seed=2, count=6))
def test_some_steps_and_then_others_are_all_of_them(q, z, steps, delta):
    """Rounding happens once per step, so only the truncated tails of 1e-15 may differ."""
    first = steps // 3
    for event in (poisson(q, z), gaussian(z)):
        parts = tuple(dp_event.SelfComposedDpEvent(event, n) for n in (first, steps + 1 - first))
        together = accounting.epsilon(dp_event.ComposedDpEvent(parts), 1, delta)
        assert together == pytest.approx(accounting.epsilon(event, steps + 1, delta), rel=1e-6)


@pytest.mark.parametrize(("q", "z", "steps", "delta"), random_events(seed=3, count=6))
def test_a_capacity_of_all_is_no_truncation_and_less_costs_more(q, z, steps, delta):
    n = 60
    values = [
        accounting.epsilon(truncated(n, q, capacity, z), steps, delta)
        for capacity in (n, n - 1, math.ceil(n * q))
    ]
    untruncated = accounting.epsilon(poisson(q, z), steps, delta)
    assert values[0] == untruncated
    assert untruncated * (1 - 1e-7) <= values[1]  # grids differ in rounding
    assert values[0] < values[2]


@pytest.mark.parametrize(("q", "z", "steps", "delta"), random_events(seed=4, count=10))
def test_renyi_dp_is_never_below(q, z, steps, delta):
    """Renyi DP is an upper bound by another road: orders of moments, no grid and no Fourier."""
    for event in (poisson(q, z), gaussian(z)):
        assert accounting.epsilon(event, steps, delta) <= accounting.rdp_epsilon(
            event, steps, delta
        )
