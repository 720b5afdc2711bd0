"""Segmenting a slide window by window: exact, in any blocks, stopped and gone on with."""

import json

import numpy as np
import pytest

from fedjax_dp.data.slides import open_slide
from fedjax_dp.data.tissue import TissueMask, everywhere
from fedjax_dp.inference.label_file import LabelFile
from fedjax_dp.inference.sliding_window import FIELD, WindowPlan, segment
from tests.slide_files import write_generic

COLOURS = np.array([(250, 250, 250), (200, 60, 60), (60, 60, 200)], np.int16)


def map_of(height, width, seed=0):
    """Labels in squares of 16, and the picture that shows them."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 3, (-(-height // 16), -(-width // 16)))
    labels = np.kron(coarse, np.ones((16, 16), int))[:height, :width]
    return labels.astype(np.uint8), COLOURS[labels].astype(np.uint8)


def oracle(images):
    """The class whose colour is nearest, almost surely."""
    distance = np.abs(images[..., None, :].astype(np.int16) - COLOURS).sum(-1)
    return np.eye(3, dtype=np.float32)[distance.argmin(-1)] * 0.97 + 0.01


@pytest.fixture
def slide(tmp_path):
    """Of 700 x 611 pixels of half a micrometre; lossless."""
    _, image = map_of(611, 700)
    path = write_generic(tmp_path / "a.tif", image, levels=2, compression="zlib")
    with open_slide(path) as opened:
        yield opened


def run(slide, folder, predict=oracle, tissue=None, block=FIELD, mpp=0.5, **settings):
    plan = WindowPlan(mpp=mpp, window=64, block=block, **settings)
    labels, fields = segment(
        slide,
        predict,
        tissue or everywhere(slide),
        plan,
        folder,
        num_classes=3,
        identity={"model": "oracle"},
    )
    found = labels.read(0, 0, labels.height, labels.width)
    labels.close()
    return found, fields


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_an_oracle_gives_the_mask(slide, overlap, tmp_path):
    found, fields = run(slide, tmp_path / "w", overlap=overlap)
    assert (found == map_of(611, 700)[0]).all()
    assert len(fields) == 4
    assert sum(field.width * field.height for field in fields) == 611 * 700


def test_another_scale(slide, tmp_path):
    found, fields = run(slide, tmp_path / "w", mpp=1.0)
    assert found.shape == (306, 350)
    truth = map_of(611, 700)[0]
    assert (found[:305] == truth[:610:2, ::2]).mean() > 0.998  # of squares of 16
    assert fields[0][:4] == (0, 0, 700, 612)


def smoothed(images):
    """A model that looks at its whole window, so that windows disagree where they overlap."""
    means = images.astype(np.float32).mean((1, 2))[:, None, None]
    score = np.stack([images[..., c].astype(np.float32) - means[..., c] for c in range(3)], -1)
    score = np.exp(score / 40)
    return score / score.sum(-1, keepdims=True)


def test_blocks_change_nothing(slide, tmp_path):
    small, _ = run(slide, tmp_path / "a", smoothed, block=FIELD, overlap=0.5)
    large, _ = run(slide, tmp_path / "b", smoothed, block=4 * FIELD, overlap=0.5)
    assert (small == large).all()
    assert len(np.unique(small)) == 3


def test_windows_at_the_edge_see_mirrored_tissue(slide, tmp_path):
    seen = []
    run(slide, tmp_path / "w", lambda images: (seen.append(images), oracle(images))[1])
    windows = np.concatenate(seen)
    assert (windows.reshape(-1, 3)[:, None] == COLOURS).all(-1).any(-1).all()  # no other white
    first = windows[0]  # begins above and left of the slide
    assert (first[:8] == first[8:16][::-1]).all()
    assert (first[:, :8] == first[:, 8:16][:, ::-1]).all()


def test_only_tissue_is_analysed_and_computed(slide, tmp_path):
    mask = np.zeros((62, 70), bool)
    mask[20:26, 30:37] = True
    tissue = TissueMask(mask, (10.0, 10.0), "painted")
    seen = []
    found, fields = run(
        slide, tmp_path / "w", lambda i: (seen.append(len(i)), oracle(i))[1], tissue
    )
    truth = map_of(611, 700)[0]
    assert (found[200:260, 300:370] == truth[200:260, 300:370]).all()
    found[200:260, 300:370] = 255
    assert (found == 255).all()
    assert len(fields) == 1
    assert sum(seen) <= 9


class Stopped(BaseException):
    """As Ctrl-C."""


def test_a_stopped_call_goes_on(slide, tmp_path):
    whole, fields = run(slide, tmp_path / "whole", smoothed)
    calls = []

    def stopping(images):
        calls.append(len(images))
        if len(calls) in (2, 5):
            raise Stopped
        return smoothed(images)

    for _ in range(2):
        with pytest.raises(Stopped):
            run(slide, tmp_path / "w", stopping)
    found, again = run(slide, tmp_path / "w", stopping)
    assert (found == whole).all()
    assert again == fields
    before = len(calls)
    run(slide, tmp_path / "w", stopping)
    assert len(calls) == before


def test_a_torn_line_does_not_count(slide, tmp_path):
    whole, _ = run(slide, tmp_path / "w")
    journal = tmp_path / "w" / "blocks.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    found, fields = run(slide, tmp_path / "w")
    assert (found == whole).all()
    assert len(fields) == 4
    assert [json.loads(line) for line in journal.read_bytes().splitlines()][-1]["block"] == 3


def test_a_label_map_that_is_gone_is_an_error(slide, tmp_path):
    """Its blocks count as done: without it the slide would come out as not analysed."""
    run(slide, tmp_path / "w")
    (tmp_path / "w" / "labels.raw").unlink()
    with pytest.raises(ValueError, match=r"labels\.raw is gone"):
        run(slide, tmp_path / "w")


def test_a_torn_header_begins_anew(slide, tmp_path):
    whole, _ = run(slide, tmp_path / "w")
    journal = tmp_path / "w" / "blocks.jsonl"
    journal.write_bytes(journal.read_bytes()[:30])
    assert (run(slide, tmp_path / "w")[0] == whole).all()
    assert len(journal.read_bytes().splitlines()) == 5


def test_the_work_of_another_call_is_refused(slide, tmp_path):
    run(slide, tmp_path / "w")
    with pytest.raises(ValueError, match=r"overlap: 0\.25 there, 0\.5 now"):
        run(slide, tmp_path / "w", overlap=0.5)


def test_uncertainty_is_the_mean_entropy(slide, tmp_path):
    flat = lambda images: np.full((*images.shape[:3], 3), 1 / 3, np.float32)  # noqa: E731
    _, fields = run(slide, tmp_path / "w", flat)
    assert [field.uncertainty for field in fields] == pytest.approx([np.log(3)] * 4, abs=1e-5)


class Huge:
    """A slide of 100,000 x 100,000 pixels that is never held."""

    dimensions, mpp, largest = (100_000, 100_000), (0.5, 0.5), 0

    def read_region(self, x, y, width, height, mpp=None):
        self.largest = max(self.largest, width * height)
        return np.full((height, width, 3), COLOURS[1], np.uint8)

    def check_unchanged(self):
        pass


def test_a_huge_slide_is_read_in_small_parts(tmp_path):
    mask = np.zeros((100, 100), bool)
    mask[3, 4] = mask[50, 99] = True
    tissue = TissueMask(mask, (1000.0, 1000.0), "painted")
    slide = Huge()
    plan = WindowPlan(mpp=0.5, window=64)
    labels, fields = segment(slide, oracle, tissue, plan, tmp_path, num_classes=3, identity={})
    assert slide.largest <= 64 * (plan.block + 2 * 64)
    assert (labels.read(3000, 4000, 1000, 1000) == 1).all()
    assert (labels.read(3000, 5000, 1000, 1000) == 255).all()
    assert len(fields) >= 8
    used = (tmp_path / "labels.raw").stat()
    assert used.st_size == 10**10
    assert used.st_blocks * 512 < 50_000_000
    labels.close()


@pytest.mark.parametrize(
    "settings", [{"window": 4}, {"overlap": 0.9}, {"overlap": -0.1}, {"block": 100}]
)
def test_plans_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        WindowPlan(**{"mpp": 0.5, "window": 64, **settings})


def test_label_files(tmp_path):
    labels = LabelFile(tmp_path / "a", 30, 40)
    assert (labels.read(0, 0, 30, 40) == 255).all()
    part = np.arange(50, dtype=np.uint8).reshape(5, 10)
    labels.write(7, 9, part)
    assert (labels.read(7, 9, 5, 10) == part).all()
    assert (labels.read(6, 0, 1, 40) == 255).all()
    labels.write(8, 9, np.full((2, 10), 255, np.uint8))
    assert (labels.read(8, 9, 2, 10) == 255).all()
    labels.write(20, 0, np.zeros((2, 40), np.uint8))
    assert (labels.read(20, 0, 2, 40) == 0).all()
    for wrong in ((25, 0, 10, 40), (0, -1, 3, 3), (0, 35, 3, 10)):
        with pytest.raises(ValueError, match="rectangle"):
            labels.read(*wrong)
    labels.close()
    with pytest.raises(ValueError, match="another"):
        LabelFile(tmp_path / "a", 31, 40)
    with pytest.raises(ValueError, match="pixel"):
        LabelFile(tmp_path / "b", 0, 40)
