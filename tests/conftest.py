"""Fixtures shared by all tests."""

import os
import pathlib

import pytest

from tests import mutants

# Before any test imports the library.
mutants.apply_from_environment()


@pytest.fixture(autouse=True)
def this_process_stays(monkeypatch):
    """What starts a program anew in this process would end the tests, without a word."""

    def refuse(*command):
        raise AssertionError(f"this would replace the test run: {command[:2]}")

    monkeypatch.setattr(os, "execve", refuse)


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """Folder of real tissue, or a skip: it may not be redistributed, so few machines have it."""
    named = os.environ.get("FEDJAX_DP_DATA", "")
    beside = pathlib.Path(__file__).resolve().parents[1].parent / "shared" / "data"
    path = pathlib.Path(named) if named else beside
    if not (path / "federation" / "manifest.csv").is_file():
        pytest.skip(f"no real data at {path}; set FEDJAX_DP_DATA to a folder that has it")
    return path
