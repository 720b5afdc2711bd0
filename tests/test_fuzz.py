"""A small part of the fuzz runs; the whole is `python -m tests.fuzz_slides` and `.fuzz_annotations`."""

import logging

import pytest

from tests import fuzz_annotations, fuzz_slides

pytestmark = [
    pytest.mark.slow,
    # The files are opened in processes that are forked for their limits; jax is not used there.
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def quiet():
    """tifffile tells of every damaged tag."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_mutated_slides_are_read_or_refused(tmp_path):
    tally, reached, longest = fuzz_slides.run(600, 7, tmp_path)
    assert fuzz_slides.failures(tally) == {}
    assert set(tally) == set(fuzz_slides.BASES)
    assert reached >= 0.3
    assert longest < fuzz_slides.SECONDS


def test_mutated_annotations_are_read_or_refused(tmp_path):
    tally, longest = fuzz_annotations.run(600, 7, tmp_path)
    assert fuzz_annotations.failures(tally) == {}
    assert len(tally) == 6
    assert longest < fuzz_annotations.SECONDS


def test_a_reader_that_fails_is_noticed(tmp_path, monkeypatch):
    """The negative control: an exception of another kind, and pixels that differ."""
    monkeypatch.setattr(fuzz_annotations, "open_labels", lambda *_, **__: 1 / 0)
    tally, _ = fuzz_annotations.run(12, 0, tmp_path)
    assert fuzz_annotations.failures(tally) != {}
    read = fuzz_slides.open_slide

    def shifted(path, mpp):
        slide = read(path, mpp)
        level = slide.read_level
        slide.read_level = lambda n, x, y, w, h: level(n, x + 1, y, w, h)
        return slide

    monkeypatch.setattr(fuzz_slides, "open_slide", shifted)
    tally, _, _ = fuzz_slides.run(45, 0, tmp_path)
    assert any("differs" in outcomes for outcomes in fuzz_slides.failures(tally).values())
