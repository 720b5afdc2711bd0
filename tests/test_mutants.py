"""Broken rules are seen: the table can be applied, and tests that must fail do, by their contract.

`python -m experiments.audit` runs all of it; here are a few, so that the machinery is tested too.
"""

import pytest

from experiments import audit_mutants
from experiments.audit_cases import make_cases
from tests import mutants
from tests.mutants import MUTANTS, Edit

# Quick ones: a law, a refusal, an independence.
REPRESENTATIVE = ("overflow_kept", "mask_given_twice", "shuffled_batches")


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_can_be_applied(name):
    for edit in MUTANTS[name].edits:
        edited = mutants.edited(edit)
        assert edited != mutants.path_of(edit).read_text("utf-8")
        compile(edited, edit.module, "exec")


@pytest.mark.parametrize("name", MUTANTS)
def test_whoever_must_see_it_is_there(name):
    assert MUTANTS[name].caught_by
    for node in audit_mutants.tests_of(MUTANTS[name]):
        path, test = node.split("::")
        source = (audit_mutants.ROOT / path).read_text("utf-8")
        assert f"def {test.partition('[')[0]}(" in source, node


def test_whichever_case_of_the_audit_must_see_it_is_there(tmp_path):
    cases = {case.name for case in make_cases(tmp_path)}
    named = {case for mutant in MUTANTS.values() for case in audit_mutants.cases_of(mutant)}
    assert named <= cases


@pytest.mark.parametrize("old", ["no such text", "import"])
def test_a_text_that_is_not_there_once_is_refused(old):
    with pytest.raises(ValueError, match=r"once in privacy\.noise, found it"):
        mutants.edited(Edit("privacy.noise", old, ""))


def test_a_library_that_is_loaded_cannot_be_broken_any_more():
    with pytest.raises(RuntimeError, match="before the library is loaded"):
        mutants.apply("overflow_kept")


@pytest.mark.slow
def test_the_tests_pass_without_a_mutant_and_fail_with_it():
    nodes = [node for name in REPRESENTATIVE for node in audit_mutants.tests_of(MUTANTS[name])]
    baseline = audit_mutants.run_tests(nodes)
    assert (baseline.trouble, baseline.broken) == ("", {})
    assert all(baseline.passed.values())
    for name in REPRESENTATIVE:
        seen = audit_mutants.run_tests(audit_mutants.tests_of(MUTANTS[name]), name)
        assert audit_mutants.judge(name, baseline.passed, seen) == "", name


# --- what counts as caught


def report(tmp_path, *cases):
    path = tmp_path / "report.xml"
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return path


def case(name, outcome="", classname="tests.data.test_sampling"):
    return f'<testcase classname="{classname}" name="{name}">{outcome}</testcase>'


NODE = "tests/data/test_sampling.py::test_law"


@pytest.mark.parametrize(
    ("cases", "passed", "broken", "trouble"),
    [
        ([case("test_law")], True, False, False),
        ([case("test_law", '<failure message="AssertionError: 3"/>')], False, True, False),
        ([case("test_law", '<failure message="assert 3 == 4"/>')], False, True, False),
        ([case("test_law", '<failure message="Failed: DID NOT RAISE E"/>')], False, True, False),
        ([case("test_law", '<failure message="TypeError: no"/>')], False, True, True),
        ([case("test_law", '<error message="fixture"/>')], False, True, True),
        ([case("test_law", '<skipped message="no data"/>')], False, True, True),
        ([case("test_law[a]"), case("test_law[b]", '<failure message="assert 0"/>')],
         False, True, False),
        ([case("test_lawless")], True, False, True),
    ],
)  # fmt: skip
def test_only_a_broken_contract_counts(tmp_path, cases, passed, broken, trouble):
    seen = audit_mutants.read_report(report(tmp_path, *cases), [NODE])
    assert (seen.passed[NODE], NODE in seen.broken, bool(seen.trouble)) == (passed, broken, trouble)


def test_a_mutant_that_a_test_does_not_see_survives(monkeypatch):
    monkeypatch.setitem(MUTANTS, "one", mutants.Mutant("", (), (NODE, "audit:dp_sgd")))
    outcome = audit_mutants.Outcome
    seen = outcome({NODE: False}, {NODE: "assert 0"}, "")
    assert audit_mutants.judge("one", {NODE: True}, seen) == ""
    assert "without" in audit_mutants.judge("one", {NODE: False}, seen)
    assert "with" in audit_mutants.judge("one", {NODE: True}, outcome({NODE: True}, {}, ""))
    assert audit_mutants.judge("one", {NODE: True}, outcome({}, {}, "TypeError")) == "TypeError"
