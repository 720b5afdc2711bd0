"""The loss of one tile: soft Dice over the foreground plus cross-entropy, ignoring 255.

Written for ONE tile on purpose. A Dice pooled over a batch would let one patient's pixels enter
another patient's gradient, and clipping units one by one would then bound nothing. For the same
reason there are no class weights computed from data.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from fedjax_dp.data.tiles import IGNORE_INDEX


def soft_dice_cross_entropy(
    logits: Float[Array, "H W K"],
    labels: UInt8[Array, "H W"],
    *,
    dice_weight: float = 1.0,
    smoothing: float = 0.01,
) -> Float32[Array, ""]:
    """Mean cross-entropy of the valid pixels + `dice_weight` x (1 - mean soft Dice of foreground).

    With p_k and t_k the mean predicted probability and the mean truth of class k over the valid
    pixels, and i_k the mean of their product, the soft Dice of class k is
    (2 i_k + smoothing) / (p_k + t_k + smoothing), averaged over the classes 1 .. K - 1. The
    smoothing is a share of the tile, so a tile without class k is a smooth pull of p_k towards
    zero rather than a cliff, and the loss means the same at every tile size.

    Guarantees: depends on this tile alone; pixels labelled 255 (or outside the K classes) get a
    gradient of exactly zero, whatever their logits; a tile of nothing but such pixels has a loss
    of exactly 0 and a gradient of exactly 0; computed in float32 whatever the logits' dtype.

    Args:
        logits: class scores of one tile, before the softmax; class 0 is the background.
        labels: class index per pixel, 255 = ignore.
        dice_weight: weight of the Dice term beside the cross-entropy, at least 0.
        smoothing: additive smoothing of the Dice term as a share of the tile's valid area, > 0.

    Returns:
        The loss, a float32 scalar.

    Raises:
        ValueError: K is not in 2 .. 255, `dice_weight` is negative or `smoothing` not positive.

    References:
        Milletari et al., "V-Net", 2016, for the soft Dice; Isensee et al., "nnU-Net", 2021, for
        its sum with cross-entropy.
    """
    # One-hot truth; 255 and labels outside the table match no class, so their row is zero.
    truth = labels[..., None] == jnp.arange(logits.shape[-1], dtype=labels.dtype)
    return soft_dice_cross_entropy_of_truth(
        logits, truth.astype(jnp.float32), dice_weight=dice_weight, smoothing=smoothing
    )


def soft_dice_cross_entropy_of_truth(
    logits: Float[Array, "H W K"],
    truth: Float32[Array, "H W K"],
    *,
    dice_weight: float = 1.0,
    smoothing: float = 0.01,
) -> Float32[Array, ""]:
    """`soft_dice_cross_entropy` of a truth given as probabilities, which can be differentiated.

    Args:
        logits: as there.
        truth: probabilities of the classes; a pixel whose are all zero is ignored.
        dice_weight: as there.
        smoothing: as there.

    Returns:
        As there; with a one-hot truth the same.

    Raises:
        ValueError: as there.
    """
    num_classes = logits.shape[-1]
    if not 2 <= num_classes <= IGNORE_INDEX:
        raise ValueError(
            f"Expected logits of 2 to {IGNORE_INDEX} classes on the last axis, got shape "
            f"{logits.shape}. Background counts as a class: one foreground class makes two."
        )
    if dice_weight < 0 or smoothing <= 0:
        raise ValueError(
            f"Expected dice_weight >= 0 and smoothing > 0, got {dice_weight=} and {smoothing=}. "
            "Without smoothing a tile without foreground has no defined Dice."
        )
    is_valid = truth.sum(-1) > 0
    # Replacing the logits, not only their loss, keeps a non-finite score of an ignored pixel out
    # of the backward pass, where 0 x inf would be NaN.
    scores = jnp.where(is_valid[..., None], logits.astype(jnp.float32), 0.0)
    log_probs = jax.nn.log_softmax(scores, axis=-1)
    per_pixel = 1.0 / jnp.maximum(is_valid.sum(dtype=jnp.float32), 1.0)

    cross_entropy = -(truth * log_probs).sum() * per_pixel
    probs = jnp.exp(log_probs[..., 1:]) * is_valid[..., None]
    truth = truth[..., 1:]
    overlap = (probs * truth).sum((0, 1)) * per_pixel
    total = (probs.sum((0, 1)) + truth.sum((0, 1))) * per_pixel
    dice = (2.0 * overlap + smoothing) / (total + smoothing)
    return cross_entropy + dice_weight * (1.0 - dice.mean())
