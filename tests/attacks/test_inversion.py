"""The search itself: distances, and tiles that are found where nothing protects them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_dp.attacks import canvas
from fedjax_dp.attacks.inversion import (
    Attack,
    deep_leakage,
    invert,
    inverting_gradients,
    message_distance,
    total_variation,
)
from fedjax_dp.attacks.messages import Sent, one_hot, sent_message, simulated, unit_loss
from fedjax_dp.models.unet import unet

MEAN = np.array([0.6, 0.45, 0.6])


def messages(seed):
    rng = np.random.default_rng(seed)
    return {"a": rng.normal(size=(3, 2)).astype(np.float32), "b": rng.normal(size=4).astype("f4")}


def test_squared_distance_is_relative_to_the_message_seen():
    a, b = messages(0), messages(1)
    flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(m)]) for m in (a, b)]
    expected = np.square(flat[0] - flat[1]).sum() / np.square(flat[1]).sum()
    assert float(message_distance("squared", a, b)) == pytest.approx(expected, rel=1e-5)
    cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert float(message_distance("cosine", a, b)) == pytest.approx(1 - cosine, rel=1e-5)


def test_cosine_does_not_see_a_clip():
    a, b = messages(0), messages(1)
    scaled = jax.tree.map(lambda leaf: 1e-3 * leaf, b)
    assert float(message_distance("cosine", a, b)) == pytest.approx(
        float(message_distance("cosine", a, scaled)), rel=1e-4
    )


@pytest.mark.parametrize("kind", ["squared", "cosine"])
def test_a_message_of_zeros_gives_finite_distances_and_slopes(kind):
    zero = jax.tree.map(np.zeros_like, messages(0))
    for ours in (zero, messages(1)):
        value, grad = jax.value_and_grad(lambda m: message_distance(kind, m, zero))(ours)
        assert np.isfinite(value)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grad))


def test_total_variation_is_the_mean_step_between_neighbours():
    steps = np.zeros((4, 4, 3))
    steps[:, 2:] = 1.0
    assert float(total_variation(jnp.asarray(steps))) == pytest.approx(1 / 3)


def linear(params, images, key):
    """Convolutions alone: what a message says of a tile is then nearly all of it."""
    del key
    dimensions = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        images, params[0], (1, 1), "SAME", dimension_numbers=dimensions
    )
    return jnp.tanh(x) @ params[1]


def problem(victims=2, count=1, size=8):
    keys = jax.random.split(jax.random.key(3))
    params = 0.3 * jax.random.normal(keys[0], (3, 3, 3, 24)), jax.random.normal(keys[1], (24, 2))
    rng = np.random.default_rng(0)
    smooth = rng.normal(size=(victims, count, 3, 3, 3))
    tiles = np.asarray(jax.image.resize(smooth, (victims, count, size, size, 3), "cubic"))
    tiles = np.clip(MEAN + 0.12 * tiles, 0, 1).astype(np.float32)
    labels = (tiles[..., 0] > MEAN[0]).astype(np.uint8)
    return params, tiles, labels


def attacked(attack, sent=None, painted=canvas.tissue, **size):
    sent = Sent() if sent is None else sent
    params, tiles, labels = problem(**size)
    truth = np.asarray(one_hot(labels, 2))
    send = sent_message(unit_loss(linear), sent)
    seen = [
        send(params, t, m, jax.random.key(i))
        for i, (t, m) in enumerate(zip(tiles, truth, strict=True))
    ]
    observed = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen)
    found = invert(
        simulated(unit_loss(linear), sent),
        painted(tiles.shape[2], MEAN),
        attack,
        params,
        observed,
        truth,
        jax.random.key(0),
        one_by_one=sent.local_steps > 1,
    )
    return found, tiles, labels


def error(found, tiles):
    return np.square(found.images - tiles).mean((1, 2, 3, 4))


def prior(tiles):
    return np.square(MEAN - tiles).mean((1, 2, 3, 4))


@pytest.mark.parametrize("restarts", [1, 2])
def test_unprotected_tiles_are_rebuilt(restarts):
    found, tiles, _ = attacked(Attack(steps=600, total_variation=0.0, restarts=restarts))
    assert (error(found, tiles) < 0.4 * prior(tiles)).all()
    assert found.objectives.shape == (2, restarts)
    np.testing.assert_array_equal(found.objective, found.objectives.min(1))


@pytest.mark.parametrize("make", [deep_leakage, inverting_gradients])
def test_published_attacks_bring_the_messages_together(make):
    few, many = (
        attacked(dataclasses.replace(make(), steps=steps), painted=canvas.pixels)[0]
        for steps in (1, 400)
    )
    assert (many.objective < 0.5 * few.objective).all()


def test_noise_hides_the_tiles():
    sent = Sent(placement="dp_sgd", l2_clip_norm=0.5, noise_multiplier=1.0)
    found, tiles, _ = attacked(Attack(steps=300), sent)
    assert (error(found, tiles) > 0.5 * prior(tiles)).all()


@pytest.mark.parametrize(
    "sent",
    [
        Sent(placement="dp_sgd", l2_clip_norm=0.1),
        Sent(local_steps=3, learning_rate=0.05),
        Sent(placement="update", l2_clip_norm=1e-3, local_steps=2, learning_rate=0.05),
    ],
)
def test_a_clip_or_local_steps_alone_do_not_hide_them(sent):
    found, tiles, _ = attacked(Attack(steps=600, total_variation=0.0), sent)
    assert (error(found, tiles) < 0.4 * prior(tiles)).all()


def of_unet(attack):
    """A U-Net's message, attacked; its tiles have 16 pixels."""
    width = attack.kink_width
    init, apply = unet(2, base_channels=16, depth=1, conv_variant="matmul", kink_width=width)
    params = init(jax.random.key(0))
    _, tiles, labels = problem(size=16)
    truth = np.asarray(one_hot(labels, 2))
    message = simulated(unit_loss(apply), Sent())
    observed = jax.jit(jax.vmap(message, (None, 0, 0)))(params, tiles, truth)
    made = canvas.tissue(16, MEAN)
    found = invert(message, made, attack, params, observed, truth, jax.random.key(0))
    return found, tiles, labels


def test_a_mask_that_is_not_known_is_searched_too():
    found, _, labels = of_unet(Attack(steps=500, mask="joint"))
    assert (found.truth.argmax(-1) == labels).mean() > 0.65  # one class alone: 0.52
    np.testing.assert_allclose(found.truth.sum(-1), 1.0, rtol=1e-5)


def test_smooth_kinks_rebuild_what_plain_ones_do_not():
    smooth, tiles, _ = of_unet(Attack(steps=500))
    plain, _, _ = of_unet(Attack(steps=500, kink_width=0.0))
    assert (smooth.objective < 0.7 * plain.objective).all()
    assert (error(smooth, tiles) < 0.6 * prior(tiles)).all()


@pytest.mark.parametrize(
    "arguments",
    [{"distance": "l1"}, {"canvas": "oil"}, {"steps": 0}, {"restarts": 0}, {"mask": "none"},
     {"learning_rate": 0.0}, {"total_variation": -1.0}, {"kink_width": -0.1}],
)  # fmt: skip
def test_an_attack_that_is_none_is_refused(arguments):
    with pytest.raises(ValueError, match="Expected"):
        Attack(**arguments)
