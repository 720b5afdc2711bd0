import json
import math

import pytest

from fedjax_dp.privacy import events
from fedjax_dp.privacy.budgets import make_mechanisms
from fedjax_dp.privacy.mechanism import mechanism_from_descriptor
from fedjax_dp.privacy.statement import INFINITY, recompute_epsilon, statement

ROUNDS = {"A": 7, "B": 3}
DELTA = 1e-5


def made(placement="dp_sgd", **overrides):
    settings = {
        "unit": "tile",
        "expected_batch_size": 16,
        "local_steps": 2,
        "rounds": 10,
        "l2_clip_norm": 1.0,
        "noise_multiplier": None if placement == "none" else 2.0,
    }
    return make_mechanisms({"A": 100, "B": 300}, placement=placement, **settings | overrides)


def through_a_file(path, mechanisms, rounds=ROUNDS, **overrides):
    settings = {"target_delta": DELTA, "is_private_randomness": True}
    value = statement(mechanisms, rounds, **settings | overrides)
    path.write_text(json.dumps(value, allow_nan=False))
    return json.loads(path.read_text())


@pytest.mark.parametrize("placement", ["dp_sgd", "update", "none"])
def test_epsilon_is_recomputed_from_the_file_alone(tmp_path, placement):
    mechanisms = made(placement).mechanisms
    value = through_a_file(tmp_path / "privacy.json", mechanisms)
    recomputed = recompute_epsilon(value)
    for client, entry in value["clients"].items():
        stated = float(entry["epsilon"])  # "infinity" is a float's name too
        assert recomputed[client] == pytest.approx(stated, rel=1e-9)
        assert stated == mechanisms[client].epsilon(ROUNDS[client], DELTA)
        assert mechanism_from_descriptor(entry["mechanism"]) == mechanisms[client]
    assert float(value["epsilon"]["max"]) == max(recomputed.values())


@pytest.mark.parametrize("placement", ["dp_sgd", "update"])
def test_every_row_is_what_the_described_mechanism_promises(tmp_path, placement):
    value = through_a_file(
        tmp_path / "privacy.json", made(placement, max_units_per_patient=2).mechanisms
    )
    for client, entry in value["clients"].items():
        rebuilt = mechanism_from_descriptor(entry["mechanism"])
        for stated, row in zip(entry["guarantees"], rebuilt.guarantees(), strict=True):
            assert events.event_from_json(stated["event"]) == row.event
            assert stated["epsilon"] == row.epsilon(ROUNDS[client], DELTA)
        patient = rebuilt.patient_guarantee.epsilon(ROUNDS[client], DELTA)
        assert entry["patient_epsilon"] == {"epsilon": patient, "reason": ""}


def test_a_changed_file_changes_the_recomputed_epsilon(tmp_path):
    value = through_a_file(tmp_path / "privacy.json", made().mechanisms)
    before = recompute_epsilon(value)["A"]
    value["clients"]["A"]["guarantees"][0]["event"]["event"]["noise_multiplier"] /= 2
    assert recompute_epsilon(value)["A"] > before
    value["clients"]["B"]["rounds"] += 1
    assert recompute_epsilon(value)["B"] > float(value["clients"]["B"]["epsilon"])


def test_it_says_what_a_reader_must_know(tmp_path):
    value = through_a_file(
        tmp_path / "privacy.json",
        made().mechanisms,
        not_accounted=["validation Dice chose the checkpoint"],
        weak_points=["eight pooled threads"],
        warnings=["careful"],
        unit_note="patients are unknown",
    )
    assert (value["placement"], value["unit"], value["relation"]) == ("dp_sgd", "tile", "zero_out")
    assert value["accountant"].startswith("PLD, dp-accounting 0.")
    assert value["private"] is True
    assert value["unit_note"] == "patients are unknown"
    assert value["warnings"] == ["careful"]
    assert "validation Dice chose the checkpoint" in value["not_accounted"]
    text = " ".join(value["weak_points"])
    for words in ("64 bits", "hardened, not proven", "external patients", "eight pooled threads"):
        assert words in text
    for client, n in {"A": 100, "B": 300}.items():
        entry = value["clients"][client]
        assert entry["one_over_n"] == 1 / n
        assert entry["delta_below_one_over_n"] is True
        assert entry["rounds"] == ROUNDS[client]
        assert {"sampling_prob", "capacity", "local_steps", "noise_multiplier"} <= set(
            entry["mechanism"]
        )
        curve = [(p["delta"], p["epsilon"]) for p in entry["epsilon_curve"]]
        assert dict(curve)[DELTA] == entry["epsilon"]
        assert [e for _, e in curve] == sorted(e for _, e in curve)
        assert entry["epsilon_by_round"][-1] == {
            "round": ROUNDS[client],
            "epsilon": entry["epsilon"],
        }
        assert entry["rdp_epsilon_without_truncation"] > 0.99 * entry["epsilon"]
        assert entry["patient_epsilon"]["epsilon"] is None
        assert "max_units_per_patient" in entry["patient_epsilon"]["reason"]


def test_a_seed_is_said_to_be_not_private(tmp_path):
    value = through_a_file(
        tmp_path / "privacy.json", made().mechanisms, is_private_randomness=False
    )
    assert value["private"] is False
    assert "NOT PRIVATE" in value["weak_points"][0]


def test_no_privacy_is_the_word_infinity(tmp_path):
    value = through_a_file(tmp_path / "privacy.json", made("none").mechanisms)
    assert value["private"] is False
    assert value["epsilon"]["max"] == INFINITY
    assert math.isinf(recompute_epsilon(value)["A"])


def test_a_client_that_never_joined_has_spent_nothing(tmp_path):
    value = through_a_file(tmp_path / "privacy.json", made().mechanisms, rounds={"A": 2})
    assert value["clients"]["B"]["epsilon"] == 0
    assert value["clients"]["B"]["epsilon_by_round"] == []
    assert recompute_epsilon(value)["B"] == 0
    assert value["epsilon"]["worst_client"] == "A"


def test_unknown_clients_and_mixed_placements_are_refused():
    mechanisms = made().mechanisms
    settings = {"target_delta": DELTA, "is_private_randomness": True}
    with pytest.raises(ValueError, match="'C'"):
        statement(mechanisms, {"C": 1}, **settings)
    with pytest.raises(ValueError, match="one placement"):
        statement(mechanisms | {"B": made("update").mechanisms["B"]}, {}, **settings)
