"""What does clipping every unit, and the noise, cost against the same step without privacy?

    python -m benchmarks.clipping --output=benchmarks/results/clipping.jsonl

One local step of one client through the real client update: `nonprivate` sums gradients,
`clipped` clips each unit's, `private` adds the noise; `noise` draws the noise alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from benchmarks import harness
from fedjax_dp.federated.client import client_update
from fedjax_dp.models.layers import default_conv_variant
from fedjax_dp.models.unet import unet
from fedjax_dp.privacy.clipping import clipped_grad
from fedjax_dp.privacy.noise import add_noise
from fedjax_dp.segmentation.objective import segmentation_loss
from fedjax_dp.typing import ClientConstants, ClientKeys, ClientPlan, TilePool

_BATCH = flags.DEFINE_integer("batch", 8, "Units of the step, one tile each.")
_TILE = flags.DEFINE_integer("tile_size", 128, "Side of a tile, pixels.")
_BASE = flags.DEFINE_integer("base_channels", 16, "Channels of the U-Net's first level.")
_DEPTH = flags.DEFINE_integer("depth", 4, "Poolings of the U-Net.")
_MICROBATCH = flags.DEFINE_integer("microbatch_size", 1, "Units computed together.")
_VARIANT = flags.DEFINE_string("conv_variant", "", "See models.layers; empty = the backend's.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed calls of each variant.")
_OUTPUT = flags.DEFINE_string("output", "", "JSON lines file to append to.")


def main(argv: list[str]) -> None:
    """Measures and reports."""
    del argv
    batch, side = _BATCH.value, _TILE.value
    variant = _VARIANT.value or default_conv_variant(jax.default_backend())
    init, apply = unet(2, base_channels=_BASE.value, depth=_DEPTH.value, conv_variant=variant)
    params = init(jax.random.key(0))
    rng = np.random.default_rng(0)
    pool = TilePool(
        jnp.asarray(rng.integers(0, 256, (batch, side, side, 3), dtype=np.uint8)),
        jnp.asarray(rng.integers(0, 2, (batch, side, side), dtype=np.uint8)),
    )
    # Capacity above the draw, as in a real round: empty slots must cost nothing.
    slots = 2 * batch
    plan = ClientPlan(
        np.arange(slots, dtype=np.int32).reshape(1, slots, 1) % batch,
        np.array([batch], np.int32),
        np.ones((1, slots), np.int32),
    )
    keys = ClientKeys(jax.random.key(1), jax.random.key(2))
    loss = segmentation_loss(apply)

    def step(placement: str, noise_stddev: float) -> tuple:
        update = client_update(
            loss, optax.sgd(1.0), placement=placement, microbatch_size=_MICROBATCH.value
        )
        constants = ClientConstants(
            *(np.float32(x) for x in (1.0, 1.0, noise_stddev, 1.0 / batch, 1.0))
        )
        return update, (params, keys, (), constants, plan, pool)

    def unit_loss(params: Any, index: Any, key: Any) -> Any:
        tile_keys = jax.random.fold_in(key, index)[None]
        return loss(params, pool.images[index][None], pool.labels[index][None], 1, tile_keys)

    clip = clipped_grad(unit_loss, microbatch_size=_MICROBATCH.value)
    units = (jnp.arange(batch), jnp.broadcast_to(keys.augmentation, (batch,)))
    records = harness.measure(
        "clipping",
        {
            "nonprivate": step("none", 0.0),
            "clipped": (clip, (params, *units, batch, 1.0)),
            "private": step("dp_sgd", 1.0),
            "noise": (add_noise, (keys.noise, params, 1.0)),
        },
        tiles=batch,
        settings={
            "batch": batch,
            "tile_size": side,
            "base_channels": _BASE.value,
            "depth": _DEPTH.value,
            "microbatch_size": _MICROBATCH.value,
            "conv_variant": variant,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        },
        repeats=_REPEATS.value,
    )
    harness.report(records, _OUTPUT.value, baseline="nonprivate")


if __name__ == "__main__":
    app.run(main)
