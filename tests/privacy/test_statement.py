import copy
import json
import math

import pytest

from fedjax_dp.privacy import accounting, events, pld
from fedjax_dp.privacy.budgets import make_mechanisms
from fedjax_dp.privacy.mechanism import mechanism_from_descriptor
from fedjax_dp.privacy.statement import INFINITY, decode, recompute, recompute_epsilon, statement
from fedjax_dp.privacy.statement_check import disagreements

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


CASES = {
    "dp_sgd": {"max_units_per_patient": 2},
    "dp_sgd, patients": {"placement": "dp_sgd", "unit": "patient"},
    "dp_sgd, add or remove": {
        "placement": "dp_sgd", "unit": "patient", "relation": "add_or_remove",
        "expected_batch_size": None, "sampling_prob": 0.1, "nominal_num_units": 150,
    },
    "dp_sgd, adaptive": {"placement": "dp_sgd", "is_adaptive": True, "noise_multiplier": 1.0},
    "update": {"max_units_per_patient": 2, "is_equal_average": True},
    "distributed": {"unit": "patient", "local_steps": 1, "max_dropouts": 0},
    "distributed, discrete": {
        "placement": "distributed", "unit": "patient", "local_steps": 1,
        "noise": "discrete_gaussian", "dimension": 1000,
    },
    "central": {"cohort_prob": 0.5, "weights": {"A": 1.0, "B": 3.0}},
    "update_unclipped": {},
    "none": {},
}  # fmt: skip


def case(name):
    settings = dict(CASES[name])
    return made(settings.pop("placement", name), **settings)


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
        patient = rebuilt.patient_guarantee
        assert entry["patient_epsilon"] == {
            "epsilon": patient.epsilon(ROUNDS[client], DELTA), "row": patient.name, "reason": "",
        }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_row_is_recomputed_and_everything_follows(tmp_path, name):
    value = through_a_file(tmp_path / "privacy.json", case(name).mechanisms)
    recomputed = recompute(value)
    for client, entry in value["clients"].items():
        assert list(recomputed[client]) == [row["name"] for row in entry["guarantees"]]
        for row in entry["guarantees"]:
            assert recomputed[client][row["name"]] == pytest.approx(decode(row["epsilon"]))
    assert recompute_epsilon(value) == {
        c: next(iter(rows.values())) for c, rows in recomputed.items()
    }
    assert disagreements(value) == []


def test_where_a_step_loses_little_the_file_alone_gives_the_same_figure(tmp_path):
    """The accountant's grid is a function of the event, and not of who composed what before."""
    mechanisms = made(expected_batch_size=0.3, noise_multiplier=3.7, local_steps=300).mechanisms
    value = through_a_file(tmp_path / "privacy.json", mechanisms)
    assert "standard deviation" in value["grid"]
    for cached in (accounting._epsilon, pld.composed, pld._small_base):
        cached.cache_clear()
    for client, figure in recompute_epsilon(value).items():
        assert figure == value["clients"][client]["epsilon"]
        event = mechanisms[client].headline.event
        tight = accounting.epsilon(event, ROUNDS[client], DELTA, grid=2e-5)
        assert tight <= figure < 1.02 * tight  # the size of the grid is limited
        fixed = accounting.epsilon(event, ROUNDS[client], DELTA, grid=1e-3)
        assert fixed > 1.05 * tight  # what a grid that does not follow the event would state


def test_a_patient_s_tiles_among_integers_have_a_figure(tmp_path):
    """Replacement of what their patient adds: more than its zeroing, and less than without coin."""
    value = through_a_file(tmp_path / "privacy.json", case("distributed, discrete").mechanisms)
    entry = value["clients"]["B"]
    assert entry["tile_epsilon"]["row"] == "tile_of_patient"
    row = next(row for row in entry["guarantees"] if row["name"] == "tile_of_patient")
    assert row["event"] == entry["guarantees"][0]["event"]
    assert entry["epsilon"] < entry["tile_epsilon"]["epsilon"] < 4 * entry["epsilon"]
    assert value["epsilon_by_adversary"][row["adversary"]]["tile_epsilon"]["epsilon"] > 0
    row["epsilon"] *= 0.99
    assert any("tile_of_patient" in line for line in disagreements(value))


def louder(event):
    """The description of an event with a hundredth less of noise, wherever it stands."""
    if isinstance(event, list):
        return [louder(item) for item in event]
    if not isinstance(event, dict):
        return event
    change = {"noise_multiplier": 0.99, "standard_deviation": 0.99, "l2_sensitivity": 1.01}
    return {
        name: item * change[name] if name in change else louder(item)
        for name, item in event.items()
    }


def is_caught(value):
    """Whether the recomputed epsilons are others than those stated, or cannot be computed."""
    try:
        recomputed = recompute(value)
    except ValueError:
        return True
    return any(
        recomputed[client][row["name"]] != pytest.approx(decode(row["epsilon"]), rel=1e-6)
        for client, entry in value["clients"].items()
        for row in entry["guarantees"]
    )


@pytest.mark.parametrize("name", sorted(set(CASES) - {"update_unclipped", "none"}))
def test_an_altered_event_count_or_relation_is_caught(tmp_path, name):
    value = through_a_file(tmp_path / "privacy.json", case(name).mechanisms)
    assert not is_caught(value)
    for index, row in enumerate(value["clients"]["B"]["guarantees"]):
        if row["event"] is None:
            continue
        altered = copy.deepcopy(value)
        altered["clients"]["B"]["guarantees"][index]["event"] = louder(row["event"])
        assert is_caught(altered), row["name"]
        altered = copy.deepcopy(value)
        relation = "zero_out" if row["accountant_relation"] == "replace_one" else "replace_one"
        altered["clients"]["B"]["guarantees"][index]["accountant_relation"] = relation
        assert is_caught(altered), row["name"]
    altered = copy.deepcopy(value)
    altered["clients"]["B"]["rounds"] += 1
    assert is_caught(altered)


def test_what_the_sums_and_settings_say_must_follow(tmp_path):
    value = through_a_file(tmp_path / "privacy.json", case("dp_sgd, patients").mechanisms)
    changes = {
        ("epsilon", "max"): 1.0,
        ("epsilon", "worst_client"): "B",
        ("clients", "A", "patient_epsilon", "epsilon"): 0.1,
        ("clients", "A", "guarantees", 0, "relation"): "replacement of anything",
        ("clients", "A", "guarantees", 0, "adversary"): "everybody",
        ("clients", "A", "mechanism", "num_units"): 1000,
        ("clients", "A", "epsilon_curve", 0, "epsilon"): 0.5,
        ("epsilon_by_adversary",): {},
        ("relation",): "add_or_remove",
        ("private",): False,
        ("randomness",): "a good seed",
        ("trust",): "Nobody need be trusted.",
        ("weak_points",): [],
    }
    for path, new in changes.items():
        altered = copy.deepcopy(value)
        *inside, last = path
        inner = altered
        for step in inside:
            inner = inner[step]
        assert inner[last] != new, path
        inner[last] = new
        assert disagreements(altered), path
    del value["clients"]["A"]["guarantees"][1]
    assert any("guarantees" in line for line in disagreements(value))
    assert disagreements({"clients": 3}) != []


def test_patients_and_tiles_take_the_smallest_row_that_covers_them(tmp_path):
    value = through_a_file(
        tmp_path / "privacy.json", made("update", is_equal_average=True).mechanisms
    )
    for entry in value["clients"].values():
        rows = {row["name"]: row["epsilon"] for row in entry["guarantees"]}
        # No cap is known: any change of the client's data is all that covers a patient.
        assert entry["patient_epsilon"]["epsilon"] == rows["client_replace"]
        assert entry["tile_epsilon"]["epsilon"] == min(rows["record_tile"], rows["client_replace"])
        assert entry["tile_epsilon"]["row"] == "record_tile"
        assert entry["epsilon"] == rows["client"] < rows["client_replace"]
    average = value["epsilon_by_adversary"][
        "someone who sees only the average of a fixed public cohort"
    ]
    rows = {row["name"]: row for row in value["clients"]["A"]["guarantees"]}
    assert average["epsilon"] == rows["client_in_average"]["epsilon"] < value["epsilon"]["max"]
    assert average["patient_epsilon"]["epsilon"] == rows["client_replace_in_average"]["epsilon"]


def test_the_hierarchy_is_stated(tmp_path):
    value = through_a_file(tmp_path / "privacy.json", case("dp_sgd, patients").mechanisms)
    for entry in value["clients"].values():
        assert entry["patient_epsilon"]["epsilon"] == entry["epsilon"]
        assert entry["tile_epsilon"]["row"] == "tile_of_patient"
        assert entry["tile_epsilon"]["epsilon"] > entry["epsilon"]


def test_each_adversary_has_its_worst_client(tmp_path):
    value = through_a_file(tmp_path / "privacy.json", case("distributed").mechanisms)
    opened, shares = value["epsilon_by_adversary"].values()
    assert opened["epsilon"] == value["epsilon"]["max"] < shares["epsilon"]
    assert next(iter(value["epsilon_by_adversary"])) == value["adversary"]
    for client, entry in value["clients"].items():
        assert entry["epsilon_by_adversary"].keys() == value["epsilon_by_adversary"].keys()
        if client == shares["worst_client"]:
            alone = [r for r in entry["guarantees"] if r["name"] == "patient_against_shares"]
            assert alone[0]["epsilon"] == shares["epsilon"]


def test_a_client_that_is_a_patient_is_protected_as_one(tmp_path):
    mechanisms = made("central", unit="patient", cohort_prob=0.5).mechanisms
    value = through_a_file(tmp_path / "privacy.json", mechanisms, client_is="patient")
    entry = value["clients"]["A"]
    assert entry["patient_epsilon"] == {"epsilon": entry["epsilon"], "row": "client", "reason": ""}
    as_site = through_a_file(tmp_path / "privacy.json", mechanisms)["clients"]["A"]
    assert as_site["patient_epsilon"]["epsilon"] > entry["epsilon"]
    assert disagreements(value) == []
    with pytest.raises(ValueError, match="client_is"):
        through_a_file(tmp_path / "privacy.json", mechanisms, client_is="ward")


WORDS = {
    "dp_sgd": ["truncated draw", "its own noise alone", "128 bits", "hardened, not proven"],
    "dp_sgd, add or remove": ["never cut", "nominal number", "are private"],
    "dp_sgd, adaptive": ["part of every event", "share one budget"],
    "update": ["rows named record", "clips its model update"],
    "distributed": ["SHAKE-256", "outside of the proof", "simulated", "share of the noise"],
    "distributed, discrete": ["Integer noise is exact", "upper bound", "amplified by Renyi"],
    "central": ["p = 0.5", "stays secret", "trust the server", "without noise"],
    "update_unclipped": ["nothing bounds", "no guarantee"],
    "none": ["no noise is added", "no guarantee"],
}


@pytest.mark.parametrize("name", WORDS)
def test_the_words_follow_placement_and_settings(tmp_path, name):
    value = through_a_file(tmp_path / "privacy.json", case(name).mechanisms)
    texts = [value["sampler"], value["trust"], value["noise"], *value["weak_points"]]
    for words in WORDS[name]:
        assert words in " ".join(texts), words


def test_no_placement_claims_what_is_another_one_s(tmp_path):
    def texts(name):
        value = through_a_file(tmp_path / "privacy.json", case(name).mechanisms)
        return " ".join([value["sampler"], value["trust"], *value["weak_points"]])

    assert "depends on its own noise alone" not in texts("central") + texts("distributed")
    assert "amplifies nothing" not in texts("central")
    assert "hardened" not in texts("distributed, discrete")
    assert "Numbers of units" not in texts("dp_sgd, add or remove")


def test_the_noise_of_central_is_the_server_s(tmp_path):
    made_ = case("central").mechanisms
    for client, entry in through_a_file(tmp_path / "p.json", made_)["clients"].items():
        assert entry["noise_added_by"] == "server"
        assert entry["noise_stddev"] == made_[client].server_noise_stddev > 0
        assert entry["hides_among"] == {"number": 2, "of": "client"}


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
