"""How sure a difference between two ways of training is."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedjax_dp.segmentation.metrics import ImageCounts, image_scores


class Interval(NamedTuple):
    """A mean and where it may lie: float64 [3], of Dice, Jaccard and accuracy."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def site_means(counts: ImageCounts) -> np.ndarray:
    """Mean over each site's images, float64 [sites with images, 3]."""
    scores = image_scores(counts)
    return np.stack([_mean(scores[counts.site == site]) for site in np.unique(counts.site)])


def headline(counts: ImageCounts) -> np.ndarray:
    """Mean within each site, then over sites: float64 [3], of Dice, Jaccard and accuracy."""
    return _mean(site_means(counts))


def difference(
    ours: Sequence[ImageCounts],
    baseline: Sequence[ImageCounts],
    rng: np.random.Generator,
    *,
    resamples: int = 2000,
    level: float = 0.05,
    relative: bool = False,
) -> Interval:
    """The difference of the headline scores, ours minus the baseline's, over seeds.

    A hierarchical bootstrap (Davison and Hinkley 1997, section 3.8): seeds, sites, and the patients
    within each drawn site (images, where patients are unknown) are drawn anew with replacement, the
    same for both, for both were scored on the same images. Percentile intervals. Few sites make
    them wide, and with fewer than about five somewhat too narrow still.

    Args:
        ours: counts of each seed; all of the same images in the same order.
        baseline: counts of the baseline, of the same seeds in the same order.
        rng: of the resampling.
        resamples: how many.
        level: one minus the coverage.
        relative: as a fraction of the baseline's score.

    Raises:
        ValueError: the two were not scored on the same images, or not of as many seeds.
    """
    if not ours or len(ours) != len(baseline):
        raise ValueError(
            f"Expected as many seeds of both, at least one, got {len(ours)} and {len(baseline)}."
        )
    first = ours[0]
    for other in (*ours, *baseline):
        same = np.array_equal(first.site, other.site) and first.sites == other.sites
        if not same or not np.array_equal(first.patient, other.patient):
            raise ValueError("Expected counts of the same images in the same order, got others.")
    scores = np.stack([[image_scores(c) for c in of] for of in (ours, baseline)])  # [2, S, I, 3]
    groups = _groups(first)

    def contrast(means: np.ndarray) -> np.ndarray:  # [2, 3]
        change = means[0] - means[1]
        return change / means[1] if relative else change

    def headline_of(scores: np.ndarray, chosen: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        of_seeds = scores.mean(1)  # the same images everywhere: seeds may be averaged first
        return _mean(np.stack([_mean(of_seeds[:, np.concatenate(s)], 1) for s in chosen]))

    drawn = []
    for _ in range(resamples):
        seeds = rng.integers(len(ours), size=len(ours))
        sites = [groups[i] for i in rng.integers(len(groups), size=len(groups))]
        chosen = [[s[i] for i in rng.integers(len(s), size=len(s))] for s in sites]
        drawn.append(contrast(headline_of(scores[:, seeds], chosen)))
    low, high = np.nanquantile(drawn, [level / 2, 1 - level / 2], axis=0)
    return Interval(contrast(headline_of(scores, groups)), low, high)


def _groups(counts: ImageCounts) -> list[list[np.ndarray]]:
    """Of each site the images of each patient; an image of unknown patient is a group alone."""
    owner = np.where(counts.patient < 0, -1 - np.arange(len(counts.patient)), counts.patient)
    return [
        [np.flatnonzero((counts.site == site) & (owner == who))
         for who in np.unique(owner[counts.site == site])]
        for site in np.unique(counts.site)
    ]  # fmt: skip


def _mean(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Over what was measured; NaN where nothing was."""
    count = (~np.isnan(values)).sum(axis)
    return np.where(count > 0, np.nansum(values, axis) / np.maximum(count, 1), np.nan)
