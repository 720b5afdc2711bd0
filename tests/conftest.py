"""Fixtures shared by all tests."""

import os
import pathlib

import pytest

from tests import mutants

# Before any test imports the library.
mutants.apply_from_environment()


@pytest.fixture(autouse=True)
def this_process_stays_as_it_is(monkeypatch):
    """Experiments prepare their own process; here that would end the tests, or reach the next."""

    def refuse(*command):
        raise AssertionError(f"this would replace the test run: {command[:2]}")

    monkeypatch.setattr(os, "execve", refuse)
    # Else the first in-process experiment gives jax as many devices as cores, for all tests after.
    monkeypatch.setattr("experiments.launcher.cores", lambda: 1)


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """Folder of real tissue, or a skip: it may not be redistributed, so few machines have it."""
    named = os.environ.get("FEDJAX_DP_DATA", "")
    beside = pathlib.Path(__file__).resolve().parents[1].parent / "shared" / "data"
    path = pathlib.Path(named) if named else beside
    if not (path / "federation" / "manifest.csv").is_file():
        pytest.skip(f"no real data at {path}; set FEDJAX_DP_DATA to a folder that has it")
    return path
