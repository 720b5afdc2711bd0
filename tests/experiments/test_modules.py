"""Experiments live side by side: their flags have the same names where they mean the same."""

import importlib
import pathlib
import subprocess
import sys

import pytest

import experiments

MODULES = sorted(path.stem for path in pathlib.Path(experiments.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("order", [MODULES, MODULES[::-1]], ids=["forwards", "backwards"])
def test_one_process_can_import_all(order):
    """A suite that is collected as a whole does; a flag that is defined twice stops it."""
    program = "import importlib\n" + "\n".join(
        f"importlib.import_module('experiments.{name}')" for name in order if name != "__init__"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [n for n in MODULES if n != "__init__"])
def test_each_says_what_it_is_for(name):
    assert importlib.import_module(f"experiments.{name}").__doc__
