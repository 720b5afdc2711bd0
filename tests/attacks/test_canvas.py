"""What an attack paints with."""

import jax
import numpy as np
import pytest

from fedjax_dp.attacks import canvas

MEAN = np.array([0.7, 0.5, 0.65])


@pytest.mark.parametrize("make", [canvas.pixels, canvas.tissue])
def test_starts_are_tiles_near_the_mean_colour_and_unlike_each_other(make):
    made = make(16, MEAN)
    one, other = (np.asarray(made.paint(made.init(jax.random.key(k)))) for k in (0, 1))
    assert one.shape == (16, 16, 3)
    assert one.min() >= 0
    assert one.max() <= 1
    np.testing.assert_allclose(one.mean((0, 1)), MEAN, atol=0.1)
    assert np.abs(one - other).max() > 0.01


def test_pixels_stay_within_the_range_of_light():
    made = canvas.pixels(4, MEAN)
    assert made.project(np.full((4, 4, 3), 3.0)).max() == 1
    assert made.project(np.full((4, 4, 3), -3.0)).min() == 0


def test_no_variables_of_the_tissue_canvas_leave_the_range_of_light():
    made = canvas.tissue(8, MEAN)
    for scale in (1.0, 100.0, 1e4):
        tile = np.asarray(made.paint(scale * np.random.default_rng(0).normal(size=(8, 8, 3))))
        assert np.isfinite(tile).all()
        assert tile.min() >= 0
        assert tile.max() <= 1


def test_variables_of_zero_paint_the_mean_colour():
    tile = np.asarray(canvas.tissue(8, MEAN).paint(np.zeros((8, 8, 3))))
    np.testing.assert_allclose(tile, np.broadcast_to(MEAN, tile.shape), atol=0.01)


def test_equal_steps_move_low_frequencies_further():
    made = canvas.tissue(32, MEAN, residual=0.0)
    flat = np.asarray(made.paint(np.zeros((32, 32, 3))))
    x = np.arange(32)

    def moved(cycles):
        wave = 3e-3 * np.cos(2 * np.pi * cycles * x / 32)[None, :, None] * np.ones((32, 1, 3))
        return np.sqrt(np.square(np.asarray(made.paint(wave)) - flat).mean())

    assert moved(1) / moved(8) == pytest.approx(8, rel=0.1)
