"""Experiments live side by side: their flags have the same names where they mean the same."""

import importlib
import pathlib
import subprocess
import sys

import pytest

import benchmarks
import experiments


def modules(package):
    names = (path.stem for path in pathlib.Path(package.__file__).parent.glob("*.py"))
    return sorted(name for name in names if name != "__init__")


MODULES = modules(experiments)
BESIDE = [f"benchmarks.{name}" for name in modules(benchmarks)] + ["benchmarks.peers.competition"]
ALL = [f"experiments.{name}" for name in MODULES] + BESIDE


@pytest.mark.parametrize("order", [ALL, ALL[::-1]], ids=["forwards", "backwards"])
def test_one_process_can_import_all(order):
    """A suite that is collected as a whole does; a flag that is defined twice stops it."""
    program = "import importlib\n" + "\n".join(
        f"importlib.import_module({name!r})" for name in order
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_each_says_what_it_is_for(name):
    assert importlib.import_module(f"experiments.{name}").__doc__
