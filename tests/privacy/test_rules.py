"""Privacy rules of the host, each for itself; `tests/mutants.py` breaks them, and these see it."""

import itertools
import math

import numpy as np
import pytest

from fedjax_dp.data import sampling
from fedjax_dp.privacy.budgets import make_mechanisms
from fedjax_dp.privacy.mechanism import Mechanism

UNITS, PROB, STEPS, PLANS = 12, 0.3, 4, 1500


def drawn_units(plan):
    """bool [S, n]: which units each step holds; the tile of unit u is u."""
    table = np.zeros((STEPS, UNITS), bool)
    for step, count in enumerate(plan.num_units):
        table[step, plan.tile_index[step, :count, 0]] = True
    return table


def assert_steps_are_independent(tables):
    """The coins of one unit in two steps, and of two units in two steps, fall together as often
    as independent ones: q squared, within five standard errors.
    """
    expected = PROB**2
    tolerance = 5 * math.sqrt(expected * (1 - expected) / len(tables))
    for first, second in itertools.combinations(range(STEPS), 2):
        together = np.einsum("pu,pv->uv", tables[:, first], tables[:, second]) / len(tables)
        np.testing.assert_allclose(together, expected, rtol=0, atol=tolerance)


def test_steps_of_a_round_are_drawn_independently():
    """Of shuffled batches every single step looks like a Poisson draw; the steps together do not:
    a unit that was in the first batch is in no other.
    """
    settings = {"sampling_prob": PROB, "capacity": UNITS, "local_steps": STEPS, "tiles_per_unit": 1}
    owned, rng = [np.array([unit]) for unit in range(UNITS)], np.random.default_rng(0)
    plans = [sampling.draw_plan(rng, owned, **settings) for _ in range(PLANS)]
    tables = np.stack([drawn_units(plan) for plan in plans]).astype(float)
    assert_steps_are_independent(tables)
    shuffled = np.zeros_like(tables)
    for table in shuffled:
        order, sizes = rng.permutation(UNITS), rng.binomial(UNITS, PROB, STEPS)
        for step, end in enumerate(np.cumsum(sizes)):
            table[step, np.tile(order, 4)[end - sizes[step] : end]] = 1.0
    with pytest.raises(AssertionError):
        assert_steps_are_independent(shuffled)


@pytest.mark.parametrize("max_dropouts", [0, 1, 2])
def test_what_is_left_after_the_dropouts_holds_the_noise(max_dropouts):
    """With all who may drop out gone, the shares that are left make up z C; never less."""
    clients, clip, z = 6, 0.5, 1.5
    made = Mechanism(
        placement="distributed", unit="tile", num_units=20, sampling_prob=0.5, capacity=20,
        local_steps=1, l2_clip_norm=clip, noise_multiplier=z, num_shares=clients,
        max_dropouts=max_dropouts,
    )  # fmt: skip
    for sharing in range(made.min_sharing, clients + 1):
        left = (sharing - max_dropouts) * made.share_stddev(sharing) ** 2
        assert left == pytest.approx((z * clip) ** 2)


def test_under_add_or_remove_the_number_of_units_enters_nothing():
    """There it is private: two sites of unlike size have one mechanism, one divisor, one clip."""
    settings = {
        "placement": "dp_sgd", "unit": "tile", "relation": "add_or_remove", "sampling_prob": 0.1,
        "nominal_num_units": 100, "local_steps": 2, "rounds": 3, "l2_clip_norm": 1.0,
        "noise_multiplier": 1.0,
    }  # fmt: skip
    made = make_mechanisms({"many": 731, "few": 9}, **settings).mechanisms
    assert made["many"] == made["few"]
    assert made["few"].expected_batch_size == pytest.approx(10.0)
    assert made["many"].fingerprint() == made["few"].fingerprint()
