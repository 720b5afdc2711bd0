"""A part of the fuzz runs, in processes of their own: they fork, which nothing with jax may.

The whole is `python -m tests.fuzz_slides` and `python -m tests.fuzz_annotations`.
"""

import ast
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


BLACK = """
import pathlib, sys
from fedjax_dp.data.pyramids import segments
from tests import fuzz_slides as fuzz
segments.WHITE = 0
tally, _, _ = fuzz.run(180, 0, pathlib.Path(sys.argv[1]))
sys.exit(3 if any("differs" in t for t in fuzz.failures(tally).values()) else 0)
"""
UNFILLED = """
import pathlib, sys
from fedjax_dp.data.pyramids import tiff
from tests import fuzz_slides as fuzz
tiff.TiffPyramid._finer = lambda self, number: None
tally, _, _ = fuzz.run(180, 0, pathlib.Path(sys.argv[1]))
bad = fuzz.failures(tally)
sys.exit(3 if bad and all(name.startswith("svs") for name in bad) else 0)
"""
COMPARES_WRONG = """
import pathlib, sys
from tests import fuzz_slides as fuzz
fuzz.missing_pixels = lambda page: 1 / 0
tally, _, _ = fuzz.run(45, 0, pathlib.Path(sys.argv[1]))
bad = fuzz.failures(tally)
sys.exit(3 if any("ZeroDivisionError" in o for t in bad.values() for o in t) else 0)
"""


@pytest.mark.parametrize(
    "program",
    [RAISES, SHIFTS, BLACK, UNFILLED, COMPARES_WRONG],
    ids=["raises", "shifts", "black where white is promised", "unfilled", "compares wrong"],
)
def test_a_reader_that_fails_is_noticed(program, tmp_path):
    """The negative control: another exception, pixels that differ, also where segments lack."""
    done = run("-c", program, str(tmp_path))
    assert done.returncode == 3, done.stderr


DIES = """
import os, sys, time
from tests import fuzzing
def work(number):
    if number in (0, 3):
        os._exit(9)
    if number == 4:
        time.sleep(60)
    if number == 5:
        raise KeyError("five")
    return "read", number == 1
found = list(fuzzing.supervised(work, range(7), seconds=1.0))
print([f[:3] for f in found])
"""


def test_a_process_that_dies_or_hangs_costs_one_file():
    """Also one that dies before its first message, and the last goes on behind them."""
    done = run("-c", DIES)
    assert ast.literal_eval(done.stdout) == [
        (0, "dies (9, 0)", True),
        (1, "read", True),
        (2, "read", False),
        (3, "dies (9, 3)", True),
        (4, "hangs (4)", True),
        (5, "raised KeyError: 'five'", True),
        (6, "read", False),
    ], done.stderr
