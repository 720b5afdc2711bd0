"""One page for who answers for the data: every placement, and no figure that the file has not."""

import json
import re

import pytest

from fedjax_dp.privacy.budgets import make_mechanisms
from fedjax_dp.privacy.statement import statement
from fedjax_dp.reporting.officer import WIDTH, statement_page
from fedjax_dp.reporting.summary import epsilon_text, round_up

ADD_OR_REMOVE = {
    "relation": "add_or_remove", "expected_batch_size": None, "sampling_prob": 0.1,
    "nominal_num_units": 150,
}  # fmt: skip
CASES = {
    "dp_sgd": {},
    "dp_sgd of tiles": {"placement": "dp_sgd", "unit": "tile"},
    "dp_sgd, add or remove": {"placement": "dp_sgd", **ADD_OR_REMOVE},
    "dp_sgd, adaptive": {"placement": "dp_sgd", "is_adaptive": True, "noise_multiplier": 1.5},
    "update": {"is_equal_average": True},
    "distributed": {},
    "distributed, discrete": {
        "placement": "distributed", "noise": "discrete_gaussian", "dimension": 1000,
    },
    "central": {"cohort_prob": 0.5},
    "update_unclipped": {},
    "none": {},
}  # fmt: skip
INFINITE = ("update_unclipped", "none")


def stated(name, *, num_units=None, rounds=5, **overrides):
    settings = dict(CASES[name])
    placement = settings.pop("placement", name)
    common = {
        "unit": "patient", "expected_batch_size": 16, "local_steps": 1, "rounds": 10,
        "l2_clip_norm": 1.0, "noise_multiplier": None if placement == "none" else 2.0,
    }  # fmt: skip
    num_units = num_units or {"north": 100, "south": 300}
    made = make_mechanisms(num_units, placement=placement, **common | settings)
    value = statement(
        made.mechanisms, dict.fromkeys(num_units, rounds), warnings=made.warnings,
        **{"target_delta": 1e-5, "is_private_randomness": True} | overrides,
    )  # fmt: skip
    return json.loads(json.dumps(value, allow_nan=False))


def first_sentence(page):
    return " ".join(re.search(r"\*\*(.+?)\*\*", page, re.DOTALL)[1].split())


def tables(page):
    """The cells of every table row of the page."""
    rows = [line for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]


@pytest.mark.parametrize("name", CASES)
def test_it_is_one_page(name):
    page = statement_page(stated(name))
    lines = page.splitlines()
    assert len(lines) <= 75
    assert all(len(line) <= WIDTH for line in lines if not line.startswith("|"))
    assert lines[2].startswith("**")
    assert "None" not in page
    assert "experiments.check_statement" in page


@pytest.mark.parametrize("name", CASES)
def test_every_figure_is_the_file_s(name):
    value = stated(name)
    page = statement_page(value)
    cells = tables(page)
    for site, entry in value["clients"].items():
        (row,) = (row for row in cells if row[0] == site)
        assert row[3] == str(entry["rounds"])
        shown = [entry["epsilon"], *(entry[f"{u}_epsilon"]["epsilon"] for u in ("patient", "tile"))]
        if name in INFINITE:
            assert row[4:7] == ["infinite"] * 3
            continue
        for cell, epsilon in zip(row[4:7], shown, strict=True):
            if epsilon is None:
                assert cell == "no valid conversion"
            else:
                assert float(cell) == round_up(epsilon) >= epsilon
        assert row[7] == f"yes (1/n = {entry['one_over_n']:.3g})"
    if name in INFINITE:
        return
    worst = value["clients"][value["epsilon"]["worst_client"]]
    deltas, epsilons = (row[1:] for row in cells if row[0] in ("delta", "epsilon"))
    assert len(deltas) == 5
    curve = {
        f"{point['delta']:g}": epsilon_text(point["epsilon"]) for point in worst["epsilon_curve"]
    }
    assert dict(zip(deltas, epsilons, strict=True)).items() <= curve.items()
    assert curve["1e-05"] == epsilon_text(value["epsilon"]["max"])
    for adversary, entry in value["epsilon_by_adversary"].items():
        assert adversary in " ".join(page.split())
        if len(value["epsilon_by_adversary"]) > 1:
            (row,) = (row for row in cells if row[0] == adversary)
            assert row[2] == f"{epsilon_text(entry['epsilon'])} ({entry['worst_client']})"


@pytest.mark.parametrize("name", sorted(set(CASES) - set(INFINITE)))
def test_the_first_sentence_says_what_is_promised(name):
    value = stated(name)
    sentence = first_sentence(statement_page(value))
    assert sentence.startswith("Promised to each ")
    assert f"epsilon at most {epsilon_text(value['epsilon']['max'])} at delta 1e-05" in sentence
    assert sentence.endswith(f"against {value['adversary']}.")


@pytest.mark.parametrize("name", INFINITE)
def test_where_epsilon_is_infinite_the_first_sentence_says_so(name):
    sentence = first_sentence(statement_page(stated(name)))
    assert sentence.startswith("Nothing is promised to anyone: epsilon is infinite, because ")


@pytest.mark.parametrize("name", sorted(set(CASES) - set(INFINITE)))
def test_a_seed_is_not_private(name):
    page = statement_page(stated(name, is_private_randomness=False))
    assert first_sentence(page).startswith("NOT PRIVATE: ")
    assert "Promised to" not in page
    page = statement_page(stated("none", is_private_randomness=False))
    assert "epsilon is infinite" in first_sentence(page)


def test_nothing_sent_is_nothing_promised():
    assert first_sentence(statement_page(stated("dp_sgd", rounds=0))).startswith("No site has sent")


def test_a_missing_conversion_has_its_reason():
    page = " ".join(statement_page(stated("dp_sgd of tiles")).split())
    assert (
        "No valid conversion to one patient: no public, enforced cap of tiles per patient" in page
    )
    assert "No valid conversion" not in statement_page(stated("dp_sgd"))


def test_warnings_and_a_delta_above_one_over_n_are_shown():
    value = stated("dp_sgd", num_units={"hut": 2, "north": 100}, target_delta=0.5)
    page = statement_page(value)
    assert "- hut: with 2 patients" in page
    (row,) = (row for row in tables(page) if row[0] == "hut")
    assert row[7] == "NO (1/n = 0.5)"


def test_of_many_clients_the_worst_are_shown():
    num_units = {f"patient {i}": 20 + i % 5 for i in range(40)}
    value = stated("dp_sgd", num_units=num_units)
    page = statement_page(value)
    assert len(page.splitlines()) <= 75
    assert "24 more are in `privacy.json`, none with a larger epsilon." in " ".join(page.split())
    shown = [row[0] for row in tables(page) if row[0] in num_units]
    rest = [entry["epsilon"] for name, entry in value["clients"].items() if name not in shown]
    assert max(rest) <= min(value["clients"][name]["epsilon"] for name in shown)


def test_what_all_runs_cost_together_is_shown():
    total = {unit: {"epsilon": 12.345} for unit in ("tile", "patient", "client")}
    part = {
        "target_delta": 1e-5,
        "sites": {"north": {"runs": [{}, {}, {}], "epsilon_if_all_released": total}},
    }
    page = " ".join(statement_page(stated("dp_sgd", across_runs=part)).split())
    assert "epsilon of one patient at delta 1e-05" in page
    assert "north 12.35 (3 runs)" in page
    total["patient"]["epsilon"] = "infinity"
    page = " ".join(statement_page(stated("dp_sgd", across_runs=part)).split())
    assert "north no valid promise (3 runs)" in page
    page = " ".join(
        statement_page(stated("central", client_is="patient", across_runs=part)).split()
    )
    assert "epsilon of one patient at delta 1e-05" in page
    total["patient"]["epsilon"] = 12.345
    page = " ".join(statement_page(stated("dp_sgd", across_runs=part)).split())
    assert "Other runs on the same data" not in page
    page = statement_page(stated("dp_sgd", across_runs={"error": "not known: no register"}))
    assert "is not known: no register" in " ".join(page.split())


def test_a_client_is_called_what_it_is():
    for kind, words in (("site", "each site"), ("patient", "each patient"), ("pool", "the pool")):
        page = statement_page(stated("central", client_is=kind))
        assert words in first_sentence(page)
        assert f"how many {kind}s there are stays known" in " ".join(page.split())
