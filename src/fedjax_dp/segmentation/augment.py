"""Augmentation of one tile inside the compiled program: flips, quarter turns, stain jitter.

Everything is a select between fixed views or one 3 x 3 matrix per tile, so it costs little in a
loop over units and the same under `vmap`; nothing reads a statistic of the data.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from fedjax_dp.typing import PRNGKey

RGB_FROM_HED = np.array(
    [[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], dtype=np.float32
)
"""Optical density in R, G, B of one unit of haematoxylin, eosin and DAB: Ruifrok and Johnston,
"Quantification of histochemical staining by color deconvolution", 2001. Fixed: a matrix fitted to
a slide would be a statistic of that slide, which no ledger charges for."""

HED_FROM_RGB = np.linalg.inv(RGB_FROM_HED).astype(np.float32)
"""The inverse: stain amounts of an optical density."""


def augment(
    key: PRNGKey,
    image: Float[Array, "H W 3"],
    labels: UInt8[Array, "H W"],
    *,
    flips: bool = True,
    rotate: bool = True,
    hed_jitter: float = 0.05,
) -> tuple[Float[Array, "H W 3"], UInt8[Array, "H W"]]:
    """One random view of one tile; image and labels always move together.

    Guarantees: a pure function of (key, tile), so nothing mixes tiles; with both geometric
    options the eight symmetries of the square are equally likely; labels are only moved, never
    changed, 255 included; with everything off the tile comes back untouched.

    Args:
        key: the tile's own key.
        image: RGB in [0, 1].
        labels: class index per pixel, 255 = ignore.
        flips: mirror each axis with probability 1/2.
        rotate: turn by 0, 90, 180 or 270 degrees with equal probability; needs H == W.
        hed_jitter: range of the stain jitter, at least 0: each stain's amount is scaled by
            1 + u and shifted by v optical density units, u and v uniform in +-hed_jitter.

    Returns:
        The image, in its dtype and within [0, 1], and its labels.

    Raises:
        ValueError: a quarter turn of a tile that is not square, or a negative `hed_jitter`.
    """
    if rotate and image.shape[0] != image.shape[1]:
        raise ValueError(
            f"Expected a square tile for quarter turns, got image of shape {image.shape}. "
            "Cut square tiles or pass rotate=False."
        )
    if hed_jitter < 0:
        raise ValueError(f"Expected hed_jitter >= 0, got {hed_jitter=}. Use 0 to switch it off.")
    geometry_key, stain_key = jax.random.split(key)
    if flips or rotate:
        image, labels = _move(geometry_key, image, labels, flips=flips, rotate=rotate)
    if hed_jitter:
        image = jitter_stains(stain_key, image, hed_jitter)
    return image, labels


def jitter_stains(
    key: PRNGKey, image: Float[Array, "H W 3"], hed_jitter: float
) -> Float[Array, "H W 3"]:
    """Scale and shift haematoxylin, eosin and the residual of one image, in float32.

    (D · S) · diag(a) · S^-1 + b · S^-1 with D the optical density is one affine map of D per
    tile: a logarithm, nine multiply-adds and an exponential per pixel. Amounts are not cut at
    zero in between, so a scale of 1 and a shift of 0 give the image back.

    References:
        Tellez et al., "Whole-slide mitosis detection in H&E breast histology", 2018.
    """
    scale, shift = jax.random.uniform(
        key, (2, 3), jnp.float32, minval=-hed_jitter, maxval=hed_jitter
    )
    # Written out: a matrix product may run in TF32 on an accelerator, and colours would band.
    mixing = ((1.0 + scale)[None, :, None] * HED_FROM_RGB[:, :, None] * RGB_FROM_HED[None]).sum(1)
    offset = (shift[:, None] * RGB_FROM_HED).sum(0)
    # Pure black has no finite optical density; half a grey level is the smallest that is measured.
    density = -jnp.log(jnp.clip(image.astype(jnp.float32), 0.5 / 255, 1.0))
    density = (density[..., :, None] * mixing).sum(-2) + offset
    return jnp.clip(jnp.exp(-density), 0.0, 1.0).astype(image.dtype)


def _move(
    key: PRNGKey, image: Array, labels: Array, *, flips: bool, rotate: bool
) -> tuple[Array, Array]:
    """Mirror both axes and the diagonal by coins: selects, so vmap adds no branch."""
    coins = jax.random.bits(key, (), jnp.uint32)
    is_flipped_down, is_flipped_right, is_transposed = (
        (coins >> jnp.uint32(i)) & 1 == 1 for i in (29, 30, 31)
    )
    if not flips:
        # Without mirror images an even number of reflections is left: the four quarter turns.
        is_transposed = is_flipped_down ^ is_flipped_right

    def view(x: Array) -> Array:
        x = jnp.where(is_flipped_down, x[::-1], x)
        x = jnp.where(is_flipped_right, x[:, ::-1], x)
        return jnp.where(is_transposed, jnp.swapaxes(x, 0, 1), x) if rotate else x

    return view(image), view(labels)
