"""The attacker's idea of a message against the client's own program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_dp.attacks.messages import Sent, one_hot, sent_message, simulated, unit_loss
from fedjax_dp.models.unet import unet


def problem(count=3, size=8):
    init, apply = unet(3, base_channels=4, depth=1, num_groups=2)
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(count, size, size, 3)).astype(np.float32)
    labels = rng.integers(0, 3, (count, size, size)).astype(np.uint8)
    labels[:, :2] = 255
    return unit_loss(apply), init(jax.random.key(0)), images, one_hot(labels, 3)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize(
    "sent",
    [
        Sent(),
        Sent(local_steps=3, learning_rate=0.1),
        Sent(placement="dp_sgd", l2_clip_norm=0.5),
        Sent(placement="dp_sgd", l2_clip_norm=0.5, local_steps=2, learning_rate=0.1),
        Sent(placement="update", l2_clip_norm=0.01, local_steps=2, learning_rate=0.1),
        Sent(placement="update_unclipped", local_steps=2, learning_rate=0.1),
    ],
)
def test_attacker_and_client_agree_without_noise(sent):
    loss, params, images, truth = problem()
    ours = flat(simulated(loss, sent)(params, images, truth))
    theirs = flat(sent_message(loss, sent)(params, images, truth, jax.random.key(1)))
    assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)
    if sent.placement == "update":  # the clip was at work
        assert np.linalg.norm(theirs) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("placement", ["dp_sgd", "update"])
def test_what_is_sent_is_noised_by_the_multiple_of_the_clip(placement):
    loss, params, images, truth = problem()
    sent = Sent(placement=placement, l2_clip_norm=0.5, noise_multiplier=2.0)
    noised = flat(sent_message(loss, sent)(params, images, truth, jax.random.key(1)))
    clean = flat(simulated(loss, sent)(params, images, truth))
    # A sum of three is divided by three; an update is sent as it is.
    stddev = 2.0 * 0.5 / (3 if placement == "dp_sgd" else 1)
    measured = np.std(noised - clean)
    assert abs(measured / stddev - 1) < 5 / np.sqrt(2 * clean.size)


def test_a_message_can_be_differentiated_through_every_step():
    def smooth(params, images, key):  # without kinks, which finite differences step over
        return jnp.tanh(images @ params[0]) @ params[1]

    keys = jax.random.split(jax.random.key(0))
    params = jax.random.normal(keys[0], (3, 4)), jax.random.normal(keys[1], (4, 3))
    _, _, images, truth = problem(count=2)
    message = simulated(unit_loss(smooth), Sent(local_steps=3, learning_rate=0.3))
    direction = np.random.default_rng(1).normal(size=images.shape).astype(np.float32)

    def along(t):
        delta = message(params, images + t * direction, truth)
        return sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(delta))

    slope, small = float(jax.grad(along)(0.0)), 1e-2
    finite = float(along(small) - along(-small)) / (2 * small)
    assert slope == pytest.approx(finite, rel=0.02)


@pytest.mark.parametrize(
    "arguments",
    [
        {"placement": "dp_sgd"},
        {"placement": "none", "l2_clip_norm": 1.0},
        {"noise_multiplier": 1.0},
        {"placement": "update", "l2_clip_norm": 1.0, "noise_multiplier": -1.0},
        {"local_steps": 0},
        {"placement": "central"},
    ],
)
def test_what_no_client_sends_is_refused(arguments):
    with pytest.raises(ValueError, match="Expected"):
        Sent(**arguments)
