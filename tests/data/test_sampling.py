import numpy as np
import pytest
from scipy import stats

from fedjax_dp.data import sampling

N, Q, DRAWS = 12, 0.3, 4000


def included(draws):
    """bool [draws, N]: which units each draw holds."""
    table = np.zeros((len(draws), N), bool)
    for row, units in zip(table, draws, strict=True):
        row[units] = True
    return table


def assert_rate(hits, expected, *, z=5.0):
    """Every column's mean is `expected` within z standard errors of a Bernoulli mean."""
    error = np.sqrt(expected * (1 - expected) / len(hits))
    np.testing.assert_allclose(hits.mean(axis=0), expected, rtol=0, atol=z * error)


def assert_law(counts, probs, *, p_value=1e-6):
    """Chi-square of observed counts against their probabilities, cells of 5 expected or more."""
    expected = np.asarray(probs) * np.sum(counts)
    large = expected >= 5
    observed = np.append(np.asarray(counts)[large], np.sum(np.asarray(counts)[~large]))
    expected = np.append(expected[large], np.sum(expected[~large]))
    keep = expected > 0
    assert stats.chisquare(observed[keep], expected[keep]).pvalue > p_value


def test_poisson_law_is_independent_coins():
    rng = np.random.default_rng(0)
    table = included([sampling.poisson_sample(rng, N, Q, N) for _ in range(DRAWS)])
    assert_rate(table, Q)
    left, right = np.triu_indices(N, 1)
    assert_rate(table[:, left] & table[:, right], Q * Q)
    assert_law(np.bincount(table.sum(1), minlength=N + 1), stats.binom.pmf(np.arange(N + 1), N, Q))


def test_poisson_law_test_catches_batches_of_fixed_size():
    rng = np.random.default_rng(0)
    size = round(N * Q)
    table = included([rng.permutation(N)[:size] for _ in range(DRAWS)])
    assert_rate(table, size / N)  # the marginals of shuffling are right, its law is not
    with pytest.raises(AssertionError):
        assert_law(
            np.bincount(table.sum(1), minlength=N + 1), stats.binom.pmf(np.arange(N + 1), N, Q)
        )


def truncated_pmf(capacity):
    pmf = stats.binom.pmf(np.arange(N + 1), N, Q)
    return np.append(pmf[:capacity], pmf[capacity:].sum())


def test_truncated_law_is_a_uniform_cut():
    capacity = 4
    rng = np.random.default_rng(1)
    table = included([sampling.poisson_sample(rng, N, Q, capacity) for _ in range(DRAWS)])
    assert table.sum(1).max() == capacity
    pmf = truncated_pmf(capacity)
    assert_law(np.bincount(table.sum(1), minlength=capacity + 1), pmf)
    assert_rate(table, pmf @ np.arange(capacity + 1) / N)


def test_truncated_law_test_catches_a_cut_that_favours_early_units():
    capacity = 4
    rng = np.random.default_rng(1)
    table = included([sampling.poisson_sample(rng, N, Q, N)[:capacity] for _ in range(DRAWS)])
    with pytest.raises(AssertionError):
        assert_rate(table, truncated_pmf(capacity) @ np.arange(capacity + 1) / N)


def test_coins_of_a_unit_do_not_depend_on_how_many_follow():
    few = sampling.poisson_sample(np.random.default_rng(3), 50, 0.4, 50)
    many = sampling.poisson_sample(np.random.default_rng(3), 80, 0.4, 80)
    np.testing.assert_array_equal(few, many[many < 50])


def test_probability_one_draws_all_and_zero_none():
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(sampling.poisson_sample(rng, 5, 1.0, 5), np.arange(5))
    assert len(sampling.poisson_sample(rng, 5, 0.0, 5)) == 0
    assert len(sampling.poisson_sample(rng, 0, 0.5, 0)) == 0


@pytest.mark.parametrize(("n", "q", "tail"), [(1000, 0.064, 1e-7), (40, 0.3, 1e-7), (9, 0.5, 0.1)])
def test_default_capacity_is_the_smallest_within_the_tail(n, q, tail):
    capacity = sampling.default_capacity(n, q, tail)
    assert stats.binom.sf(capacity, n, q) <= tail < stats.binom.sf(capacity - 1, n, q)


def test_default_capacity_of_the_limits():
    assert sampling.default_capacity(7, 1.0) == 7
    assert sampling.default_capacity(0, 0.5) == 0
    assert sampling.default_capacity(5, 1e-9) == 1


def plan_of(rng, unit_tiles, **overrides):
    settings = {
        "sampling_prob": 0.5,
        "capacity": len(unit_tiles),
        "local_steps": 3,
        "tiles_per_unit": 2,
    }
    return sampling.draw_plan(rng, unit_tiles, **settings | overrides)


UNITS = [np.array([100 * u + i for i in range(1 + u % 5)]) for u in range(20)]


def test_plan_holds_real_units_and_tiles_first_and_zeros_behind():
    plan = plan_of(np.random.default_rng(0), UNITS, num_slots=25)
    assert plan.tile_index.shape == (3, 25, 2)
    assert plan.num_tiles.shape == (3, 25)
    assert {array.dtype for array in plan} == {np.dtype(np.int32)}
    for step in range(3):
        drawn = int(plan.num_units[step])
        assert np.all(plan.num_tiles[step, :drawn] > 0)
        assert not plan.num_tiles[step, drawn:].any()
        assert not plan.tile_index[step, drawn:].any()
        owners = []
        for slot in range(drawn):
            tiles = plan.tile_index[step, slot, : plan.num_tiles[step, slot]]
            (owner,) = set(tiles // 100)
            owners.append(owner)
            assert set(tiles) <= set(UNITS[owner])
            assert len(set(tiles)) == len(tiles) == min(2, len(UNITS[owner]))
            assert not plan.tile_index[step, slot, len(tiles) :].any()
        assert len(set(owners)) == drawn


def test_every_step_draws_anew():
    plan = plan_of(np.random.default_rng(0), UNITS, sampling_prob=1.0, local_steps=20)
    assert len({step.tobytes() for step in plan.tile_index}) == 20
    coins = plan_of(np.random.default_rng(0), UNITS, local_steps=20)
    assert len(set(coins.num_units.tolist())) > 3


def test_plan_follows_from_the_generator_alone():
    first, again = (plan_of(np.random.default_rng(5), UNITS) for _ in range(2))
    other = plan_of(np.random.default_rng(6), UNITS)
    np.testing.assert_array_equal(first.tile_index, again.tile_index)
    assert not np.array_equal(first.tile_index, other.tile_index)


def test_tiles_of_one_unit_move_nobody_else():
    changed = [np.array([7]), *UNITS[1:]]
    big = [np.arange(5000, 5050), *UNITS[1:]]
    plans = [
        plan_of(np.random.default_rng(2), units, sampling_prob=1.0)
        for units in (UNITS, changed, big)
    ]
    for plan in plans[1:]:
        np.testing.assert_array_equal(plan.tile_index[:, 1:], plans[0].tile_index[:, 1:])
        assert not np.array_equal(plan.tile_index[:, 0], plans[0].tile_index[:, 0])


def test_tiles_of_a_unit_are_drawn_uniformly():
    plan = plan_of(np.random.default_rng(4), [np.arange(5)], sampling_prob=1.0, local_steps=3000)
    table = np.zeros((3000, 5), bool)
    table[np.arange(3000)[:, None], plan.tile_index[:, 0]] = True
    assert_rate(table, 2 / 5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_slots": 3, "capacity": 4}, "num_slots"),
        ({"local_steps": 0}, "local_steps"),
        ({"tiles_per_unit": 0}, "tiles_per_unit"),
        ({"sampling_prob": 1.5}, "sampling_prob"),
        ({"sampling_prob": float("nan")}, "sampling_prob"),
        ({"capacity": 0}, "capacity"),
    ],
)
def test_bad_arguments_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        plan_of(np.random.default_rng(0), UNITS, **overrides)


def test_a_unit_without_tiles_is_named():
    with pytest.raises(ValueError, match="unit 1"):
        plan_of(np.random.default_rng(0), [np.array([1]), np.array([], int)])


def test_cohorts():
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(sampling.draw_cohort(rng, 4, mode="all"), np.arange(4))
    fixed = np.stack([sampling.draw_cohort(rng, N, mode="fixed", size=5) for _ in range(DRAWS)])
    assert np.all(np.diff(fixed) > 0)
    assert_rate(included(fixed), 5 / N)
    poisson = included([sampling.draw_cohort(rng, N, mode="poisson", prob=Q) for _ in range(DRAWS)])
    assert_rate(poisson, Q)
    assert_law(
        np.bincount(poisson.sum(1), minlength=N + 1), stats.binom.pmf(np.arange(N + 1), N, Q)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "fixed"},
        {"mode": "fixed", "size": 9},
        {"mode": "all", "size": 2},
        {"mode": "poisson", "prob": 0.0},
        {"mode": "some"},
    ],
)
def test_bad_cohorts_are_refused(settings):
    with pytest.raises(ValueError, match="Expected"):
        sampling.draw_cohort(np.random.default_rng(0), 4, **settings)
