"""Evaluation counts every pixel of every tile once, whatever the batch, and compiles once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_dp.data.tiles import IGNORE_INDEX, TileTable
from fedjax_dp.evaluation import Evaluator
from fedjax_dp.federated import cohort
from fedjax_dp.segmentation.metrics import count_pixels

SIZE, CLASSES = 8, 3


def apply(params, images, key):
    """Class scores from a pixel's own colour."""
    del key
    return images @ params


@pytest.fixture(scope="module")
def params():
    return jax.device_put(
        jnp.asarray(np.random.default_rng(0).normal(size=(3, CLASSES)), jnp.float32),
        cohort.replicated(cohort.client_mesh(1)),
    )


def evaluator(params, batch_size):
    return Evaluator(
        apply, params, tile_size=SIZE, batch_size=batch_size, mesh=cohort.client_mesh(1)
    )


def table(count):
    rng = np.random.default_rng(count)
    labels = rng.integers(0, CLASSES, (count, SIZE, SIZE), np.uint8)
    labels[:, :2] = IGNORE_INDEX
    owner = np.zeros(count, np.int32)
    return TileTable(
        images=rng.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8),
        labels=labels,
        site=owner, slide=owner, patient=owner, sites=("s",), slides=("i",), patients=("p",),
    )  # fmt: skip


def naive(params, images):
    scores = images.astype(np.float32) / np.float32(255) @ np.asarray(params)
    return scores.argmax(-1).astype(np.uint8)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_counts_are_those_of_a_loop_over_tiles(params, batch_size):
    tiles = table(7)
    ticks = []
    counts = evaluator(params, batch_size).confusions(params, tiles, tick=lambda: ticks.append(1))
    assert counts.dtype == np.int64
    assert len(ticks) == -(-7 // batch_size)
    for count, image, labels in zip(counts, tiles.images, tiles.labels, strict=True):
        np.testing.assert_array_equal(count, count_pixels(naive(params, image), labels, CLASSES))
        assert count.sum() == (SIZE - 2) * SIZE  # ignored pixels and padded tiles count nowhere


def test_predictions_are_those_of_the_model(params):
    images = table(5).images
    predicted = evaluator(params, 4).predictions(params, images)
    assert predicted.dtype == np.uint8
    np.testing.assert_array_equal(predicted, naive(params, images))
    assert len(np.unique(predicted)) > 1


def test_no_tiles_are_no_counts(params):
    made = evaluator(params, 4)
    assert made.confusions(params, table(0)).shape[0] == 0
    assert made.predictions(params, table(0).images).shape == (0, SIZE, SIZE)


def test_a_batch_of_none_is_a_batch_of_one(params):
    assert evaluator(params, 0).batch_size == 1


def test_one_program_serves_every_split(params):
    made = evaluator(params, 4)
    made.confusions(params, table(4))  # whatever else is compiled once
    compiles = []

    def note(event, *_, **__):
        if "backend_compile" in event:
            compiles.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    for count in (1, 2, 9):
        made.confusions(params, table(count))
        made.predictions(params, table(count).images)
    assert compiles == []
    evaluator(params, 5)
    assert compiles != []  # the listener hears
