"""How good a reconstruction is, and how good a guess is that knows nothing of the victim."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats
from skimage.metrics import structural_similarity


class TileScores(NamedTuple):
    """Scores of B rebuilt tiles against the true ones, float64 [B] each, in the true ones' order.

    Attributes:
        mse: mean squared error of RGB in [0, 1].
        psnr: -10 log10(mse), decibels; inf for equal tiles.
        ssim: structural similarity (Wang et al. 2004) with their Gaussian window.
    """

    mse: np.ndarray
    psnr: np.ndarray
    ssim: np.ndarray


def tile_scores(found: np.ndarray, true: np.ndarray) -> TileScores:
    """Scores of `found` against `true`, [B, H, W, 3] in [0, 1], in any order.

    A message says nothing about the order of its tiles: they are paired so that the sum of squared
    errors is smallest.
    """
    paired = found[pairing(found, true)]
    mse = np.square(paired.astype(np.float64) - true).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        psnr = -10 * np.log10(mse)
    return TileScores(mse, psnr, np.array([_ssim(a, b) for a, b in zip(paired, true, strict=True)]))


def pairing(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Which of `found` is paired with each of `true`, by the smallest total squared error."""
    costs = np.array([[np.square(f.astype(np.float64) - t).mean() for f in found] for t in true])
    return optimize.linear_sum_assignment(costs)[1]


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    return float(
        structural_similarity(
            a.astype(np.float64),
            b.astype(np.float64),
            channel_axis=-1,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def mask_dice(found: np.ndarray, true: np.ndarray) -> float | None:
    """Dice of the foreground of two label maps; None where neither has any."""
    found, true = found > 0, true > 0
    total = int(found.sum()) + int(true.sum())
    return 2 * int((found & true).sum()) / total if total else None


def priors(true: np.ndarray, others: np.ndarray, rng: np.random.Generator) -> dict[str, TileScores]:
    """The scores of guesses that use nothing of the message.

    Args:
        true: [B, H, W, 3] in [0, 1].
        others: [M, H, W, 3], tiles of the same site that are no victims, M >= B.
        rng: draws the random tiles.

    Returns:
        "mean_tile", the pixelwise mean of the others, and "random_tile", B of the others, their
        order free as a reconstruction's is.
    """
    mean = np.broadcast_to(others.mean(0), true.shape)
    random = others[rng.choice(len(others), len(true), replace=False)]
    return {"mean_tile": tile_scores(mean, true), "random_tile": tile_scores(random, true)}


def rank_by_resemblance(found: np.ndarray, candidates: np.ndarray, target: int) -> int:
    """How many candidates resemble a reconstruction at least as much as the target does; 1 = found.

    Resemblance is the correlation of pixels once each channel's mean is taken away, for the
    brightness of a reconstruction is its least certain part.

    Args:
        found: [H, W, 3].
        candidates: [N, H, W, 3].
        target: index of the true tile.
    """

    def centred(tiles: np.ndarray) -> np.ndarray:
        flat = (tiles - tiles.mean((-3, -2), keepdims=True)).reshape(*tiles.shape[:-3], -1)
        return flat / np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-12)

    resemblance = centred(candidates.astype(np.float64)) @ centred(found.astype(np.float64))
    return int((resemblance >= resemblance[target]).sum())


def rank_by_message(observed: np.ndarray, messages: np.ndarray, target: int, count: int) -> int:
    """How many candidates explain a message at least as well as the target does; 1 = found.

    The strongest test of a single candidate there is: for one tile under Gaussian noise it is
    maximum likelihood, with no reconstruction between. The other tiles of a batch are taken to be
    like the mean candidate.

    Args:
        observed: [P], the message of `count` tiles, a mean over them.
        messages: [N, P], that of each candidate alone, without noise.
        target: index of the true tile.
        count: tiles in the observed message, B.
    """
    mean = messages.mean(0)
    own = count * observed.astype(np.float64) - (count - 1) * mean
    distance = np.array([np.square(own - message).sum() for message in messages])
    return int((distance <= distance[target]).sum())


def success(ranks: Sequence[int], level: float = 0.05) -> dict[str, Any]:
    """How often the target came first, with the interval of Clopper and Pearson (1934)."""
    hits = sum(rank == 1 for rank in ranks)
    interval = stats.binomtest(hits, len(ranks)).proportion_ci(1 - level, method="exact")
    return {
        "top1": hits / len(ranks),
        "interval": [float(interval.low), float(interval.high)],
        "trials": len(ranks),
        "mean_rank": float(np.mean(ranks)),
    }
