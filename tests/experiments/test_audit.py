"""The audit by command line, with too few trials to prove much and enough to accuse nobody."""

import math
import subprocess
import sys

import numpy as np
import pytest

from experiments import audit
from experiments.audit_cases import make_cases
from experiments.audit_report import BEGIN, END, tables, with_tables
from experiments.audit_worlds import observe
from tests import runs
from tests.laws import assert_mean, assert_std
from tests.runs import read_json

TRIALS = 300


@pytest.fixture(scope="module")
def calibrations(tmp_path_factory):
    return tmp_path_factory.mktemp("calibrations")


@pytest.fixture(scope="module")
def cases(calibrations):
    return {case.name: case for case in make_cases(calibrations)}


def test_every_placement_and_adversary_is_a_case(cases):
    assert {case.mechanism.placement for case in cases.values()} == {
        "dp_sgd", "update", "distributed", "central", "update_unclipped",
    }  # fmt: skip
    assert {case.row for case in cases.values()} == {"patient", "client", "patient_against_shares"}
    for case in cases.values():
        if case.mechanism.placement == "update_unclipped":
            assert math.isinf(case.theory)
        elif not case.sees_share:
            assert 3.9 < case.theory <= 4.0
        else:
            assert case.theory > 5.0  # a share alone hides less than the sum


# Those that do not share most of their way with another.
FOLLOWED = (
    "dp_sgd", "update", "distributed_share", "distributed_discrete", "central", "dp_sgd_sampled",
    "update_unclipped_4",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLLOWED)
def test_the_statistic_follows_the_law_that_fixed_the_threshold(cases, name):
    """Another law would make the audit blind, not wrong: it would lose its power unseen."""
    case, seen = cases[name], {"in": [], "out": []}
    for world, statistics in observe(case, TRIALS, 1):
        seen[world].append(statistics)
    inside, outside = (np.concatenate(seen[world]) for world in ("in", "out"))
    shifts, probs = map(np.array, case.law)
    mean = shifts @ probs
    assert_mean(outside, 0.0, 1.0)
    assert_std(outside, 1.0)
    spread = math.sqrt(1.0 + shifts**2 @ probs - mean**2)
    if case.mechanism.noise == "discrete_gaussian":
        mean *= 1 - 2.0**-18  # the headroom of the integers
    assert_mean(inside, mean, spread)


@pytest.mark.slow
def test_by_flags(tmp_path):
    """Too few trials for the floor: the audit says that it proves nothing, and fails."""
    docs = tmp_path / "page.md"
    docs.write_text(f"# Page\n\n{BEGIN}\nSTALE\n{END}\n\nThe end.\n")
    command = [
        sys.executable, "-W", "error", "-m", "experiments.audit", f"--workdir={tmp_path / 'w'}",
        f"--trials={TRIALS}", "--nomutants", "--cases=update_unclipped_1,update_unclipped_4,dp_sgd",
        f"--docs={docs}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "FAILED dp_sgd: no power" in done.stderr
    report = read_json(tmp_path / "w" / "audit.json")
    verdicts = {case["case"]: case["verdict"] for case in report["cases"]}
    assert verdicts == {
        "update_unclipped_1": "grows", "update_unclipped_4": "grows", "dp_sgd": "no power",
    }  # fmt: skip
    for case in report["cases"]:
        assert case["trials"] == TRIALS
        assert 0 < case["true_positive_at_least"] < 1
        assert case["theory"] == "infinity" or case["bound"] < case["theory"]
    page = docs.read_text()
    assert (tmp_path / "w" / "audit.md").read_text().strip() in page
    assert page.startswith("# Page\n")
    assert page.endswith("The end.\n")
    assert "STALE" not in page


def test_an_unknown_case_is_refused(calibrations):
    with pytest.raises(ValueError, match=r"--cases among .*, got \['ldp'\]"):
        audit.audit(["ldp"], 10, 0, calibrations)


def test_a_page_without_markers_is_refused():
    for page in ("", f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"):
        with pytest.raises(ValueError, match="Expected one <!-- audit:begin -->"):
            with_tables(page, "text")


@pytest.mark.parametrize(
    ("theory", "bound", "before", "expected"),
    [
        (4.0, 3.5, 0.0, "holds"), (4.0, 4.01, 0.0, "broken"), (4.0, 3.1, 0.0, "no power"),
        (math.inf, 3.0, 2.0, "grows"), (math.inf, 2.0, 3.0, "does not grow"),
    ],
)  # fmt: skip
def test_what_a_bound_means(theory, bound, before, expected):
    result = {"theory": theory, "bound": bound, "floor": 0.8 * theory}
    assert audit.verdict(result, before) == expected


def test_sampled_cases_need_only_show_something():
    assert audit.verdict({"theory": 4.0, "bound": 0.1, "floor": 0.0}, 0.0) == "holds"
    assert audit.verdict({"theory": 4.0, "bound": 0.0, "floor": 0.0}, 0.0) == "no power"


def test_the_tables_name_who_survived():
    caught = [
        {"mutant": "a", "description": "x", "caught_by": ["t"], "survived": ""},
        {"mutant": "b", "description": "y", "caught_by": ["t", "u"], "survived": "u passes"},
    ]
    text = tables([], caught, 0.05)
    assert "| `a` | x | `t` | yes |" in text
    assert "| `b` | y | `t`<br>`u` | **no**: u passes |" in text
