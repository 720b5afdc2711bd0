"""One step in JAX: ours, private and not, and `jax_privacy` over Flax's own layers.

    python -m benchmarks.peers.clipping --only=private,nonprivate,jax_privacy

Ours is the real client update of `fedjax_dp.federated`, one local step, without augmentation.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.peers import flax_unet
from benchmarks.peers.problem import NUM_CLASSES, NUM_GROUPS, Flat, Problem
from fedjax_dp.federated.client import client_update
from fedjax_dp.models.layers import default_conv_variant
from fedjax_dp.models.unet import unet
from fedjax_dp.segmentation.objective import segmentation_loss
from fedjax_dp.typing import ApplyFn, ClientConstants, ClientKeys, ClientPlan, Params, TilePool


def loss_of(apply: ApplyFn) -> Callable[..., Any]:
    """Our objective without augmentation: what the other libraries compute too."""
    return segmentation_loss(apply, flips=False, rotate=False, hed_jitter=0.0)


def our_network(problem: Problem, conv_variant: str = "") -> ApplyFn:
    """Our U-Net of the problem's sizes; an empty variant is the backend's."""
    _, apply = unet(
        NUM_CLASSES,
        base_channels=problem.sizes.base_channels,
        depth=problem.sizes.depth,
        num_groups=NUM_GROUPS,
        conv_variant=conv_variant or default_conv_variant(jax.default_backend()),  # type: ignore
    )
    return apply


def from_flat(weights: Flat) -> Params:
    """Our parameters from their names joined by slashes."""
    params: Params = {}
    for name, array in weights.items():
        *path, last = name.split("/")
        place = params
        for part in path:
            place = place.setdefault(part, {})
        place[last] = jnp.asarray(array)
    return params


def to_flat(params: Params) -> Flat:
    """The inverse of `from_flat`."""
    leaves, _ = jax.tree.flatten_with_path(params)
    return {"/".join(entry.key for entry in path): np.asarray(leaf) for path, leaf in leaves}


class JaxPeer:
    """A compiled step of one process; `benchmarks.peers.worker.Peer`."""

    def __init__(
        self,
        function: Callable[[Any], Any],
        arguments: tuple[Any, ...],
        read_sum: Callable[[Any], Flat],
        noise_stddev: float,
    ):
        """Compiles.

        Args:
            function: `(noise_stddev, *arguments) -> anything`; the noise is traced, so what is
                checked without it is the program that is timed with it.
            arguments: constant over all steps.
            read_sum: the sum of gradients in what `function` returned without noise.
            noise_stddev: of the timed steps.
        """
        start = time.perf_counter()
        self._arguments = jax.device_put(arguments)
        self._noise_stddev = jnp.float32(noise_stddev)
        self._program = jax.jit(function).lower(self._noise_stddev, *self._arguments).compile()
        self._read_sum = read_sum
        self._compile_seconds = time.perf_counter() - start

    def step(self) -> None:
        """One timed step on this process's tiles."""
        jax.block_until_ready(self._program(self._noise_stddev, *self._arguments))

    def summed(self) -> Flat:
        """The sum of the tiles' gradients, clipped where the step clips, before noise."""
        return self._read_sum(self._program(jnp.float32(0.0), *self._arguments))

    def info(self) -> dict[str, Any]:
        """Compile time and temporary bytes by the program's own analysis."""
        analysis = self._program.memory_analysis()
        return {
            "program_compile_seconds": self._compile_seconds,
            "program_temp_bytes": int(getattr(analysis, "temp_size_in_bytes", 0)),
        }


def ours(
    problem: Problem, *, placement: str, microbatch_size: int = 1, conv_variant: str = ""
) -> JaxPeer:
    """One local step of one client, placement "dp_sgd" or "none"; microbatch 0 is all at once."""
    batch, clip = problem.sizes.batch, problem.sizes.l2_clip_norm
    update = client_update(
        loss_of(our_network(problem, conv_variant)),
        optax.sgd(problem.sizes.learning_rate),
        placement=placement,  # type: ignore[arg-type]
        microbatch_size=microbatch_size or batch,
    )
    # Capacity above the draw, as in a real round.
    slots = 2 * batch
    plan = ClientPlan(
        np.arange(slots, dtype=np.int32).reshape(1, slots, 1) % batch,
        np.array([batch], np.int32),
        np.ones((1, slots), np.int32),
    )

    def step(noise_stddev: Any, params: Params, pool: TilePool, keys: ClientKeys) -> Any:
        fixed = (np.float32(x) for x in (1.0, clip))
        last = (np.float32(x) for x in (1.0 / batch, 1.0))
        constants = ClientConstants(*fixed, noise_stddev, *last)
        model_delta, _, _ = update(params, keys, (), constants, plan, pool)
        return model_delta

    def read_sum(model_delta: Params) -> Flat:
        # A step of SGD is the negative mean, times its rate.
        scale = -batch / problem.sizes.learning_rate
        return {name: scale * leaf for name, leaf in to_flat(model_delta).items()}

    arguments = (
        from_flat(problem.weights),
        TilePool(problem.images, problem.labels),
        ClientKeys(jax.random.key(1), jax.random.key(2)),
    )
    return JaxPeer(step, arguments, read_sum, problem.sizes.noise_multiplier * clip)


def jax_privacy(problem: Problem, *, microbatch_size: int = 0, up: str = "transpose") -> JaxPeer:
    """`jax_privacy.clipped_grad`, its Gaussian privatizer and SGD; microbatch 0 is all at once."""
    import jax_privacy as library

    sizes = problem.sizes
    network = flax_unet.FlaxUNet(
        NUM_CLASSES, base_channels=sizes.base_channels, depth=sizes.depth, up=up
    )
    loss_fn = loss_of(lambda params, images, key: network.apply({"params": params}, images))
    optimizer = optax.sgd(sizes.learning_rate)

    def tile_loss(params: Params, images: Any, labels: Any) -> Any:
        return loss_fn(params, images, labels, 1, jax.random.key(0)[None])

    clipped = library.clipped_grad(
        tile_loss,
        l2_clip_norm=sizes.l2_clip_norm,
        batch_argnums=(1, 2),
        microbatch_size=microbatch_size or None,
    )

    def step(noise_stddev: Any, params: Params, images: Any, labels: Any, key: Any) -> Any:
        privatizer = library.noise_addition.gaussian_privatizer(stddev=noise_stddev, prng_key=key)
        summed = clipped(params, images, labels)
        noised, noise_state = privatizer.update(summed, privatizer.init(params))
        mean = jax.tree.map(lambda leaf: leaf / sizes.batch, noised)
        updates, _ = optimizer.update(mean, optimizer.init(params), params)
        return optax.apply_updates(params, updates), noise_state[0]

    params = flax_unet.from_flat(problem.weights, up)

    def read_sum(result: Any) -> Flat:
        rate = sizes.learning_rate / sizes.batch
        summed = jax.tree.map(lambda old, new: (old - new) / rate, params, result[0])
        return flax_unet.to_flat(summed, up)

    arguments = (params, problem.images, problem.labels, jax.random.key(1))
    return JaxPeer(step, arguments, read_sum, sizes.noise_multiplier * sizes.l2_clip_norm)
