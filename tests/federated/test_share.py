"""What one client sends under secure aggregation: its words, its mask, and what one unit moves."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from fedjax_dp.federated import cohort
from fedjax_dp.federated.aggregators import secure_sum
from fedjax_dp.federated.client import client_update
from fedjax_dp.federated.share import masked_share
from fedjax_dp.privacy import noise, quantisation
from fedjax_dp.privacy.fixed_point import FixedPoint, fixed_point
from fedjax_dp.privacy.secure_aggregation import SecureRound, agree
from fedjax_dp.typing import ServerRelease
from tests import oracles
from tests.oracles import (
    GRAY,
    HUGE,
    NAN,
    TINY,
    assert_trees_equal,
    distance,
    exact_products,  # noqa: F401
    flat,
    keyed_loss,
    linear_loss,
    linear_params,
    make_client,
    make_constants,
    make_keys,
    make_plan,
    make_pool,
)

CLIP = 0.5
WORDS = 51  # parameters of `linear_params`
CODE = fixed_point(4 + noise.NOISE_REACH * 2.0, num_clients=5)
LEVELS = 2**12
PLAN = make_plan([[3, 5], [2], [7, 8, 9]], shape=(1, 4, 3))
EMPTY = make_plan(shape=(1, 4, 3))
ROUNDING = 1e-5


@functools.cache
def compiled(
    loss=keyed_loss, size=1, levels=None, loop="drawn", is_adaptive=False, code=CODE
):  # fmt: skip
    step = code.step if levels is None else 1 / levels
    update = masked_share(
        loss, step=step, levels=levels, microbatch_size=size, loop=loop,
        is_adaptive=is_adaptive,
    )  # fmt: skip
    return jax.jit(update)


def some_words(seed=0, size=WORDS):
    return np.random.default_rng(seed).integers(0, 2**32, size, np.uint32)


def share(plan=PLAN, pool=None, *, client=0, mask=None, integers=None, constants=None, **settings):
    """The message, uint32."""
    mask = np.zeros(WORDS, np.uint32) if mask is None else mask
    keys = make_keys(client)._replace(mask=mask)
    if settings.get("levels"):
        zero = np.zeros(WORDS, np.int32)
        keys = keys._replace(integer_noise=zero if integers is None else integers)
    constants = make_constants(**({"clip": CLIP} | (constants or {})))
    pool = make_pool() if pool is None else pool
    words, state, info = compiled(**settings)(linear_params(), keys, (), constants, plan, pool)
    assert state == ()
    assert bool(info.is_finite)
    return np.asarray(words)


def signed(words):
    return np.asarray(words).view(np.int32).astype(np.int64)


def decoded(words, code=CODE):
    return code.decode(np.asarray(words))


def step_of_dp_sgd(loss, constants, plan, pool):
    """The noised sum of the naive loop, in clip norms: `dp_sgd`'s one step of rate one, negated."""
    delta = oracles.client_update(
        loss, optax.sgd(1.0), "dp_sgd", linear_params(), make_keys(), constants, plan, pool
    )
    return -flat(delta) / float(constants.l2_clip_norm)


# --- equality with the loop


@pytest.mark.parametrize("stddev", [0.0, 0.7])
@pytest.mark.parametrize(("size", "loop"), [(1, "drawn"), (3, "drawn"), (4, "capacity")])
def test_a_message_without_its_mask_is_the_noised_sum_of_the_naive_loop(stddev, size, loop):
    """The noise too: a share is one step of "dp_sgd" in words, whatever the microbatch."""
    constants, mask = make_constants(clip=CLIP, stddev=stddev), some_words()
    message = share(mask=mask, constants={"stddev": stddev}, size=size, loop=loop)
    expected = step_of_dp_sgd(keyed_loss, constants, PLAN, make_pool())
    np.testing.assert_allclose(decoded(message - mask), expected, atol=ROUNDING)
    assert np.linalg.norm(expected) > 0.5
    with pytest.raises(AssertionError):  # the mask is really in the message
        np.testing.assert_allclose(decoded(message), expected, atol=ROUNDING)


def test_the_encoding_is_fixed_points_bit_for_bit():
    """Gradients known exactly, between the integers of a code and on its ties.

    Under `linear_loss` a tile's gradient is (value - 128) / 64, and with a clip norm of 16, above
    its norm, a multiple of 2**-10 but for the bias.
    """
    plan, pool = make_plan([[3]], shape=(1, 4, 3)), make_pool()
    gradient = oracles.gradient_of(linear_loss)
    exact = flat(gradient(linear_params(), pool.images[3:4], pool.labels[3:4], 1, None)) / 16
    for exponent in (-9, -14):
        code = FixedPoint(step=2.0**exponent, max_abs=1.0, num_clients=2)
        found = share(plan, pool, loss=linear_loss, code=code, constants={"clip": 16.0})
        np.testing.assert_array_equal(found, code.encode(exact))
        up = np.floor(exact / code.step + 0.5).astype(np.int32).view(np.uint32)
        assert (up != found).any() == (exponent == -9)  # ties are met, and go to the even


def test_noise_is_encoded_as_fixed_point_would():
    key = jax.random.fold_in(make_keys().noise, 0)
    draws = jax.jit(noise.gaussian, static_argnums=1)(key, (WORDS,))
    expected = CODE.encode(np.float32(2.0) * np.asarray(draws))
    found = share(EMPTY, constants={"stddev": 2.0 * CLIP})
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) == WORDS


def test_what_leaves_the_word_comes_back():
    """Modulo 2**32, as exactly as what stays in it: clamped, a share would lose its noise."""
    key = jax.random.fold_in(make_keys().noise, 0)
    draws = jax.jit(noise.gaussian, static_argnums=1)(key, (WORDS,))
    code = FixedPoint(step=2.0**-34, max_abs=2.0**-5, num_clients=2)
    exact = [round(float(draw) * 2.0**35) for draw in np.asarray(draws)]
    assert sum(abs(value) > 2**32 for value in exact) > 40
    found = share(EMPTY, code=code, constants={"stddev": 2.0 * CLIP})
    np.testing.assert_array_equal(found, [value % 2**32 for value in exact])


@pytest.mark.parametrize("level", [64, -64])
def test_the_end_of_the_word_is_met(level):
    """+-2**31 exactly, where a conversion is undefined: gradients of 1/16 in steps of 2**-35."""
    images = np.full((12, 4, 4, 3), GRAY + level, np.uint8)
    pool = make_pool()._replace(images=jnp.asarray(images))
    code = FixedPoint(step=2.0**-35, max_abs=2.0**-6, num_clients=2)
    plan = make_plan([[3]], shape=(1, 4, 3))
    found = share(plan, pool, loss=linear_loss, code=code, constants={"clip": 16.0})
    np.testing.assert_array_equal(found, np.full(WORDS, 2**31, np.uint32))


def test_microbatch_and_loop_change_no_word_of_exact_gradients():
    """Where float32 holds every sum, the words are the same to the bit, noise included."""
    settings = {"loss": linear_loss, "constants": {"clip": 64.0, "stddev": 16.0}}
    first, *others = (
        share(size=size, loop=loop, **settings)
        for size, loop in ((1, "drawn"), (3, "drawn"), (4, "capacity"))
    )
    for other in others:
        np.testing.assert_array_equal(first, other)
    assert (first != share(EMPTY, **settings)).any()


def test_it_does_not_depend_on_the_clip_norm_how_noise_becomes_words():
    """The encoding is in clip norms, or an adapted clip norm would overflow it."""
    small, large = (
        share(EMPTY, constants={"clip": clip, "stddev": 0.5 * clip}) for clip in (2.0**-6, 2.0**9)
    )
    np.testing.assert_array_equal(small, large)


# --- masks, and the sum that is opened


def session(names, **settings):
    def seed(*parts):
        return "/".join(("a secret", *parts)).encode().ljust(32, b".")

    return SecureRound(
        names,
        client_seed=seed,
        pair_seed=lambda u, v: agree(seed(u, v), seed(v, u)),
        num_words=WORDS,
        **settings,
    )


PLANS = (
    PLAN,
    make_plan([[1]], shape=(1, 4, 3)),
    EMPTY,
    make_plan([[4, 6], [0], [10], [11]], shape=(1, 4, 3)),
)


@pytest.mark.parametrize("lost", [(), (0,), (3,)])
@pytest.mark.parametrize("block", [1, 2])
def test_the_opened_sum_is_the_plain_integer_sum(block, lost):
    """Through the blocks of a cohort, the aggregator and secure aggregation, with a dropout."""
    names = [f"site {i}" for i in range(4)]
    secure = session(names, max_dropouts=1)
    present = [i for i in range(4) if i not in lost]
    slots = [
        make_client(PLANS[i], i, clip=CLIP, stddev=0.3, weight=1.0 + i)._replace(
            keys=make_keys_data(i, secure.mask(names[i]))
        )
        for i in present
    ]
    slots += [None] * (len(slots) % block)
    aggregator, visit = visiting(block)
    acc = aggregator.init(linear_params())
    for start in range(0, len(slots), block):
        chunk = cohort.stack_chunk(slots[start : start + block])
        acc, _, _ = visit(acc, linear_params(), chunk, make_pool())
    unmask = secure.unmask([names[i] for i in present])
    plain = [
        share(PLANS[i], client=i, constants={"stddev": 0.3, "weight": 1.0 + i}) for i in present
    ]
    total = sum(signed(words) for words in plain)
    opened = signed(np.asarray(acc) - unmask)
    # A block is compiled otherwise: its float32 sums may differ by a rounding, not by an integer
    # that masks leave behind.
    allowed = 0 if block == 1 else 2**-23 * 16 / CODE.step
    assert np.abs(opened - total).max() <= allowed
    release = ServerRelease(np.float32(3.0), np.float32(CLIP), unmask=unmask)
    mean, centred = aggregator.finish(acc, release)
    np.testing.assert_allclose(flat(mean), -total * CODE.step * CLIP / 3.0, rtol=1e-6, atol=1e-7)
    assert centred == 0
    assert np.abs(signed(acc) - total).max() > 2**20  # not opened, it is noise


def make_keys_data(client, mask):
    return oracles.key_data(client)._replace(mask=mask)


@functools.cache
def visiting(block):
    aggregator = secure_sum(linear_params(), CODE.step)
    update = masked_share(keyed_loss, step=CODE.step)
    visit = cohort.visit_clients(
        update, aggregator, clients_per_block=block, mesh=cohort.client_mesh(1)
    )
    return aggregator, jax.jit(visit)


def test_a_message_shows_nothing_but_its_mask():
    """Bytes of all ranks are uniform; those of the share alone are far from it."""
    secure = [session(["a", "b"], max_dropouts=0) for _ in range(2)]
    assert_trees_equal(secure[0].mask("a"), secure[1].mask("a"))
    masks = [some_words(seed) for seed in range(400)]
    plain = share()
    messages = np.stack([share(mask=mask) for mask in masks])
    for rank in range(4):
        assert uniform(messages >> (8 * rank) & 255)
        assert not uniform((messages - np.stack(masks)) >> (8 * rank) & 255)
    assert (messages - np.stack(masks) == plain).all()
    assert (messages[0] != messages[1]).mean() > 0.99


def uniform(values):
    counts = np.bincount(values.ravel().astype(np.int64), minlength=256)
    return stats.chisquare(counts).pvalue > 1e-6


@pytest.mark.parametrize("levels", [None, LEVELS])
@pytest.mark.parametrize("size", [1, 4])
def test_a_client_that_has_left_returns_exactly_zero(size, levels):
    """Mask and noise included; the mask of a slot that repeats another's would open that one."""
    message = share(
        mask=some_words(),
        integers=np.full(WORDS, 7, np.int32),
        constants={"active": 0.0, "stddev": 3.0},
        size=size,
        levels=levels,
    )
    np.testing.assert_array_equal(message, 0)


def test_an_empty_slot_adds_no_word():
    client = make_client(PLAN, 0, clip=CLIP)._replace(keys=make_keys_data(0, some_words()))
    aggregator, visit = visiting(2)
    acc, _, info = visit(
        aggregator.init(linear_params()), linear_params(), cohort.stack_chunk([client, None]),
        make_pool(),
    )  # fmt: skip
    expected = share(mask=some_words())
    assert np.abs(signed(np.asarray(acc) - expected)).max() <= 2**-23 * 16 / CODE.step
    np.testing.assert_array_equal(info.units.value.units, [3, 0])


# --- the coupled neighbour: same keys, same coins, one unit zeroed out


def opened(plan, pool, **settings):
    """What is opened of this client: its sum, times the clip norm and over a divisor of one."""
    mask = some_words()
    message = share(plan, pool, mask=mask, loss=linear_loss, **settings)
    release = ServerRelease(np.float32(1), np.float32(CLIP), unmask=mask)
    mean, _ = secure_sum(linear_params(), CODE.step).finish(jnp.asarray(message), release)
    return mean


UNITS = make_plan([[5], [3, 4], [6], [7, 8, 9]], shape=(1, 4, 3))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("stddev", [0.0, 0.3])
@pytest.mark.parametrize("gain", [0, HUGE])
def test_one_unit_moves_the_opened_sum_by_the_clip_norm(size, stddev, gain):
    pair = make_pool(gains={3: gain, 4: gain, 6: TINY}), make_pool(gray=(3, 4), gains={6: TINY})
    settings = {"constants": {"stddev": stddev}, "size": size}
    moved = distance(*(opened(UNITS, pool, **settings) for pool in pair))
    assert 0.99 * CLIP <= moved <= CLIP * (1 + ROUNDING), moved


@pytest.mark.parametrize("gain", [TINY, NAN])
def test_a_small_unit_moves_less_and_a_broken_one_nothing(gain):
    pair = make_pool(gains={3: gain, 4: gain}), make_pool(gray=(3, 4))
    moved = distance(*(opened(UNITS, pool, constants={"stddev": 0.3}) for pool in pair))
    assert moved == 0.0


def test_a_unit_that_turns_the_sum_round_moves_no_more():
    def pool(level):
        made = make_pool()
        images = np.array(made.images)
        images[5], images[3], images[6] = GRAY + 40, GRAY + level, GRAY + 40
        return made._replace(images=jnp.asarray(images))

    plan = make_plan([[5], [3], [6]], shape=(1, 4, 3))
    moved = distance(*(opened(plan, pool(level)) for level in (-120, 0)))
    assert 0.99 * CLIP <= moved <= CLIP * (1 + ROUNDING)


def test_the_test_sees_what_is_not_clipped():
    """A clip norm that binds nobody is no clip norm of `CLIP`."""
    pair = make_pool(), make_pool(gray=(3, 4))
    settings = {"loss": linear_loss, "constants": {"clip": 64.0}}
    words = [64.0 * decoded(share(UNITS, pool, **settings)) for pool in pair]
    assert np.linalg.norm(words[0] - words[1]) > 1.5 * CLIP


# --- the discrete path: the same in integers


def integers_of(plan, pool, loss, clip=CLIP):
    """Each unit's quantised gradient by the naive loop, one by one."""
    grad, found = oracles.gradient_of(loss), []
    for slot in range(int(plan.num_units[0])):
        real = int(plan.num_tiles[0, slot])
        tiles = np.asarray(plan.tile_index[0, slot, :real])
        step_key = jax.random.fold_in(make_keys().augmentation, 0)
        keys = jnp.stack([jax.random.fold_in(step_key, int(tile)) for tile in tiles])
        one = grad(linear_params(), pool.images[tiles], pool.labels[tiles], real, keys)
        found.append(LEVELS * flat(oracles.clipped(one, clip)))
    return found


@pytest.mark.parametrize(("size", "loop"), [(1, "drawn"), (3, "drawn"), (4, "capacity")])
def test_the_discrete_message_is_the_sum_of_quantised_units(size, loop):
    mask, integers = some_words(), np.arange(-25, 26, dtype=np.int32) * 10**6
    message = share(mask=mask, integers=integers, levels=LEVELS, size=size, loop=loop)
    found = signed(message - mask) - integers
    units = integers_of(PLAN, make_pool(), keyed_loss)
    # Each unit is off by half an integer of rounding and 2**-18 of headroom.
    assert np.abs(found - sum(units)).max() <= len(units) * (0.5 + LEVELS * 2**-17)
    assert np.linalg.norm(found) > LEVELS / 2


def test_discrete_words_do_not_depend_on_the_microbatch():
    settings = {"loss": linear_loss, "levels": LEVELS, "constants": {"clip": 64.0}}
    first, *others = (share(size=size, **settings) for size in (1, 3, 4))
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("gain", [0, HUGE])
def test_one_unit_moves_the_integers_by_the_stated_norm_exactly(size, gain):
    pair = make_pool(gains={3: gain, 4: gain, 6: TINY}), make_pool(gray=(3, 4), gains={6: TINY})
    words = [
        signed(share(UNITS, pool, loss=linear_loss, levels=LEVELS, size=size)) for pool in pair
    ]
    squared = sum(int(d) ** 2 for d in words[0] - words[1])
    assert squared <= quantisation.integer_l2_sensitivity(LEVELS, WORDS) ** 2
    assert squared >= (0.99 * LEVELS) ** 2


@pytest.mark.parametrize("size", [1, 3])
def test_a_broken_unit_adds_no_integer(size):
    settings = {"loss": linear_loss, "levels": LEVELS, "size": size}
    broken, zero = (
        share(UNITS, pool, **settings)
        for pool in (make_pool(gains={3: NAN}), make_pool(gray=(3, 4)))
    )
    np.testing.assert_array_equal(broken, zero)


def test_an_adaptive_clip_norm_has_no_discrete_path():
    with pytest.raises(ValueError, match=r"fixed clip norm on the discrete path.*gaussian"):
        masked_share(linear_loss, step=1.0, levels=LEVELS, is_adaptive=True)


# --- the count in the last word


def counted(plan, pool, clip=CLIP):
    """The last word, in units."""
    keys = make_keys()._replace(mask=np.zeros(WORDS + 1, np.uint32))
    update = compiled(linear_loss, is_adaptive=True)
    words, _, _ = update(linear_params(), keys, (), make_constants(clip=clip), plan, pool)
    return decoded(words)[-1]


def test_the_last_word_is_the_centred_count_of_units_below_the_clip_norm():
    """Of four units one is far below, one is not finite: (1 - 1/2) - 1/2 - 1/2."""
    pool = make_pool(gains={6: TINY, 3: NAN})
    assert counted(UNITS, pool) == -0.5
    assert counted(EMPTY, pool) == 0.0
    assert counted(UNITS, pool, clip=1e3) == 1.5


def test_the_placement_of_local_steps_is_refused():
    with pytest.raises(ValueError, match=r"for distributed use share.masked_share"):
        client_update(linear_loss, optax.sgd(1.0), placement="distributed")


def test_levels_are_a_clip_norm():
    """A unit at its clip norm has the norm of `levels`, less the headroom."""
    plan = make_plan([[3]], shape=(1, 4, 3))
    words = signed(share(plan, loss=linear_loss, levels=LEVELS))
    assert np.linalg.norm(words) == pytest.approx(LEVELS, abs=math.sqrt(WORDS) / 2 + 1)
