"""A network of one's own becomes pure functions, and one that mixes units is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from fedjax_dp.models.adapters import from_linen, from_nnx

IMAGES = np.random.default_rng(0).random((3, 8, 8, 3), np.float32)


class Linen(linen.Module):
    norm: str = "group"
    dropout: float = 0.0

    @linen.compact
    def __call__(self, images):
        x = linen.Conv(4, (3, 3))(images)
        if self.norm == "batch":
            x = linen.BatchNorm(use_running_average=False)(x)
        else:
            x = linen.GroupNorm(2)(x)
        return linen.Dropout(self.dropout, deterministic=False)(x)


class Nnx(nnx.Module):
    def __init__(self, rngs, *, norm="group", dropout=0.0):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        kinds = {"group": functools.partial(nnx.GroupNorm, num_groups=2), "batch": nnx.BatchNorm}
        self.norm = kinds[norm](4, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, images):
        return self.dropout(self.norm(self.conv(images)))


def networks(**settings):
    yield from_linen(Linen(**settings), (8, 8, 3))
    yield from_nnx(functools.partial(Nnx, **settings))


def test_a_network_with_group_normalisation_is_two_pure_functions():
    for init, apply in networks():
        params = init(jax.random.key(0))
        logits = jax.jit(apply)(params, IMAGES, jax.random.key(1))
        assert logits.shape == (3, 8, 8, 4)
        # Every image by itself: what one gives does not depend on the others.
        alone = jnp.concatenate([apply(params, image[None], jax.random.key(1)) for image in IMAGES])
        np.testing.assert_allclose(logits, alone, rtol=1e-5, atol=1e-5)
        gradient = jax.grad(lambda p, f=apply: f(p, IMAGES, jax.random.key(1)).sum())(params)
        moved = optax.apply_updates(params, gradient)
        assert jax.tree.structure(moved) == jax.tree.structure(params)


def test_parameters_and_randomness_follow_their_keys():
    for init, apply in networks(dropout=0.5):
        first, again, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
        same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), first, again)
        assert all(jax.tree.leaves(same))
        assert not all(
            bool(jnp.array_equal(a, b))
            for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
        )
        drawn = [apply(first, IMAGES, jax.random.key(seed)) for seed in (2, 2, 3)]
        np.testing.assert_array_equal(drawn[0], drawn[1])
        assert not np.array_equal(drawn[0], drawn[2])


@pytest.mark.parametrize("which", [0, 1])
def test_batch_normalisation_is_refused(which):
    makers = (
        lambda: from_linen(Linen(norm="batch"), (8, 8, 3)),
        lambda: from_nnx(functools.partial(Nnx, norm="batch")),
    )
    with pytest.raises(ValueError, match="mix the units of privacy"):
        makers[which]()
