"""Scores of reconstructions against their definitions, and guesses that know nothing."""

import numpy as np
import pytest
from skimage import metrics

from fedjax_dp.attacks import scores


def tiles(count, seed=0, size=16):
    return np.random.default_rng(seed).uniform(size=(count, size, size, 3))


def test_scores_are_scikit_image_s():
    true, found = tiles(2), np.clip(tiles(2) + 0.1 * tiles(2, 1), 0, 1)
    ours = scores.tile_scores(found, true)
    for i in range(2):
        assert ours.mse[i] == pytest.approx(metrics.mean_squared_error(true[i], found[i]))
        assert ours.psnr[i] == pytest.approx(
            metrics.peak_signal_noise_ratio(true[i], found[i], data_range=1.0)
        )
        assert ours.ssim[i] == pytest.approx(
            metrics.structural_similarity(
                found[i], true[i], channel_axis=-1, data_range=1.0, gaussian_weights=True,
                sigma=1.5, use_sample_covariance=False,
            )
        )  # fmt: skip


def test_a_perfect_reconstruction_in_any_order_is_perfect():
    true = tiles(4)
    ours = scores.tile_scores(true[[2, 0, 3, 1]], true)
    assert ours.mse.max() == 0
    assert np.isinf(ours.psnr).all()
    assert ours.ssim == pytest.approx(1)


def test_the_pairing_is_the_best_of_all_and_not_each_tile_s_own_best():
    true = np.stack([np.full((2, 2, 3), v) for v in (0.0, 0.5)])
    found = np.stack([np.full((2, 2, 3), v) for v in (0.45, 0.9)])
    # Both true tiles are nearest to the first.
    assert scores.pairing(found, true).tolist() == [0, 1]


def test_mask_dice():
    a, b = np.array([[1, 1, 0, 0]]), np.array([[1, 0, 1, 0]])
    assert scores.mask_dice(a, b) == pytest.approx(0.5)
    assert scores.mask_dice(0 * a, 0 * b) is None


def test_priors_know_nothing_of_the_victim():
    others = tiles(5, 1)
    first = scores.priors(tiles(2), others, np.random.default_rng(0))
    mean = others.mean(0)
    np.testing.assert_allclose(first["mean_tile"].mse, np.square(tiles(2) - mean).mean((1, 2, 3)))
    assert (first["random_tile"].mse > first["mean_tile"].mse).all()


def test_ranks_by_resemblance_see_through_brightness_and_contrast():
    candidates = tiles(20)
    assert scores.rank_by_resemblance(0.3 * candidates[7] + 0.5, candidates, 7) == 1
    worst = scores.rank_by_resemblance(1 - candidates[7], candidates, 7)
    assert worst == 20


def test_a_reconstruction_without_any_structure_names_nobody():
    candidates = tiles(20)
    assert scores.rank_by_resemblance(np.full((16, 16, 3), 0.5), candidates, 7) == 20


def test_ranks_by_message_are_maximum_likelihood():
    rng = np.random.default_rng(0)
    messages = rng.normal(size=(10, 50))
    assert scores.rank_by_message(messages[3] + 0.1 * rng.normal(size=50), messages, 3, 1) == 1
    batch = (messages[3] + rng.normal(size=(3, 50)).sum(0) * 0.1 + 3 * messages.mean(0)) / 4
    assert scores.rank_by_message(batch, messages, 3, 4) == 1
    ranks = [
        scores.rank_by_message(rng.normal(size=50) * 1e3, messages, i % 10, 1) for i in range(500)
    ]
    assert np.mean([rank == 1 for rank in ranks]) == pytest.approx(0.1, abs=0.05)


def test_success_has_the_interval_of_clopper_and_pearson():
    found = scores.success([1, 1, 2, 5])
    assert found["top1"] == 0.5
    assert found["mean_rank"] == pytest.approx(2.25)
    assert found["interval"] == pytest.approx([0.0676, 0.9324], abs=1e-4)  # tables
    assert scores.success([1] * 10)["interval"] == pytest.approx([0.6915, 1.0], abs=1e-4)
