"""A part of the fuzz runs, in processes of their own: they fork, which nothing with jax may.

The whole is `python -m tests.fuzz_slides` and `python -m tests.fuzz_annotations`.
"""

import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(*words):
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_mutated_slides_are_read_or_refused():
    done = run("-m", "tests.fuzz_slides", "--count=900", "--seed=7")
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+)% reached pixels", done.stdout)[1]) >= 30
    assert done.stdout.count('"refused"') == 9


def test_mutated_annotations_are_read_or_refused():
    done = run("-m", "tests.fuzz_annotations", "--count=900", "--seed=7")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count('"refused"') == 6


RAISES = """
import pathlib, sys
from tests import fuzz_annotations as fuzz
fuzz.open_labels = lambda *_, **__: 1 / 0
tally, _ = fuzz.run(12, 0, pathlib.Path(sys.argv[1]))
assert all("ZeroDivisionError" in outcome for t in fuzz.failures(tally).values() for outcome in t)
sys.exit(3 if fuzz.failures(tally) else 0)
"""
SHIFTS = """
import pathlib, sys
from tests import fuzz_slides as fuzz
read = fuzz.open_slide
def shifted(path, mpp):
    slide = read(path, mpp)
    level = slide.read_level
    slide.read_level = lambda n, x, y, w, h: level(n, x + 1, y, w, h)
    return slide
fuzz.open_slide = shifted
tally, _, _ = fuzz.run(45, 0, pathlib.Path(sys.argv[1]))
sys.exit(3 if any("differs" in t for t in fuzz.failures(tally).values()) else 0)
"""


@pytest.mark.parametrize("program", [RAISES, SHIFTS], ids=["raises", "shifts"])
def test_a_reader_that_fails_is_noticed(program, tmp_path):
    """The negative control: an exception of another kind, and pixels that differ."""
    done = run("-c", program, str(tmp_path))
    assert done.returncode == 3, done.stderr
