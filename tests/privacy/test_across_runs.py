"""Epsilon if all runs are released: known totals, every row's meaning, and what is not valid."""

import dataclasses
import json
import math

import pytest
from dp_accounting import dp_event

from fedjax_dp.data.sources import Holding, SiteSource
from fedjax_dp.privacy import accounting, across_runs
from fedjax_dp.privacy.across_runs import epsilon_if_all_released
from fedjax_dp.privacy.composition import Charge, composed_epsilon
from fedjax_dp.privacy.mechanism import Guarantee, Mechanism
from fedjax_dp.privacy.register import Plan, Register, Run


def held(*sources):
    """What a client holds that is one whole site, or a pool of sites."""
    return Holding(sources, is_whole=True, is_patient=False)


DELTA = 1e-5
OAK = SiteSource("oak", "f1", "p1")
ELM = SiteSource("elm", "f2", "p2")


def mechanism(placement="dp_sgd", unit="patient", **changes):
    settings = {
        "num_units": 200, "sampling_prob": 0.08, "capacity": 200, "local_steps": 1,
        "l2_clip_norm": 1.0, "noise_multiplier": 0.0 if placement == "none" else 1.0516,
    }  # fmt: skip
    return Mechanism(placement=placement, unit=unit, **settings | changes)


EPSILON_8 = mechanism()
"""250 rounds of it are epsilon 8.0 at delta 1e-5."""


def run(number=0, made=EPSILON_8, rounds=250, **changes):
    plans = {"oak": Plan(held(OAK), made.descriptor(), rounds)}
    settings = {"name": f"run{number}", "seed": -1, "experiment": "feddp", "tile": "32 px"}
    return Run(run_id=f"{number:032x}", **settings | {"plans": plans} | changes)


def total(runs, unit="patient", fingerprint="f1"):
    return epsilon_if_all_released(runs, fingerprint, DELTA)[unit]


def assert_three_seeds_are_14_7(compose):
    one, three = (compose([run(i) for i in range(n)]) for n in (1, 3))
    assert one == pytest.approx(8.0, abs=0.01)
    assert three == pytest.approx(14.7, abs=0.01)
    event = dp_event.PoissonSampledDpEvent(0.08, dp_event.GaussianDpEvent(1.0516))
    assert three == pytest.approx(accounting.epsilon(event, 750, DELTA), rel=1e-6)


def test_three_seeds_at_epsilon_8_are_14_7():
    assert_three_seeds_are_14_7(lambda runs: total(runs).epsilon)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda runs: total(runs[-1:]).epsilon,  # the last run alone
        lambda runs: sum(total([r]).epsilon for r in runs),
        lambda runs: max(total([r]).epsilon for r in runs),
    ],
)
def test_the_test_of_three_seeds_has_power(wrong):
    with pytest.raises(AssertionError):
        assert_three_seeds_are_14_7(wrong)


def test_a_run_that_crashed_counts_with_all_its_planned_rounds(tmp_path):
    register = Register(tmp_path / "register.jsonl")
    for i in range(3):
        register.open_run(run(i))
    register.close_run(run(1).run_id, {"oak": 100})
    event = EPSILON_8.headline.event
    found = total(register.runs("f1"))
    assert found.epsilon == pytest.approx(accounting.epsilon(event, 600, DELTA), rel=1e-6)
    assert found.runs == ("run0", "run1", "run2")


def test_data_of_another_fingerprint_and_runs_without_rounds_cost_nothing():
    runs = [run(0), run(1, plans={"oak": Plan(held(ELM), EPSILON_8.descriptor(), 250)})]
    none = run(2, mechanism("none"), rounds=0)
    assert total([*runs, none]) == total(runs[:1])
    assert total(runs, fingerprint="f3").epsilon == 0.0
    assert total(runs, fingerprint="f3").runs == ()


def test_integer_seeds_count_as_if_secret_and_are_named():
    found = total([run(0), run(1, seed=3), run(2, seed=0)])
    assert found.epsilon == total([run(i) for i in range(3)]).epsilon
    assert found.not_private_seeds == ("run1", "run2")
    assert total([run(0)]).not_private_seeds == ()


def test_one_run_without_privacy_makes_all_infinite_and_the_others_are_told():
    runs = [run(0), run(1), run(2, mechanism("none"))]
    found = total(runs)
    assert found.epsilon == found.headline_epsilon == math.inf
    assert found.reason == "run2: placement none adds no noise"
    assert found.unprotected == ("run2",)
    assert found.epsilon_of_others == total(runs[:2]).epsilon < math.inf
    assert total(runs, "client").epsilon == math.inf
    assert "run2: placement none protects no client" in total(runs, "client").reason


def test_a_unit_that_a_run_does_not_protect_has_no_total():
    tiles = mechanism(unit="tile")  # without a cap there is no conversion to patients
    found = total([run(0), run(1, tiles)])
    assert found.epsilon == math.inf
    assert found.reason.startswith("run1: no public, enforced cap of tiles")
    assert "max_units_per_patient" in found.reason
    slide = total([run(0)], "slide")
    assert slide.reason == "run0: placement dp_sgd protects no slide"
    assert slide.adversaries == ()


def test_patients_from_a_cap_add_up_with_patients_as_units():
    tiles = mechanism(unit="tile", max_units_per_patient=2, noise_multiplier=20.0)
    runs = [run(0), run(1, tiles, rounds=20)]
    charges = [Charge(EPSILON_8.headline.event, 250, "zero_out")]
    charges.append(Charge(tiles.patient_guarantee.event, 20, "zero_out"))
    assert total(runs).epsilon == pytest.approx(composed_epsilon(charges, DELTA), rel=1e-6)
    assert total(runs).epsilon > total(runs[:1]).epsilon


def test_a_tile_under_two_relations():
    """Zeroed as a unit in one run; within a patient, whose gradient is replaced, in the other."""
    runs = [run(0, mechanism(unit="tile")), run(1, mechanism(noise_multiplier=4.0))]
    alone = [total([r], "tile").epsilon for r in runs]
    assert max(alone) < total(runs, "tile").epsilon < 1.2 * sum(alone)
    assert total(runs, "tile").reason == ""


def test_tiles_of_two_sizes_are_unlike_units_and_patients_are_not():
    tiles = mechanism(unit="tile", max_units_per_patient=1)
    runs = [run(0, tiles), run(1, tiles, tile="64 px")]
    found = total(runs, "tile")
    assert found.epsilon == math.inf
    assert found.reason == "run0, run1: tiles of 32 px and 64 px are unlike units"
    assert total(runs).epsilon == pytest.approx(total([run(0), run(1)]).epsilon, rel=1e-3)
    # What covers any change of the client's data covers tiles of any size.
    update = mechanism("update", unit="tile", noise_multiplier=20.0)
    found = total([run(0, update, rounds=5), run(1, update, rounds=5, tile="64 px")], "tile")
    half = dp_event.GaussianDpEvent(10.0)
    assert found.epsilon == pytest.approx(accounting.epsilon(half, 10, DELTA), rel=1e-6)


def test_other_patients_for_the_same_images_do_not_add_up():
    other = {"oak": Plan(held(OAK._replace(patients="p9")), EPSILON_8.descriptor(), 250)}
    found = total([run(0), run(1, plans=other)])
    assert found.epsilon == math.inf
    assert found.reason == "run0, run1: the runs know different images to be one patient's"
    assert total([run(0), run(1, plans=other)], "tile").epsilon < math.inf


def test_update_protects_client_and_record_each_by_its_best_row():
    update = mechanism("update", noise_multiplier=20.0, sampling_prob=0.01)
    runs = [run(i, update, rounds=10) for i in range(2)]
    rows = {row.name: row for row in update.guarantees()}
    for unit, name in (("client", "client"), ("patient", "record_patient")):
        expected = accounting.epsilon(rows[name].event, 20, DELTA)
        assert total(runs, unit).epsilon == pytest.approx(expected, rel=1e-6)
    assert total(runs, "slide").epsilon == pytest.approx(
        accounting.epsilon(rows["client_replace"].event, 20, DELTA), rel=1e-6
    )


def test_the_zeroing_of_a_pool_is_not_that_of_a_site():
    update = mechanism("update", noise_multiplier=20.0)
    rows = {row.name: row for row in update.guarantees()}
    pooled = run(0, plans={"pooled": Plan(held(OAK, ELM), update.descriptor(), 10)})
    for fingerprint in ("f1", "f2"):
        found = total([pooled], "client", fingerprint).epsilon
        assert found == rows["client_replace"].epsilon(10, DELTA)
        assert found > rows["client"].epsilon(10, DELTA)
    sgd = run(0, plans={"pooled": Plan(held(OAK, ELM), EPSILON_8.descriptor(), 250)})
    assert total([sgd, run(1)]).epsilon == total([run(0), run(1)]).epsilon
    assert total([sgd], "client").epsilon == math.inf
    with pytest.MonkeyPatch.context() as patch:  # a placement without a row for any change
        patch.setattr(Mechanism, "guarantees", lambda _: (row("server", 20.0, unit="client"),))
        assert "zeroing a pool" in total([pooled], "client").reason
        assert total([run(0, update)], "client").reason == ""


def patients(*made, rounds=10):
    """A run whose clients are patients of the oak, each with its own mechanism."""
    held_by = Holding((OAK,), is_whole=False, is_patient=True)
    plans = {f"p{i}": Plan(held_by, m.descriptor(), rounds) for i, m in enumerate(made)}
    return run(0, plans=plans)


def test_where_clients_are_patients_a_patient_is_one_client_and_not_all():
    update = mechanism("update", num_units=1, capacity=1, sampling_prob=1.0, noise_multiplier=20.0)
    rows = {row.name: row for row in update.guarantees()}
    one = patients(update, update, update)
    assert total([one]).epsilon == rows["client"].epsilon(10, DELTA)
    assert total([one], "tile").epsilon == rows["client_replace"].epsilon(10, DELTA)
    whole = total([one], "client")
    assert whole.epsilon == math.inf
    assert "nothing is proven for all of them at once" in whole.reason
    twice = total([one, dataclasses.replace(one, name="again")])
    assert twice.epsilon == pytest.approx(rows["client"].epsilon(20, DELTA), rel=1e-6)


def test_of_patients_with_unlike_mechanisms_the_worst_counts():
    quiet, loud = (
        mechanism("update", num_units=1, capacity=1, sampling_prob=1.0, noise_multiplier=z)
        for z in (20.0, 40.0)
    )
    for made in ((quiet, loud), (loud, quiet)):
        assert total([patients(*made)]).epsilon == total([patients(quiet)]).epsilon


def test_clients_that_share_data_otherwise_have_no_total():
    half = Holding((OAK,), is_whole=False, is_patient=False)
    plans = {name: Plan(half, EPSILON_8.descriptor(), 250) for name in ("left", "right")}
    found = total([run(0, plans=plans)])
    assert found.epsilon == math.inf
    assert "several clients hold the data" in found.reason


def test_where_a_site_is_one_patient_its_zeroing_is_the_patients():
    update = mechanism("update", noise_multiplier=20.0)
    one = run(0, plans={"oak": Plan(Holding((OAK,), True, True), update.descriptor(), 10)})
    client = {row.name: row for row in update.guarantees()}["client"]
    assert total([one]).epsilon <= client.epsilon(10, DELTA)
    assert total([one], "client").epsilon == client.epsilon(10, DELTA)


def test_other_patients_may_lie_in_several_clients():
    update = mechanism("update", num_units=1, capacity=1, sampling_prob=1.0, noise_multiplier=20.0)
    other = {"oak": Plan(held(OAK._replace(patients="p9")), update.descriptor(), 10)}
    found = total([patients(update, update), run(1, plans=other)])
    assert found.epsilon == math.inf
    assert found.unprotected == ("run0",)  # what covers any change of a site covers any patient


def row(adversary, z, unit="patient", relation="zero_out", **changes):
    event = None if z is None else dp_event.GaussianDpEvent(z)
    return Guarantee(
        name=f"{unit} against {adversary}", adversary=adversary, unit=unit, relation=relation,
        sensitivity=1.0, event=event, **changes,
    )  # fmt: skip


@pytest.fixture
def rows(monkeypatch):
    """Replaces the rows of a placement: they are named by the noise multiplier."""
    tables = {}
    guarantees = Mechanism.guarantees

    def replaced(self):
        return tables.get(self.noise_multiplier) or guarantees(self)

    monkeypatch.setattr(Mechanism, "guarantees", replaced)
    return tables


def gaussian_total(*multipliers):
    return accounting.epsilon(
        dp_event.ComposedDpEvent([dp_event.GaussianDpEvent(z) for z in multipliers]), 1, DELTA
    )


def test_headline_and_worst_adversary_are_composed_apart(rows):
    rows[2.0] = (row("sum", 20.0), row("shares", 5.0), row("sum", 40.0), row("shares", 4.0))
    rows[3.0] = (row("server", 8.0, unit="client"), row("server", 9.0))
    found = total([run(i, mechanism(noise_multiplier=z), rounds=1) for i, z in enumerate((2, 3))])
    assert found.headline_epsilon == pytest.approx(gaussian_total(40.0, 9.0))
    assert found.headline_adversaries == ("sum", "server")
    assert found.epsilon == pytest.approx(gaussian_total(5.0, 9.0))
    assert found.adversaries == ("sum", "shares", "server")


def test_adversaries_of_whom_none_is_evidently_the_strongest_count_together(rows):
    rows[2.0] = (row("sum", 6.0), row("shares", 6.0, accountant_relation="replace_one"))
    found = total([run(0, mechanism(noise_multiplier=2.0), rounds=1)])
    alone = accounting.epsilon(dp_event.GaussianDpEvent(6.0), 1, DELTA, "replace_one")
    assert found.headline_epsilon == pytest.approx(gaussian_total(6.0))
    assert found.epsilon > alone


def test_an_adversary_against_whom_nothing_is_proven_spoils_the_worst_case_alone(rows):
    rows[2.0] = (row("sum", 6.0), row("shares", None, reason="nothing is proven"))
    found = total([run(0, mechanism(noise_multiplier=2.0), rounds=1)])
    assert found.epsilon == math.inf
    assert found.reason == "run0: nothing is proven"
    assert found.headline_epsilon == pytest.approx(gaussian_total(6.0))


@pytest.mark.parametrize("relation", ["replace_one", "replacement of one patient", ""])
def test_a_row_for_another_change_of_data_does_not_count(rows, relation):
    rows[2.0] = (row("server", 6.0, relation=relation),)
    found = total([run(0, mechanism(noise_multiplier=2.0), rounds=1)])
    assert found.epsilon == math.inf
    assert "not for zeroing" in found.reason


def test_a_mechanism_of_another_version_is_named():
    strange = run(4, plans={"oak": Plan(held(OAK), EPSILON_8.descriptor() | {"colour": 1}, 5)})
    with pytest.raises(ValueError, match=r"of run 'run4' cannot be rebuilt .*colour"):
        total([run(0), strange])


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5])
def test_delta_is_checked(delta):
    with pytest.raises(ValueError, match="delta"):
        epsilon_if_all_released([run(0)], "f1", delta)


def test_the_statements_part_is_json_and_holds_no_fingerprint():
    other = run(2, plans={"oak": Plan(held(ELM._replace(site="oak")), EPSILON_8.descriptor(), 250)})
    runs = [run(0, has_ended=True), run(1, mechanism("none"), seed=5), other]
    part = across_runs.to_json(runs, [OAK], DELTA)
    text = json.dumps(part, allow_nan=False)
    assert json.loads(text) == part
    for source in (OAK, ELM):
        assert source.fingerprint not in text
        assert source.patients not in text
    site = part["sites"]["oak"]
    assert [(r["name"], r["rounds"], r["rounds_are"]) for r in site["runs"]] == [
        ("run0", 250, "charged"),
        ("run1", 250, "planned"),
    ]
    assert site["same_site_other_data"] == ["run2"]
    patient = site["epsilon_if_all_released"]["patient"]
    assert patient["epsilon"] == "infinity"
    assert patient["epsilon_of_others"] == total([run(0)]).epsilon
    assert patient["not_private_seeds"] == ["run1"]
