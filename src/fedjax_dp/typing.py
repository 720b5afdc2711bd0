"""The dictionary of the device side: what is passed between host, client and server.

Axis letters: C clients, S local steps, U units of privacy, T tiles of a unit, H W pixels,
K classes, N tiles in the pool.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Key, PyTree, UInt8

Params = PyTree
"""A pytree of floating-point arrays: parameters, gradients and model deltas alike."""

PRNGKey = Key[Array, ""]
"""A typed threefry key."""

ApplyFn = Callable[[Params, Any, Any], Any]
"""`apply(params, images [B, H, W, 3], key) -> logits [B, H, W, K]`, a pure function."""

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NonPrivate(Generic[T]):
    """A value computed from private data without noise.

    Only logging under `nonprivate/` may unwrap it; nothing that is released, and nothing that
    steers training, may depend on it.
    """

    value: T


class TilePool(NamedTuple):
    """All tiles a program may visit, on the device once; plans refer to them by index."""

    images: Any  # uint8 [N, H, W, 3]
    labels: Any  # uint8 [N, H, W], 255 = ignore
    tile_id: Any = ()  # int32 [N], numbers that augmentation keys are folded with; () = the index


class ClientPools(NamedTuple):
    """Of each client of a chunk the tiles its plan names, and no others; its plan indexes them."""

    images: Any  # uint8 [C, N, H, W, 3], zero where there is no tile
    labels: Any  # uint8 [C, N, H, W]
    tile_id: Any  # int32 [C, N], numbers in the training table, ascending; -1 where there is none


class ClientPlan(NamedTuple):
    """Which tiles one client visits in one round: indices into the pool, real ones first."""

    tile_index: Any  # int32 [S, U, T]
    num_units: Any  # int32 [S]: units really drawn, the rest is padding
    num_tiles: Any  # int32 [S, U]: tiles of each unit, the rest is padding


class ClientKeys(NamedTuple):
    """One client's randomness of one round, apart by purpose; keys are folded by step and tile."""

    noise: Any
    augmentation: Any
    mask: Any = ()  # uint32 [M], hides the message under secure aggregation; () elsewhere
    integer_noise: Any = ()  # int32 [M], the client's share on the discrete path; () elsewhere


class ClientConstants(NamedTuple):
    """Public numbers of one client, traced, so unlike sites share one program; float32 but site."""

    weight: Any  # in the server's average; zero for a site that has left
    l2_clip_norm: Any  # of a unit's gradient (dp_sgd) or of the update (update)
    noise_stddev: Any  # absolute: noise multiplier times the sensitivity
    inverse_expected_batch_size: Any
    is_active: Any  # 0.0 or 1.0: a site that has left makes no step
    count_noise_stddev: Any = np.float32(0)  # of the count that adapts the clip norm
    site: Any = np.int32(0)  # which client of the run: its place in what the server keeps by site


class ServerRelease(NamedTuple):
    """What the server adds or takes away when it opens a round's sum."""

    divisor: Any = np.float32(1)  # public
    l2_clip_norm: Any = np.float32(1)
    noise_key: Any = ()  # typed key, of "central" alone
    noise_stddev: Any = np.float32(0)  # of "central" alone, on the weighted sum
    count_divisor: Any = np.float32(1)  # public, of the count that adapts the clip norm
    count_noise_stddev: Any = np.float32(0)  # of "central" alone, on that count
    unmask: Any = ()  # uint32 [M], what masks leave in a sum of words; of "distributed" alone


__all__ = [
    "ApplyFn",
    "Array",
    "Bool",
    "ClientConstants",
    "ClientKeys",
    "ClientPlan",
    "ClientPools",
    "Float32",
    "Int32",
    "NonPrivate",
    "PRNGKey",
    "Params",
    "PyTree",
    "ServerRelease",
    "TilePool",
    "UInt8",
]
