"""The real client step on two neighbouring data sets: same keys, same coins, one unit zeroed out.

The noise cancels, so the difference of what is released is what the accountant calls sensitivity:
it must not exceed the stated one, and an adversary's unit must come near it, or the test is blind.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_dp.data.tiles import IGNORE_INDEX
from fedjax_dp.federated.client import client_update
from fedjax_dp.privacy.mechanism import Mechanism
from fedjax_dp.segmentation.objective import segmentation_loss
from fedjax_dp.typing import TilePool
from tests import oracles
from tests.federated import two_devices
from tests.oracles import (
    GRAY,
    HUGE,
    NAN,
    TINY,
    assert_trees_equal,
    distance,
    exact_products,  # noqa: F401
    linear_loss,
    linear_params,
    make_constants,
    make_keys,
    make_plan,
    make_pool,
    norm,
)

CLIP = 0.5
ROUNDING = 1e-5


@functools.cache
def compiled(placement, size=1, loss=linear_loss):
    """Plain steps of rate one: the delta is minus the sum of what the steps released."""
    update = client_update(loss, optax.sgd(1.0), placement=placement, microbatch_size=size)
    return jax.jit(update)


def release(placement, plan, pool, *, size=1, clip=CLIP, z=0.3, loss=linear_loss, params=None):
    """The delta, with the noise that the mechanism asks for and everything public at one."""
    params = linear_params() if params is None else params
    constants = make_constants(clip=clip, stddev=z * clip)
    return compiled(placement, size, loss)(params, make_keys(), (), constants, plan, pool)[0]


def sensitivity(placement, name, clip=CLIP):
    """What the mechanism states, in the row `name`."""
    mechanism = Mechanism(
        placement=placement,
        unit="slide",
        num_units=8,
        sampling_prob=0.5,
        capacity=8,
        local_steps=1,
        l2_clip_norm=clip,
        noise_multiplier=1.0,
    )
    return next(row.sensitivity for row in mechanism.guarantees() if row.name == name)


def assert_within(moved, bound, *, near):
    """`moved` does not exceed `bound`, and where `near`, an adversary comes close to it."""
    assert moved <= bound * (1 + ROUNDING), (moved, bound)
    if near:
        assert moved >= 0.99 * bound, (moved, bound)


# --- dp_sgd: the sum of one step moves by at most C


# Units 3 and 5 are clipped, 6 is far below the clip, the unit (7, 8, 9) has several tiles.
OTHERS = [[5], [6], [7, 8, 9]]
GAINS = {6: TINY}


def moved_by(unit, *, size=1, others=OTHERS, gains=None, placement="dp_sgd", zeroed=None):
    """How far zeroing `unit` moves the delta of one step; the unit stands between the others."""
    plan = make_plan([others[0], unit, *others[1:]] if others else [unit])
    gains = GAINS | (gains or {})
    pair = (
        make_pool(gains=gains),
        make_pool(gray=unit if zeroed is None else zeroed, gains=GAINS),
    )
    return distance(*(release(placement, plan, pool, size=size) for pool in pair))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("unit", [[3], [3, 4], [3, 4, 10]])
def test_one_unit_moves_a_step_by_the_stated_sensitivity(unit, size):
    assert_within(moved_by(unit, size=size), sensitivity("dp_sgd", "slide"), near=True)


def flat_pool(levels):
    """Tiles of one value each, `GRAY + level`: parallel and opposite gradients."""
    pool = make_pool()
    images = np.array(pool.images)
    for tile, level in levels.items():
        images[tile] = GRAY + level
    return TilePool(jnp.asarray(images), pool.labels)


@pytest.mark.parametrize("size", [1, 3])
def test_a_unit_against_all_others_moves_no_more(size):
    """It turns their sum round: clipping the sum instead of the units would move by twice."""
    plan = make_plan([[5], [3], [6]])
    pair = flat_pool({5: 40, 3: -120, 6: 40}), flat_pool({5: 40, 3: 0, 6: 40})
    moved = distance(*(release("dp_sgd", plan, pool, size=size) for pool in pair))
    assert_within(moved, sensitivity("dp_sgd", "slide"), near=True)


@pytest.mark.parametrize("size", [1, 3])
def test_a_huge_unit_moves_no_more_and_a_small_or_broken_one_less(size):
    bound = sensitivity("dp_sgd", "slide")
    assert_within(moved_by([3, 4], size=size, gains={3: HUGE, 4: HUGE}), bound, near=True)
    assert moved_by([3], size=size, gains={3: TINY}) < 1e-6 * bound
    assert moved_by([3, 4], size=size, gains={3: NAN}) == 0.0


def test_a_single_unit_moves_an_otherwise_empty_step_by_the_stated_sensitivity():
    assert_within(moved_by([3], others=[]), sensitivity("dp_sgd", "slide"), near=True)


@pytest.mark.parametrize("placement", ["dp_sgd", "update"])
def test_a_unit_that_is_not_drawn_moves_nothing(placement):
    """Not a bit of it, also in an empty draw, and also where it is the padding's tile 0."""
    pools = make_pool(), make_pool(gray=[0]), make_pool(gains={0: NAN})
    for plan in (make_plan(), make_plan([[3, 4], [5]], [], [[6]])):
        first, *others = (release(placement, plan, pool, size=3) for pool in pools)
        for other in others:
            assert_trees_equal(first, other)


def test_a_unit_drawn_in_several_steps_moves_each_by_the_stated_sensitivity():
    """Under a linear loss the steps do not interact, so their differences add up."""
    plan = make_plan([[3], [5]], [[6]], [[3]])
    pair = make_pool(), make_pool(gray=[3])
    moved = distance(*(release("dp_sgd", plan, pool) for pool in pair))
    assert_within(moved, 2 * sensitivity("dp_sgd", "slide"), near=True)


def test_replacing_a_tile_of_a_unit_moves_twice_as_much():
    """Why a patient's guarantee is not its tiles' one: the clipped unit turns round."""
    pool = make_pool()
    images = np.array(pool.images)
    images[3], images[4] = GRAY + 30, GRAY + 30
    turned = images.copy()
    turned[4] = GRAY - 100
    plan = make_plan([[3, 4], [5]])
    pair = [TilePool(jnp.asarray(x), pool.labels) for x in (images, turned)]
    moved = distance(*(release("dp_sgd", plan, pool) for pool in pair))
    assert_within(moved, 2 * CLIP, near=True)
    assert moved > 1.5 * sensitivity("dp_sgd", "slide")


def test_the_test_sees_what_is_not_clipped():
    with pytest.raises(AssertionError):
        assert_within(moved_by([3], placement="none"), CLIP, near=False)


# --- the same through the segmentation loss


@functools.cache
def segmentation():
    params, apply = oracles.tiny_network()
    loss = segmentation_loss(apply, multiplicity=2, hed_jitter=0.0)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
    labels = rng.integers(0, 2, (8, 8, 8)).astype(np.uint8)
    return params, loss, images, labels


@pytest.mark.parametrize("clip", [1e-3, 0.2, 10.0])
def test_a_unit_of_augmented_tiles_moves_a_step_by_the_stated_sensitivity(clip):
    """Zeroed out by labels that are all ignored: then the loss and its gradient are zero."""
    params, loss, images, labels = segmentation()
    blank = labels.copy()
    blank[[3, 4]] = IGNORE_INDEX
    plan = make_plan([[5, 6], [3, 4], [7]], shape=(1, 4, 3))
    pair = [
        release("dp_sgd", plan, pool, clip=clip, loss=loss, params=params, z=0.01)
        for pool in (TilePool(images, labels), TilePool(images, blank))
    ]
    bound = sensitivity("dp_sgd", "slide", clip)
    assert_within(distance(*pair), bound, near=clip < 0.1)
    assert distance(*pair) > 0.01 * min(bound, 1.0)


# --- update: what is released moves by at most S for the client, 2 S for a record


@pytest.mark.parametrize("size", [1, 3])
def test_a_record_moves_the_update_by_at_most_twice_the_clip(size):
    """Adversarially by all of it: the record turns the client's update round."""
    plan = make_plan([[5], [3]])
    pair = flat_pool({5: 40, 3: -120}), flat_pool({5: 40, 3: 0})
    moved = distance(*(release("update", plan, pool, size=size) for pool in pair))
    assert_within(moved, sensitivity("update", "record_slide"), near=True)
    assert moved > 1.5 * sensitivity("update", "client")


def test_zeroing_a_client_moves_the_update_by_at_most_the_clip():
    plan = make_plan([[5, 6], [3]], [], [[7, 8, 9]])
    pair = make_pool(gains={3: HUGE}), make_pool(gray=range(12))
    moved = distance(*(release("update", plan, pool) for pool in pair))
    assert_within(moved, sensitivity("update", "client"), near=True)


def test_replacing_a_client_moves_the_update_by_at_most_twice_the_clip():
    plan = make_plan([[5], [3]])
    pair = flat_pool({5: 40, 3: 20}), flat_pool({5: -70, 3: -1})
    moved = distance(*(release("update", plan, pool) for pool in pair))
    assert_within(moved, sensitivity("update", "client_replace"), near=True)


@pytest.mark.parametrize("gain", [TINY, NAN])
def test_records_that_hardly_count_or_are_not_finite_stay_within_the_bound(gain):
    plan = make_plan([[5], [3]], [[3, 4]])
    pair = make_pool(gains={3: gain}), make_pool(gray=[3])
    moved = distance(*(release("update", plan, pool) for pool in pair))
    assert_within(moved, sensitivity("update", "record_slide"), near=False)


# --- the noise really cancels above, and really is there


@pytest.mark.parametrize("placement", ["dp_sgd", "update"])
def test_what_is_released_holds_the_noise(placement):
    plan, pool = make_plan([[3], [5]]), make_pool()
    noise = distance(release(placement, plan, pool, z=100.0), release(placement, plan, pool, z=0.0))
    steps = 3 if placement == "dp_sgd" else 1
    size = norm(jax.tree.map(np.ones_like, linear_params()))
    np.testing.assert_allclose(noise, 100 * CLIP * size * np.sqrt(steps), rtol=0.3)


# --- two devices


@functools.cache
def results_on_two_devices():
    root = pathlib.Path(__file__).resolve().parents[2]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutants", two_devices.__name__],
        cwd=root,
        env=os.environ | flags,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("check", [check.__name__ for check in two_devices.CHECKS])
def test_on_two_devices(check):
    """Each client's clipped delta equals the loop's, and without the cast it would not."""
    assert results_on_two_devices()[check] == ""
