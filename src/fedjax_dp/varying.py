"""Loop carries inside `shard_map`: zeros must vary over the mesh as what is added to them does."""

from typing import Any

import jax
import jax.numpy as jnp


def vary_like(tree: Any, example: Any) -> Any:
    """`tree`, marked as varying over every mesh axis over which a leaf of `example` varies.

    Outside `shard_map` this does nothing; values never change. (The type that would tell is not
    public in JAX, so a zero that depends on the example is added, which the compiler drops.)

    Args:
        tree: pytree of arrays.
        example: pytree of numerical arrays.
    """
    zero = jnp.zeros((), jnp.int32)
    for leaf in jax.tree.leaves(example):
        # `where` rather than a product: the example may hold NaN.
        zero = zero + jnp.where(False, jnp.ravel(leaf)[0].astype(jnp.int32), 0)
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), tree)
