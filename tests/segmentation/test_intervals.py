"""Intervals of differences: what they are of, and that they cover."""

import numpy as np
import pytest

from fedjax_dp.segmentation import intervals
from fedjax_dp.segmentation.metrics import ImageCounts


def counts(dices, site=None, patient=None):
    """Images of 100 pixels, half of them foreground, with about these Dice scores."""
    dices = np.asarray(dices, float)
    hits = np.round(50 * dices).astype(int)  # as many missed as called falsely
    confusions = np.stack([[[50 - (50 - h), 50 - h], [50 - h, h]] for h in hits])
    site = np.zeros(len(dices), int) if site is None else np.asarray(site)
    patient = np.full(len(dices), -1) if patient is None else np.asarray(patient)
    return ImageCounts(confusions, site, patient, tuple("abcd"[: site.max() + 1]))


def test_the_headline_is_the_mean_within_sites_then_over_sites():
    one = counts([0.8, 0.6, 0.2], site=[0, 0, 1])
    assert intervals.headline(one)[0] == pytest.approx((0.7 + 0.2) / 2)


def test_a_constant_difference_has_no_width():
    ours, theirs = counts([0.6, 0.5, 0.7]), counts([0.8, 0.7, 0.9])
    found = intervals.difference([ours], [theirs], np.random.default_rng(0), resamples=50)
    for part in found:
        assert part[0] == pytest.approx(-0.2)


def test_relative_differences_are_fractions_of_the_baseline():
    found = intervals.difference(
        [counts([0.6])], [counts([0.8])], np.random.default_rng(0), resamples=10, relative=True
    )
    assert found.mean[0] == pytest.approx(-0.25)


def test_images_of_one_patient_are_drawn_together():
    """Ten images of one patient say as much as one image."""
    scores = np.repeat([0.9, 0.5], 10)
    base = counts(np.full(20, 0.7))
    alone = intervals.difference([counts(scores)], [base], np.random.default_rng(0), resamples=400)
    of_two = counts(scores, patient=np.repeat([0, 1], 10))
    together = intervals.difference(
        [of_two], [base._replace(patient=of_two.patient)], np.random.default_rng(0), resamples=400
    )
    assert together.high[0] - together.low[0] > 2 * (alone.high[0] - alone.low[0])


def test_seeds_widen_the_interval():
    same = [counts([0.7, 0.7])] * 3
    unlike = [counts([0.5, 0.5]), counts([0.7, 0.7]), counts([0.9, 0.9])]
    base = [counts([0.7, 0.7])] * 3
    rng = np.random.default_rng(0)
    assert intervals.difference(same, base, rng, resamples=50).high[0] == pytest.approx(0)
    found = intervals.difference(unlike, base, rng, resamples=200)
    assert found.low[0] < -0.05
    assert found.high[0] > 0.05


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        effect = rng.normal(0.05, 0.1, 40)  # per image, unknown patients, one site
        base = np.full(40, 0.5)
        found = intervals.difference([counts(base + effect)], [counts(base)], rng, resamples=200)
        hits += found.low[0] <= 0.05 <= found.high[0]
    assert 86 <= hits <= 100


def test_counts_of_other_images_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="same images"):
        intervals.difference([counts([0.5, 0.6])], [counts([0.5])], rng)
    with pytest.raises(ValueError, match="as many seeds"):
        intervals.difference([counts([0.5])], [], rng)
