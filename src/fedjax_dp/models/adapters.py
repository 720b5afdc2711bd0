"""Networks of one's own as the pair of pure functions that everything here takes.

A network that keeps statistics of the batch mixes the units of privacy: it is refused.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from fedjax_dp.typing import ApplyFn, Params, PRNGKey


def from_linen(
    module: linen.Module, image_shape: tuple[int, int, int] = (64, 64, 3)
) -> tuple[Callable[[PRNGKey], Params], ApplyFn]:
    """A Flax Linen module, called with images [N, H, W, 3], as (init, apply).

    Args:
        module: draws randomness, if any, from the stream "dropout".
        image_shape: (H, W, 3) of an image it can be started with.

    Returns:
        `init(key) -> params` and `apply(params, images, key) -> logits`.

    Raises:
        ValueError: the module has variables beside its parameters, as batch normalisation has.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    if others := sorted(set(shapes) - {"params"}):
        raise ValueError(_mixes(type(module).__name__, others))

    def init(key: PRNGKey) -> Params:
        return module.init(key, jnp.zeros(images.shape))["params"]

    def apply(params: Params, images: Any, key: Any) -> Any:
        return module.apply({"params": params}, images, rngs={"dropout": key})

    return init, apply


def from_nnx(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Callable[[PRNGKey], Params], ApplyFn]:
    """A Flax NNX module, called with images [N, H, W, 3], as (init, apply).

    Args:
        make: `make(rngs) -> module`, for instance its class with the sizes bound.

    Returns:
        `init(key) -> params` and `apply(params, images, key) -> logits`.

    Raises:
        ValueError: the module has variables beside parameters and random streams.
    """
    shapes = jax.eval_shape(lambda: nnx.state(make(nnx.Rngs(0))))
    kinds = {type(leaf) for leaf in jax.tree.leaves(shapes, is_leaf=_is_variable)}
    if others := sorted(k.__name__ for k in kinds if not issubclass(k, _ALLOWED)):
        raise ValueError(_mixes(getattr(make, "__name__", repr(make)), others))

    def init(key: PRNGKey) -> Params:
        return nnx.state(make(nnx.Rngs(key)), nnx.Param)

    def apply(params: Params, images: Any, key: Any) -> Any:
        module = make(nnx.Rngs(key))
        nnx.update(module, params)
        return module(images)  # type: ignore[operator]

    return init, apply


_ALLOWED = (nnx.Param, nnx.RngState)


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _mixes(name: str, variables: Any) -> str:
    return (
        f"Expected a network whose only variables are parameters, got {name} with {variables}. "
        "Statistics of a batch mix the units of privacy, and no clip of a unit bounds that. Use "
        "group normalisation in place of batch normalisation."
    )
