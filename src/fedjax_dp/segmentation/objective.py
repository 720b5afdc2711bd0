"""The loss of one unit of privacy: its tiles, augmented, through the model, averaged."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_dp.segmentation.augment import augment
from fedjax_dp.segmentation.losses import soft_dice_cross_entropy
from fedjax_dp.typing import ApplyFn


def segmentation_loss(
    apply: ApplyFn,
    *,
    dice_weight: float = 1.0,
    flips: bool = True,
    rotate: bool = True,
    hed_jitter: float = 0.05,
    multiplicity: int = 1,
) -> Callable[..., Any]:
    """Makes the loss of one unit for `federated.client.client_update`.

    Args:
        apply: the model.
        dice_weight: see `losses.soft_dice_cross_entropy`.
        flips: see `augment.augment`.
        rotate: see `augment.augment`.
        hed_jitter: see `augment.augment`.
        multiplicity: augmentations of every tile that are averaged before the unit's gradient is
            clipped (De et al. 2022, section 3.2). It costs compute and no privacy.

    Returns:
        `loss_fn(params, images [T, H, W, 3] uint8, labels [T, H, W] uint8, num_tiles, keys [T])`:
        the mean over the first `num_tiles` tiles, zero if there is none. Each tile's randomness
        comes from its own key.

    Raises:
        ValueError: for a multiplicity below one.
    """
    if multiplicity < 1:
        raise ValueError(f"Expected objective.multiplicity >= 1, got {multiplicity=}.")

    def views(key: Any, image: Any, labels: Any) -> Any:
        def view(index: Any) -> Any:
            return augment(
                jax.random.fold_in(key, index),
                image,
                labels,
                flips=flips,
                rotate=rotate,
                hed_jitter=hed_jitter,
            )

        return jax.vmap(view)(jnp.arange(multiplicity))

    def loss_fn(params: Any, images: Any, labels: Any, num_tiles: Any, keys: Any) -> Any:
        views_key, apply_key = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        scaled = images.astype(jnp.float32) / 255.0
        scaled, labels = jax.vmap(views)(views_key, scaled, labels)  # [T, M, H, W, ...]
        tiles = labels.shape[0]
        flat = scaled.reshape(-1, *scaled.shape[2:]), labels.reshape(-1, *labels.shape[2:])
        logits = apply(params, flat[0], apply_key[0])
        losses = jax.vmap(
            lambda logits, labels: soft_dice_cross_entropy(logits, labels, dice_weight=dice_weight)
        )(logits, flat[1])
        per_tile = losses.reshape(tiles, multiplicity).mean(1)
        is_padding = jnp.arange(tiles) >= num_tiles
        return jnp.where(is_padding, 0.0, per_tile).sum() / jnp.maximum(num_tiles, 1)

    return loss_fn
