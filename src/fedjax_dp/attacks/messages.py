"""What a client sends, as a function of its tiles that can be differentiated.

The victim's message is made by the client's own program, `federated.client.client_update`; the
attacker runs it in his head, on tiles he makes up. Noise he cannot know, so his has none. A test
holds the two against each other at every placement.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, UInt8

from fedjax_dp.federated.client import client_update
from fedjax_dp.privacy.clipping import clip_by_norm
from fedjax_dp.segmentation.losses import soft_dice_cross_entropy_of_truth
from fedjax_dp.typing import (
    ApplyFn,
    ClientConstants,
    ClientKeys,
    ClientPlan,
    Params,
    PRNGKey,
    TilePool,
)

Placement = Literal["none", "dp_sgd", "update", "update_unclipped"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sent:
    """What is sent: the change of the parameters after steps over all of the client's B tiles.

    With one step and `learning_rate` 1 that is minus the mean gradient; at "dp_sgd" minus the mean
    of clipped gradients, noised. "distributed" opens sums of the same form, of all sites' tiles.
    Tiles are not augmented: an attacker is given that for free, and the server is one who knows the
    public learning rate, clip norm and number of tiles.

    Attributes:
        placement: where clip and noise enter, see `client_update`.
        local_steps: S.
        learning_rate: of the client's gradient descent.
        l2_clip_norm: of each unit's gradient (dp_sgd) or of the update (update); inf = no clip.
        noise_multiplier: standard deviation of the noise over the clip norm.
    """

    placement: Placement = "none"
    local_steps: int = 1
    learning_rate: float = 1.0
    l2_clip_norm: float = math.inf
    noise_multiplier: float = 0.0

    def __post_init__(self) -> None:
        clips = self.placement in ("dp_sgd", "update")
        if self.placement not in get_args(Placement) or self.local_steps < 1:
            raise ValueError(
                f"Expected placement in {get_args(Placement)} and local_steps >= 1, got "
                f"{self.placement=}, {self.local_steps=}."
            )
        if clips != math.isfinite(self.l2_clip_norm) or self.l2_clip_norm <= 0:
            raise ValueError(
                "Expected a finite l2_clip_norm > 0 with placements that clip and none with the "
                f"others, got {self.l2_clip_norm=} with {self.placement=}."
            )
        if self.noise_multiplier < 0 or (self.placement == "none" and self.noise_multiplier):
            raise ValueError(
                f"Expected noise_multiplier >= 0, and 0 where nothing is noised, got "
                f"{self.noise_multiplier=} with {self.placement=}."
            )


def one_hot(labels: UInt8[Array, "*b H W"], num_classes: int) -> Float[Array, "*b H W K"]:
    """The truth as probabilities; ignored pixels have none."""
    return jax.nn.one_hot(labels, num_classes)


def unit_loss(apply: ApplyFn, dice_weight: float = 1.0) -> Callable[..., Any]:
    """`loss(params, image [H, W, 3] in [0, 1], truth [H, W, K]) -> scalar` of one tile."""

    def loss(params: Params, image: Any, truth: Any) -> Any:
        logits = apply(params, image[None], jax.random.key(0))[0]
        return soft_dice_cross_entropy_of_truth(logits, truth, dice_weight=dice_weight)

    return loss


def simulated(loss: Callable[..., Any], sent: Sent) -> Callable[..., Params]:
    """The attacker's idea of the message, without noise.

    Args:
        loss: from `unit_loss`.
        sent: what is public of the client's program.

    Returns:
        `message(params, images [B, H, W, 3] in [0, 1], truth [B, H, W, K]) -> model_delta`,
        differentiable in images and truth, through every step.
    """

    def message(params: Params, images: Any, truth: Any) -> Params:
        def step(local: Params, _: None = None) -> tuple[Params, None]:
            grads = jax.vmap(jax.grad(loss), (None, 0, 0))(local, images, truth)
            if sent.placement == "dp_sgd":
                grads = jax.vmap(lambda g: clip_by_norm(g, sent.l2_clip_norm)[0])(grads)
            rate = sent.learning_rate
            return jax.tree.map(lambda p, g: p - rate * g.mean(0), local, grads), None

        # The first step stands before the loop: there all victims have the same parameters, and
        # mapped over victims a loop's are each victim's own, which makes convolutions grouped.
        local, _ = step(params)
        if sent.local_steps > 1:
            local, _ = lax.scan(step, local, None, length=sent.local_steps - 1)
        delta = jax.tree.map(jnp.subtract, local, params)
        if sent.placement == "update":
            delta, _ = clip_by_norm(delta, sent.l2_clip_norm)
        return delta

    return message


def sent_message(
    loss: Callable[..., Any], sent: Sent
) -> Callable[[Params, Any, Any, PRNGKey], Params]:
    """The message itself, from the client's program, noise and all.

    Returns:
        `message(params, images [B, H, W, 3] in [0, 1], truth [B, H, W, K], key) -> model_delta`.
    """

    def of_unit(params: Params, images: Any, truth: Any, num_tiles: Any, keys: Any) -> Any:
        del num_tiles, keys  # A tile is a unit, and is not augmented.
        return loss(params, images[0], truth[0])

    update = client_update(of_unit, optax.sgd(sent.learning_rate), placement=sent.placement)

    def message(params: Params, images: Any, truth: Any, key: PRNGKey) -> Params:
        count, steps = len(images), sent.local_steps
        plan = ClientPlan(
            np.broadcast_to(np.arange(count, dtype=np.int32)[:, None], (steps, count, 1)),
            np.full(steps, count, np.int32),
            np.ones((steps, count), np.int32),
        )
        clip = sent.l2_clip_norm if math.isfinite(sent.l2_clip_norm) else 1.0
        constants = ClientConstants(
            *map(np.float32, (1.0, clip, sent.noise_multiplier * clip, 1.0 / count, 1.0))
        )
        keys = ClientKeys(key, jax.random.key(0))
        delta, _, _ = update(params, keys, (), constants, plan, TilePool(images, truth))
        return delta

    return message
