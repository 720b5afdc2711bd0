"""The U-Net (Ronneberger et al. 2015) with group normalisation, and the pure function of it."""

import functools
from collections.abc import Callable
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fedjax_dp.models import kinks
from fedjax_dp.models.layers import (
    ComputeDtype,
    Conv,
    ConvVariant,
    GroupNorm,
    UpConv,
    max_pool_2x2,
    pixelwise_product,
)
from fedjax_dp.typing import ApplyFn, Params, PRNGKey


class UNet(nn.Module):
    """U-Net: `depth` poolings, channels doubling at each, two convolutions a level.

    No layer mixes the images of a batch, so a unit's gradient depends on that unit alone.

    Attributes:
        num_classes: K.
        base_channels: channels of the first level.
        depth: number of 2x2 poolings; heights and widths must divide by 2**depth.
        num_groups: groups of every GroupNorm.
        standardize: weight-standardised convolutions.
        conv_variant: see `layers.ConvVariant`.
        compute_dtype: see `layers.ComputeDtype`. The head is float32 in any case: the gradient of
            its bias is a sum over all pixels, and the loss sees differences of logits.
        kink_width: see `kinks`; 0 = plain layers.
    """

    num_classes: int
    base_channels: int = 16
    depth: int = 4
    num_groups: int = 8
    standardize: bool = False
    conv_variant: ConvVariant = "xla"
    compute_dtype: ComputeDtype = "float32"
    kink_width: float = 0.0

    @nn.compact
    def __call__(self, images: Float[Array, "N H W 3"]) -> Float[Array, "N H W K"]:
        """Logits float32 [N, H, W, K] of RGB images [N, H, W, 3] in [0, 1]."""
        height, width = images.shape[1:3]
        if height % 2**self.depth or width % 2**self.depth:
            raise ValueError(
                f"Expected a height and width divisible by 2**depth = {2**self.depth}, got "
                f"{height} x {width}. Change data.tile_size or model.depth."
            )

        def double_conv(x: Array, features: int) -> Array:
            for _ in range(2):
                x = Conv(
                    features,
                    standardize=self.standardize,
                    variant=self.conv_variant,
                    dtype=dtype,
                )(x)
                x = relu(GroupNorm(self.num_groups)(x))
            return x

        relu: Callable[[Array], Array] = nn.relu
        pool: Callable[[Array], Array] = max_pool_2x2
        if self.kink_width:
            relu = functools.partial(kinks.relu, self.kink_width)
            pool = functools.partial(kinks.max_pool_2x2, self.kink_width)
        dtype = jnp.dtype(self.compute_dtype)
        x = 2.0 * images - 1.0
        skips = []
        for level in range(self.depth):
            x = double_conv(x, self.base_channels * 2**level)
            skips.append(x)
            x = pool(x)
        x = double_conv(x, self.base_channels * 2**self.depth)
        for level in reversed(range(self.depth)):
            features = self.base_channels * 2**level
            x = UpConv(features, dtype, self.conv_variant)(x)
            x = double_conv(jnp.concatenate([skips[level], x], -1), features)
        return nn.Dense(
            self.num_classes, name="head", dot_general=pixelwise_product(self.conv_variant)
        )(x.astype(jnp.float32))


def unet(
    num_classes: int,
    *,
    base_channels: int = 16,
    depth: int = 4,
    num_groups: int = 8,
    standardize: bool = False,
    conv_variant: ConvVariant = "xla",
    compute_dtype: ComputeDtype = "float32",
    kink_width: float = 0.0,
) -> tuple[Callable[[PRNGKey], Params], ApplyFn]:
    """The U-Net as a pair of pure functions.

    Args:
        num_classes: K, background included.
        base_channels: channels of the first level, a multiple of `num_groups`.
        depth: number of poolings.
        num_groups: groups of the normalisation.
        standardize: weight-standardised convolutions.
        conv_variant: how convolutions compute their weight gradients.
        compute_dtype: what convolutions multiply in; "bfloat16" is for GPU and TPU.
        kink_width: for attacks: of the smooth step that stands for a kink in second derivatives,
            see `kinks`; 0 = none, values and first derivatives are the same.

    Returns:
        `init(key) -> params` and `apply(params, images [N, H, W, 3] in [0, 1], key) -> logits
        [N, H, W, K]`. Parameters, their gradients and logits are float32 whatever is multiplied.
        The network draws no randomness; the key is there for those that do.

    Raises:
        ValueError: if a number makes no network, or for an unknown dtype.
    """
    if num_classes < 2 or depth < 1 or base_channels < 1 or base_channels % num_groups:
        raise ValueError(
            "Expected num_classes >= 2, depth >= 1 and base_channels a multiple of num_groups, got "
            f"{num_classes=}, {depth=}, {base_channels=}, {num_groups=}."
        )
    if compute_dtype not in get_args(ComputeDtype):
        raise ValueError(f"Expected {compute_dtype=} in {get_args(ComputeDtype)}.")
    module = UNet(
        num_classes,
        base_channels,
        depth,
        num_groups,
        standardize,
        conv_variant,
        compute_dtype,
        kink_width,
    )

    def init(key: PRNGKey) -> Params:
        images = jnp.zeros((1, 2**depth, 2**depth, 3))
        shapes = jax.eval_shape(module.init, key, images)["params"]
        return _lecun_normal(key, shapes)

    def apply(params: Params, images: Any, key: Any) -> Any:
        del key
        return module.apply({"params": params}, images)

    return jax.jit(init), apply


def multiply_adds(
    tile_size: int, num_classes: int, *, base_channels: int = 16, depth: int = 4
) -> int:
    """Multiplications, each with an addition, of the network's forward pass over one tile.

    Convolutions alone are counted; normalisation and pooling are a few per cent beside them.

    Args:
        tile_size: side of the tile, in pixels.
        num_classes: K.
        base_channels: as of `unet`.
        depth: as of `unet`.
    """
    total = base_channels * num_classes * tile_size**2  # the head
    for level in range(depth + 1):
        channels, pixels = base_channels * 2**level, (tile_size // 2**level) ** 2
        inputs = channels // 2 if level else 3
        total += 9 * (inputs + channels) * channels * pixels
        if level < depth:  # the way up: doubling, two convolutions of which the first sees the skip
            total += (2 + 9 * 3) * channels**2 * pixels
    return total


def _lecun_normal(key: PRNGKey, shapes: Any) -> Params:
    """Flax's default start (LeCun et al. 1998): truncated normal kernels, scales one, biases zero.

    One draw for all kernels: Flax compiles a draw for each, which takes longer than a short run.
    """
    leaves, treedef = jax.tree.flatten_with_path(shapes)
    sizes = [leaf.size if path[-1].key == "kernel" else 0 for path, leaf in leaves]
    draws = jax.random.truncated_normal(key, -2.0, 2.0, (sum(sizes),))
    # The standard deviation of a normal cut at two of its own.
    draws = draws / 0.87962566103423978
    parts = jnp.split(draws, np.cumsum(sizes)[:-1])
    values = []
    for (path, leaf), part in zip(leaves, parts, strict=True):
        if path[-1].key == "kernel":
            fan_in = leaf.size // leaf.shape[-1]
            value = part.reshape(leaf.shape) / np.sqrt(fan_in)
        else:
            value = jnp.full(leaf.shape, 1.0 if path[-1].key == "scale" else 0.0)
        values.append(value.astype(leaf.dtype))
    return jax.tree.unflatten(treedef, values)
