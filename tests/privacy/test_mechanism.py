import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from dp_accounting import dp_event
from scipy import stats

from fedjax_dp.privacy import accounting
from fedjax_dp.privacy.budgets import make_mechanisms
from fedjax_dp.privacy.ledger import ChargeLog
from fedjax_dp.privacy.mechanism import Mechanism, mechanism_from_descriptor

DELTA = 1e-5


def mechanism(**overrides):
    settings = {
        "placement": "dp_sgd",
        "unit": "tile",
        "num_units": 40,
        "sampling_prob": 0.2,
        "capacity": 10,
        "local_steps": 3,
        "l2_clip_norm": 0.5,
        "noise_multiplier": 2.0,
    }
    return Mechanism(**settings | overrides)


def row(mechanism, name):
    return next(g for g in mechanism.guarantees() if g.name == name)


# --- the sampler that runs is the sampler that is accounted


def assert_sampler_is_accounted(sampler, event, *, draws=400, z=5.0):
    """The plans of `sampler` follow the steps, probability and capacity of `event`."""
    step, steps = event.event, event.count
    n, q, capacity = step.dataset_size, step.sampling_probability, step.truncated_batch_size
    rng = np.random.default_rng(0)
    plans = [sampler.sample(rng, [np.array([u]) for u in range(n)]) for _ in range(draws)]
    counts = np.stack([plan.num_units for plan in plans])
    assert counts.shape == (draws, steps)
    pmf = stats.binom.pmf(np.arange(n + 1), n, q)
    pmf = np.append(pmf[:capacity], pmf[capacity:].sum())
    mean = pmf @ np.arange(capacity + 1)
    variance = pmf @ (np.arange(capacity + 1) - mean) ** 2
    assert abs(counts.mean() - mean) < z * math.sqrt(variance / counts.size)
    assert counts.max() == capacity
    full = np.mean(counts == capacity)
    assert abs(full - pmf[-1]) < z * math.sqrt(pmf[-1] * (1 - pmf[-1]) / counts.size)


def test_sampler_and_event_agree():
    m = mechanism()
    assert_sampler_is_accounted(m, m.headline.event)


@pytest.mark.parametrize(
    "change", [{"sampling_prob": 0.25}, {"capacity": 9}, {"capacity": 11}, {"local_steps": 2}]
)
def test_a_sampler_of_another_mechanism_is_noticed(change):
    with pytest.raises(AssertionError):
        assert_sampler_is_accounted(mechanism(**change), mechanism().headline.event)


def test_a_plan_of_unaccounted_units_is_refused():
    with pytest.raises(ValueError, match="40 units"):
        mechanism().sample(np.random.default_rng(0), [np.array([0])] * 41)


def test_an_empty_draw_is_charged(tmp_path):
    m = mechanism(sampling_prob=1e-6, capacity=1)
    plan = m.sample(np.random.default_rng(0), [np.array([u]) for u in range(40)])
    assert not plan.num_units.any()
    with ChargeLog(tmp_path / "charges") as log:
        log.charge(0, ["A"], "e")
        assert log.counts() == {"A": 1}
    busy = mechanism(sampling_prob=0.2)
    assert busy.epsilon(1, DELTA) == busy.headline.epsilon(1, DELTA) > 0


# --- exact divergences of the real draw, as an oracle for every event


def law(n, q, capacity):
    """{drawn set: probability} of a Poisson draw cut uniformly at `capacity`."""
    probs = {}
    for coins in itertools.product((0, 1), repeat=n):
        drawn = [u for u in range(n) if coins[u]]
        weight = q ** len(drawn) * (1 - q) ** (n - len(drawn))
        cuts = list(itertools.combinations(drawn, min(capacity, len(drawn))))
        for cut in cuts:
            probs[frozenset(cut)] = probs.get(frozenset(cut), 0) + weight / len(cuts)
    return probs


GRID = np.linspace(-14, 14, 8001)
EPSILONS = (0.0, 0.1, 0.3, 1.0, 2.0)


def deltas_of(first, second, weights, stddev):
    """max over both directions of the hockey-stick divergence, per epsilon of EPSILONS.

    Args:
        first: [draws] mean of the release for each drawn set.
        second: [draws], the same for the neighbour.
        weights: [draws] probability of each set.
        stddev: of the noise.
    """
    p, q = (
        weights @ stats.norm.pdf(GRID, loc=np.asarray(means)[:, None], scale=stddev)
        for means in (first, second)
    )
    width = GRID[1] - GRID[0]
    return [
        max(np.maximum(a - math.exp(e) * b, 0).sum() * width for a, b in ((p, q), (q, p)))
        for e in EPSILONS
    ]


def worst(pairs, weights, stddev):
    return np.max([deltas_of(*pair, weights, stddev) for pair in pairs], axis=0)


def bound(event, relation="zero_out"):
    return np.array([accounting.delta_for(event, 1, e, relation) for e in EPSILONS])


N, Q = 4, 0.4


def sums(protected, draw):
    """Releases for one-dimensional gradients -1, 0 or 1 of the others, with and without."""
    for signs in itertools.product((-1.0, 0.0, 1.0), repeat=N - len(protected)):
        values = [1.0] * len(protected) + list(signs)
        yield (
            [sum(values[u] for u in s) for s in draw],
            [sum(values[u] for u in s - protected) for s in draw],
        )


def tiny(**overrides):
    settings = {
        "num_units": N,
        "sampling_prob": Q,
        "capacity": N,
        "local_steps": 1,
        "l2_clip_norm": 1.0,
        "noise_multiplier": 1.2,
    }
    return mechanism(**settings | overrides)


@pytest.mark.parametrize("capacity", [1, 2, 3, 4])
def test_dp_sgd_bounds_the_real_draw(capacity):
    m = tiny(capacity=capacity)
    draw = law(N, Q, capacity)
    real = worst(sums({0}, draw), np.array(list(draw.values())), m.noise_stddev)
    claimed = bound(m.headline.event)
    assert np.all(real <= claimed + 1e-6)
    if capacity == N:  # without truncation the bound is attained
        np.testing.assert_allclose(real, claimed, rtol=0.01, atol=1e-5)
    half_the_cost = tiny(capacity=capacity, noise_multiplier=2.4).headline.event
    assert np.any(real > bound(half_the_cost) + 1e-3)  # the oracle has power


def test_patient_conversion_bounds_the_real_draw():
    m = tiny(max_units_per_patient=2)
    draw = law(N, Q, N)
    real = worst(sums({0, 1}, draw), np.array(list(draw.values())), m.noise_stddev)
    claimed = bound(m.patient_guarantee.event)
    np.testing.assert_allclose(real, claimed, rtol=0.01, atol=1e-5)
    assert np.any(real > bound(m.headline.event) + 1e-3)  # a tile's epsilon is not a patient's


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_update_records_bound_the_real_draw(capacity):
    """Any clipped update of the drawn set, here every sign pattern over the sets of 3 units."""
    n = 3
    m = tiny(placement="update", num_units=n, capacity=capacity, l2_clip_norm=1.0)
    draw = law(n, Q, capacity)
    every = [frozenset(s) for r in range(n + 1) for s in itertools.combinations(range(n), r)]
    updates = (
        dict(zip(every, signs, strict=True))
        for signs in itertools.product((-1.0, 1.0), repeat=len(every))
    )
    pairs = [([f[s] for s in draw], [f[s - {0}] for s in draw]) for f in updates]
    real = worst(pairs, np.array(list(draw.values())), m.noise_stddev)
    assert np.all(real <= bound(row(m, "record_tile").event) + 1e-6)
    if capacity == n:
        np.testing.assert_allclose(real, bound(row(m, "record_tile").event), rtol=0.01, atol=1e-5)
        at_one_clip = dp_event.PoissonSampledDpEvent(Q, dp_event.GaussianDpEvent(1.2))
        assert np.any(real > bound(at_one_clip) + 1e-3)  # 2S is needed


# --- the rows of the design's table


def test_dp_sgd_rows():
    m = mechanism()
    assert m.headline.event == dp_event.SelfComposedDpEvent(
        dp_event.TruncatedSubsampledGaussianDpEvent(40, 0.2, 10, 2.0), 3
    )
    assert (m.sensitivity, m.noise_stddev, m.expected_batch_size) == (0.5, 1.0, 8.0)
    assert (m.headline.unit, m.headline.relation) == ("tile", "zero_out")
    assert m.epsilon(4, DELTA) == accounting.epsilon(m.headline.event.event, 12, DELTA)
    assert m.epsilon(0, DELTA) == 0


def test_update_rows():
    m = mechanism(placement="update", capacity=40)
    half = dp_event.GaussianDpEvent(1.0)
    assert m.headline.event == dp_event.GaussianDpEvent(2.0)
    assert (m.headline.unit, m.headline.sensitivity) == ("client", 0.5)
    assert (row(m, "client_replace").event, row(m, "client_replace").sensitivity) == (half, 1.0)
    p = 1 - 0.8**3
    record = row(m, "record_tile").event
    assert record.event == half
    assert record.sampling_probability == pytest.approx(p)
    # Without a cap on a patient's tiles sampling is not claimed: any change is within 2S.
    assert m.patient_guarantee.event == half
    patient = dataclasses.replace(m, max_units_per_patient=4).patient_guarantee.event
    assert patient.sampling_probability == pytest.approx(1 - 0.8**12)
    assert patient.event == half


def test_update_records_pay_for_overflow():
    free, cut = (mechanism(placement="update", capacity=c) for c in (40, 10))
    event = row(cut, "record_tile").event
    overflow = 1 - stats.binom.cdf(9, 39, 0.2)
    assert event.events[1] == dp_event.GaussianDpEvent(1.0)
    assert event.probs[1] == pytest.approx(1 - (1 - overflow) ** 3)
    values = [row(m, "record_tile").epsilon(10, DELTA) for m in (free, cut)]
    assert values[0] < values[1] <= row(cut, "client_replace").epsilon(10, DELTA) * 1.001


def test_a_client_with_state_has_no_amplified_record():
    m = mechanism(placement="update", is_stateless=False, max_units_per_patient=2)
    for name in ("record_tile", "record_patient"):
        assert row(m, name).event == dp_event.GaussianDpEvent(1.0)


def test_full_batches_amplify_nothing():
    m = mechanism(placement="update", sampling_prob=1.0, capacity=40)
    assert row(m, "record_tile").event == dp_event.GaussianDpEvent(1.0)
    m = mechanism(sampling_prob=1.0, capacity=40, max_units_per_patient=3)
    assert m.patient_guarantee.event.event == dp_event.GaussianDpEvent(2.0 / 3)


def test_patient_conversion_needs_a_cap_and_room():
    unknown = mechanism(capacity=40).patient_guarantee
    assert unknown.epsilon(1, DELTA) == math.inf
    assert "max_units_per_patient" in unknown.reason
    narrow = mechanism(max_units_per_patient=3).patient_guarantee
    assert not narrow.is_valid
    needed = int(narrow.reason.split()[-1])
    assert mechanism(max_units_per_patient=3, capacity=needed).patient_guarantee.is_valid
    assert not mechanism(max_units_per_patient=3, capacity=needed - 1).patient_guarantee.is_valid


def test_unit_patient_protects_patients_and_accounts_their_tiles_as_replaced():
    m = mechanism(unit="patient", tiles_per_unit=4)
    assert m.patient_guarantee == m.headline
    tile = row(m, "tile_of_patient")
    assert (tile.accountant_relation, tile.sensitivity) == ("replace_one", 1.0)
    assert tile.epsilon(2, DELTA) > m.epsilon(2, DELTA)
    slide = mechanism(unit="slide", tiles_per_unit=4)
    assert row(slide, "tile_of_slide").event == slide.headline.event
    assert not slide.patient_guarantee.is_valid


def test_no_privacy_is_infinite_everywhere():
    m = mechanism(placement="none", noise_multiplier=0.0, l2_clip_norm=math.inf)
    assert (m.noise_stddev, m.sensitivity, m.max_rounds(8.0, DELTA)) == (0.0, math.inf, 0)
    for guarantee in m.guarantees():
        assert guarantee.epsilon(1, DELTA) == math.inf
        assert guarantee.reason
    assert m.patient_guarantee.unit == "patient"


def test_max_rounds_is_the_headline_s():
    m = mechanism(capacity=40)
    assert m.max_rounds(m.epsilon(5, DELTA), DELTA) == 5


# --- construction


@pytest.mark.parametrize(
    "m",
    [
        mechanism(),
        mechanism(placement="update", max_units_per_patient=7),
        mechanism(placement="none", noise_multiplier=0.0, l2_clip_norm=math.inf),
    ],
)
def test_descriptor_rebuilds_the_mechanism(m):
    again = mechanism_from_descriptor(json.loads(json.dumps(m.descriptor(), allow_nan=False)))
    assert again == m
    assert again.guarantees() == m.guarantees()
    assert again.fingerprint() == m.fingerprint()


def test_every_field_changes_the_fingerprint():
    changes = {
        "placement": "update",
        "unit": "slide",
        "num_units": 41,
        "sampling_prob": 0.21,
        "capacity": 11,
        "local_steps": 4,
        "l2_clip_norm": 0.6,
        "noise_multiplier": 2.1,
        "max_units_per_patient": 5,
        "is_stateless": False,
    }
    # Fields that not every placement may set, each with what it needs.
    shares = {"placement": "distributed", "local_steps": 1, "num_shares": 5}
    central = {"placement": "central"}
    others = {
        "relation": {"relation": "add_or_remove"},
        "num_shares": shares,
        "max_dropouts": shares | {"max_dropouts": 2},
        "noise": shares | {"noise": "discrete_gaussian", "dimension": 7},
        "dimension": shares | {"noise": "discrete_gaussian", "dimension": 8},
        "levels": shares | {"noise": "discrete_gaussian", "dimension": 7, "levels": 2**19},
        "cohort_prob": central | {"cohort_prob": 0.5},
        "relative_weight": central | {"relative_weight": 0.5},
        "averaged_over": {"placement": "update", "averaged_over": 3},
        "count_noise_stddev": {"count_noise_stddev": 2.5},
        "protects": {"protects": "unit"},
    }
    prints = {mechanism(**{name: value}).fingerprint() for name, value in changes.items()}
    prints |= {mechanism(**settings).fingerprint() for settings in others.values()}
    prints.add(mechanism().fingerprint())
    prints.add(mechanism(unit="slide", tiles_per_unit=2).fingerprint())
    assert len(prints) == len(changes) + len(others) + 2
    assert set(changes) | set(others) | {"tiles_per_unit"} == set(mechanism().descriptor())


SHARES = {"placement": "distributed", "local_steps": 1, "num_shares": 6}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"noise_multiplier": math.inf}, "noise_multiplier"),
        ({"l2_clip_norm": 0.0}, "l2_clip_norm"),
        ({"l2_clip_norm": math.inf}, "l2_clip_norm"),
        ({"l2_clip_norm": math.nan}, "l2_clip_norm"),
        ({"placement": "none"}, "noise_multiplier 0"),
        ({"placement": "server"}, "placement"),
        ({"unit": "pixel"}, "unit"),
        ({"relation": "add_or_remove", "placement": "update"}, "relation zero_out"),
        ({"relation": "swap"}, "relation"),
        ({"placement": "distributed", "num_shares": 3}, "local_steps 1"),
        ({"placement": "distributed", "local_steps": 1}, "at least 2 sites"),
        (SHARES | {"max_dropouts": 3}, "more than twice max_dropouts"),
        (SHARES | {"noise": "discrete_gaussian"}, "dimension"),
        ({"num_shares": 2}, "belong to placement"),
        ({"noise": "discrete_gaussian"}, "belong to placement"),
        ({"cohort_prob": 0.5}, "amplifies nothing"),
        ({"placement": "central", "cohort_prob": 0.0}, r"in \(0, 1\]"),
        ({"placement": "central", "relative_weight": 2.0}, r"in \(0, 1\]"),
        ({"count_noise_stddev": 0.9}, "draw more units"),
        ({"placement": "update", "count_noise_stddev": 9.0}, "Fix the clip norm"),
        ({"sampling_prob": 0.0}, "sampling_prob"),
        ({"sampling_prob": 1.01}, "sampling_prob"),
        ({"sampling_prob": math.nan}, "sampling_prob"),
        ({"capacity": 41}, "capacity"),
        ({"capacity": 0}, "capacity"),
        ({"num_units": 0}, "num_units"),
        ({"local_steps": 0}, "local_steps"),
        ({"tiles_per_unit": 2}, "tiles_per_unit"),
        ({"max_units_per_patient": 0}, "max_units_per_patient"),
    ],
)
def test_bad_fields_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        mechanism(**overrides)


def make(num_units=None, **overrides):
    settings = {
        "placement": "dp_sgd",
        "unit": "tile",
        "expected_batch_size": 16,
        "local_steps": 2,
        "rounds": 10,
        "l2_clip_norm": 1.0,
        "target_epsilon": 8.0,
        "target_delta": 1e-5,
    }
    return make_mechanisms(num_units or {"A": np.int64(100), "B": 300}, **settings | overrides)


def test_every_client_is_calibrated_to_its_own_sampling():
    made = make()
    for client, n in {"A": 100, "B": 300}.items():
        m = made.mechanisms[client]
        assert m.expected_batch_size == pytest.approx(16)
        assert m.num_units == n
        assert m.fingerprint()
        assert 7.99 < m.epsilon(10, DELTA) <= 8.0
        assert m.max_rounds(8.0, DELTA) == 10
    assert made.mechanisms["A"].noise_multiplier > made.mechanisms["B"].noise_multiplier
    assert made.num_slots == max(m.capacity for m in made.mechanisms.values())
    assert made.warnings == ()


def test_update_needs_one_noise_for_all():
    made = make(placement="update")
    first, second = made.mechanisms.values()
    assert first.noise_multiplier == second.noise_multiplier
    assert 7.99 < first.epsilon(10, DELTA) <= 8.0


def test_a_small_site_uses_all_its_units_and_is_named():
    made = make({"A": 100, "tiny": 9}, placement="update")
    assert made.mechanisms["tiny"].sampling_prob == 1.0
    assert made.mechanisms["tiny"].capacity == 9
    assert made.num_slots >= 9
    assert any("tiny" in warning for warning in made.warnings)
    loose = make({"A": 100}, placement="update", target_delta=0.01)
    assert any("1/n" in warning for warning in loose.warnings)


def test_a_known_patient_cap_makes_room_for_the_conversion():
    made = make({"A": 400}, max_units_per_patient=3, target_epsilon=None, noise_multiplier=2.0)
    assert made.mechanisms["A"].patient_guarantee.is_valid
    plain = make({"A": 400}, target_epsilon=None, noise_multiplier=2.0)
    assert plain.num_slots < made.num_slots < 400


def test_no_privacy_needs_no_noise():
    made = make(placement="none", target_epsilon=None)
    assert {m.noise_stddev for m in made.mechanisms.values()} == {0.0}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"noise_multiplier": 1.0}, "exactly one"),
        ({"target_epsilon": None}, "exactly one"),
        ({"target_epsilon": None, "noise_multiplier": 0.0}, "noise_multiplier"),
        ({"target_epsilon": None, "noise_multiplier": -1.0}, "noise_multiplier"),
        ({"target_epsilon": 0.0}, "target_epsilon"),
        ({"target_delta": 1.0}, "target_delta"),
        ({"expected_batch_size": 0}, "expected_batch_size"),
        ({"expected_batch_size": math.nan}, "expected_batch_size"),
        ({"rounds": 0}, "rounds"),
        ({"num_units": {"A": 0}}, "client='A'"),
        ({"l2_clip_norm": 0.0}, "l2_clip_norm"),
    ],
)
def test_bad_settings_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        make(**overrides)


def test_what_is_remembered_of_a_mechanism_is_not_taken_over_by_a_changed_one():
    asked, other = mechanism(), mechanism()
    rows = asked.guarantees()
    assert asked.guarantees() is rows
    assert (asked, hash(asked), asked.descriptor()) == (other, hash(other), other.descriptor())
    assert asked.fingerprint() == other.fingerprint()
    changed = dataclasses.replace(asked, noise_multiplier=4.0)
    assert changed.headline.event.event.noise_multiplier == 4.0
    assert changed.epsilon(3, DELTA) < asked.epsilon(3, DELTA) == other.epsilon(3, DELTA)
