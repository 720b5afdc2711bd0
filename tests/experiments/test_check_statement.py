"""The check by command line: what follows, what does not, and the exit code."""

import json

import pytest

from experiments.check_statement import check
from tests.reporting.test_officer import stated


@pytest.mark.parametrize("name", ["dp_sgd", "distributed", "none"])
def test_a_statement_that_follows(tmp_path, capsys, name):
    path = tmp_path / "privacy.json"
    path.write_text(json.dumps(stated(name)))
    assert check(path) == 0
    printed = capsys.readouterr().out
    assert "every figure follows, at delta 1e-05" in printed
    assert ("none valid" in printed) == (name == "none")


def test_an_altered_statement_is_told_line_by_line(tmp_path, capsys):
    value = stated("dp_sgd")
    value["clients"]["north"]["rounds"] = 1
    path = tmp_path / "privacy.json"
    path.write_text(json.dumps(value))
    assert check(path) == 1
    assert "clients/north/patient: epsilon" in capsys.readouterr().err


def test_what_is_no_statement_is_refused(tmp_path, capsys):
    assert check(tmp_path / "none.json") == 1
    (tmp_path / "text.json").write_text("tissue")
    assert check(tmp_path / "text.json") == 1
    (tmp_path / "other.json").write_text("[]")
    assert check(tmp_path / "other.json") == 1
    printed = capsys.readouterr().err
    assert printed.count("cannot read") == 2
    assert "the statement cannot be read" in printed
