"""Convolution, normalisation, pooling and upsampling whose gradients stay fast inside loops.

XLA's CPU backend rewrites convolutions to its fast form in the entry computation only. The
gradients JAX emits for a convolution, inside `scan`, `map` or `while`, therefore run many times
slower (jax-ml/jax#12868), and a private step is such a loop. The layers here emit, for every
gradient, operations that are fast wherever they stand.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

ConvVariant = Literal["xla", "matmul", "canonical"]
"""How the weight gradient of a convolution is computed; the result is the same.

"matmul": one matrix product; fast on CPU for small batches, and under `vmap` it is a batched
matrix product instead of a grouped convolution. "canonical": a forward-form
convolution with explicit transposes; fast on CPU for large batches. "xla": JAX's own gradient;
for accelerators.
"""

ComputeDtype = Literal["float32", "bfloat16"]
"""What convolutions multiply in; parameters, their gradients and all moments are float32.

"float32" follows `jax_default_matmul_precision`: by default NVIDIA cards round factors to TF32 (10
bits of mantissa) and TPUs to bfloat16 (7 bits); "highest" is float32 throughout. "bfloat16" also
keeps the activations in it, which halves their memory. It has float32's exponents, so no gradient
underflows that would not there, and no loss is scaled.
"""

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def default_conv_variant(backend: str) -> ConvVariant:
    """The variant for `jax.default_backend()`'s name: "matmul" on CPU, "xla" elsewhere."""
    return "matmul" if backend == "cpu" else "xla"


def compute_dtype_on(backend: str, name: str) -> ComputeDtype:
    """The dtype of that name, with a warning where it gains nothing.

    It is not refused there: plans, predictions and trials of a GPU's run are made on CPU too.

    Args:
        backend: `jax.default_backend()`'s name.
        name: of a `ComputeDtype`.

    Raises:
        ValueError: for another name.
    """
    if name not in get_args(ComputeDtype):
        raise ValueError(f"Expected model.compute_dtype in {get_args(ComputeDtype)}, got {name!r}.")
    if name == "bfloat16" and backend == "cpu":
        warnings.warn(
            "model.compute_dtype='bfloat16' is for GPU and TPU: on CPU it rounds more and saves "
            "little time or none. Use 'float32' there, unless a GPU's run is to be repeated.",
            stacklevel=2,
        )
    return name  # type: ignore[return-value]


def convolution(variant: ConvVariant) -> Callable[..., Any]:
    """A drop-in for `lax.conv_general_dilated`, for Flax's `Conv(conv_general_dilated=...)`.

    Args:
        variant: how weight gradients are computed, see `ConvVariant`.

    Returns:
        A function of the same signature. The variants "matmul" and "canonical" implement stride
        1, "SAME" padding of odd kernels, no dilation and no groups.

    Raises:
        ValueError: for an unknown variant, and, by the function returned, for a convolution it
            does not implement.
    """
    if variant == "xla":
        return lax.conv_general_dilated
    if variant not in ("matmul", "canonical"):
        raise ValueError(f"Expected variant 'xla', 'matmul' or 'canonical', got {variant!r}.")

    def conv_general_dilated(
        lhs: Array,
        rhs: Array,
        window_strides: Sequence[int],
        padding: str | Sequence[tuple[int, int]],
        lhs_dilation: Sequence[int] | None = None,
        rhs_dilation: Sequence[int] | None = None,
        dimension_numbers: Any = None,
        feature_group_count: int = 1,
        batch_group_count: int = 1,
        precision: Any = None,
        preferred_element_type: Any = None,
    ) -> Array:
        del dimension_numbers, preferred_element_type  # Flax always passes NHWC, HWIO.
        kernel_size = rhs.shape[:2]
        same = tuple(((k - 1) // 2, (k - 1) // 2) for k in kernel_size)
        is_same = padding == "SAME" or tuple(tuple(p) for p in padding) == same
        plain = (
            lhs.ndim == 4
            and all(s == 1 for s in window_strides)
            and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
            and feature_group_count == batch_group_count == 1
            and all(k % 2 == 1 for k in kernel_size)
            and is_same
        )
        if not plain:
            raise ValueError(
                f"The {variant!r} convolution implements stride 1, SAME padding, odd kernels, no "
                f"dilation and no groups, got {window_strides=}, {padding=}, {lhs_dilation=}, "
                f"{rhs_dilation=}, {feature_group_count=}, {batch_group_count=}, "
                f"{kernel_size=}. Use conv_variant='xla' for this layer."
            )
        return _same_conv(variant, precision, lhs, rhs)

    return conv_general_dilated


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _same_conv(variant: str, precision: Any, images: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=_DIMENSIONS, precision=precision
    )


def _same_conv_fwd(variant: str, precision: Any, images: Array, kernel: Array) -> Any:
    return _same_conv(variant, precision, images, kernel), (images, kernel)


def _same_conv_bwd(variant: str, precision: Any, residuals: Any, cotangent: Array) -> Any:
    images, kernel = residuals
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    # By the same function, so that a second derivative is as fast as the first.
    images_bar = _same_conv(variant, precision, cotangent, flipped)
    weight_gradient = _matmul_gradient if variant == "matmul" else _canonical_gradient
    kernel_bar = weight_gradient(images, cotangent, kernel.shape, precision)
    return images_bar, kernel_bar.astype(kernel.dtype)


_same_conv.defvjp(_same_conv_fwd, _same_conv_bwd)


def _matmul_gradient(images: Array, cotangent: Array, shape: Any, precision: Any) -> Array:
    """Weight gradient as one matrix product: row-unfolded images times column-unfolded cotangent.

    Kernel rows are unfolded on one side and columns on the other, 3 + 3 copies for a 3x3 kernel
    where nine on one side would not fit a core's cache.
    """
    rows, columns, c_in, c_out = shape
    n, height, width = images.shape[:3]
    top, left = (rows - 1) // 2, (columns - 1) // 2
    # by_row[n, h, w, i, :] = images[n, h + i - top, w, :], zero outside.
    padded = jnp.pad(images, ((0, 0), (top, top), (0, 0), (0, 0)))
    by_row = jnp.concatenate([padded[:, i : i + height] for i in range(rows)], axis=-1)
    # by_column[n, h, w, j, :] = cotangent[n, h, w + left - j, :], zero outside.
    padded = jnp.pad(cotangent, ((0, 0), (0, 0), (left, left), (0, 0)))
    by_column = jnp.concatenate(
        [padded[:, :, columns - 1 - j : columns - 1 - j + width] for j in range(columns)], axis=-1
    )
    pixels = n * height * width
    product = _contract_pixels(
        by_row.reshape(pixels, rows * c_in), by_column.reshape(pixels, columns * c_out), precision
    )
    return product.reshape(rows, c_in, columns, c_out).swapaxes(1, 2)


def _contract_pixels(left: Array, right: Array, precision: Any) -> Array:
    """left^T right over the pixels: [P, I] and [P, O] to [I, O]; transposed first, for speed."""
    return jnp.matmul(left.T, right, precision=precision, preferred_element_type=_accumulator(left))


def _canonical_gradient(images: Array, cotangent: Array, shape: Any, precision: Any) -> Array:
    """Weight gradient as a forward convolution: channels take the place of the batch."""
    pads = [((k - 1) // 2, (k - 1) // 2) for k in shape[:2]]
    gradient = lax.conv_general_dilated(
        images.transpose(3, 1, 2, 0),
        cotangent.transpose(1, 2, 0, 3),
        (1, 1),
        pads,
        dimension_numbers=_DIMENSIONS,
        precision=precision,
        preferred_element_type=_accumulator(images),
    )
    return gradient.transpose(1, 2, 0, 3)


def pixelwise_product(variant: ConvVariant) -> Callable[..., Any]:
    """A drop-in for `lax.dot_general`, for Flax's `Dense(dot_general=...)` over pixels.

    JAX's gradient of the weights contracts the pixels in a form that XLA's CPU backend computes
    several times slower than the product that "matmul" writes. The other variants keep JAX's.
    """
    if variant != "matmul":
        return lax.dot_general

    def dot_general(
        lhs: Array, rhs: Array, dimension_numbers: Any, precision: Any = None, **_: Any
    ) -> Array:
        if dimension_numbers != (((lhs.ndim - 1,), (0,)), ((), ())) or rhs.ndim != 2:
            raise ValueError(f"Expected Dense's product of pixels, got {dimension_numbers=}.")
        return _pixelwise(precision, lhs, rhs)

    return dot_general


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pixelwise(precision: Any, pixels: Array, kernel: Array) -> Array:
    return jnp.matmul(pixels, kernel, precision=precision)


def _pixelwise_fwd(precision: Any, pixels: Array, kernel: Array) -> Any:
    return _pixelwise(precision, pixels, kernel), (pixels, kernel)


def _pixelwise_bwd(precision: Any, residuals: Any, cotangent: Array) -> Any:
    pixels, kernel = residuals
    pixels_bar = jnp.matmul(cotangent, kernel.T, precision=precision)
    kernel_bar = _contract_pixels(
        pixels.reshape(-1, kernel.shape[0]), cotangent.reshape(-1, kernel.shape[1]), precision
    )
    return pixels_bar, kernel_bar.astype(kernel.dtype)


_pixelwise.defvjp(_pixelwise_fwd, _pixelwise_bwd)


def _accumulator(operand: Array) -> Any:
    """What a sum over all pixels is taken in: float32 at least."""
    return jnp.promote_types(operand.dtype, jnp.float32)


class Conv(nn.Module):
    """A "SAME" convolution of stride 1, optionally weight-standardised.

    Weight standardisation (Qiao et al. 2019, "Micro-Batch Training with Batch-Channel
    Normalization and Weight Standardization") centres and scales each output channel's kernel; it
    reads parameters only, so it mixes no units.

    Attributes:
        features: output channels.
        kernel_size: odd height and width.
        use_bias: whether to add a bias.
        standardize: whether to standardise the kernel.
        variant: see `ConvVariant`.
        dtype: what is multiplied and returned; None = as the images and the kernel are.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    use_bias: bool = False
    standardize: bool = False
    variant: ConvVariant = "xla"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "N H W I"]) -> Float[Array, "N H W O"]:
        """Convolves images [N, H, W, I] to [N, H, W, features]."""
        conv = nn.Conv(
            self.features,
            self.kernel_size,
            use_bias=self.use_bias,
            dtype=self.dtype,
            conv_general_dilated=convolution(self.variant),
        )
        if self.standardize:
            conv = nn.map_variables(  # type: ignore[assignment]
                _Standardized,
                "params",
                trans_in_fn=_standardize_kernels,
                init=self.is_initializing(),
            )(conv)
        return conv(x)


class _Standardized(nn.Module):
    """Carries a convolution so that `map_variables` can standardise its kernel."""

    conv: nn.Module

    def __call__(self, x: Array) -> Array:
        return self.conv(x)  # type: ignore[operator]


def _standardize_kernels(variables: Any) -> Any:
    def standardize(leaf: Array) -> Array:
        if leaf.ndim != 4:
            return leaf
        mean = leaf.mean((0, 1, 2), keepdims=True)
        variance = jnp.square(leaf - mean).mean((0, 1, 2), keepdims=True)
        fan_in = leaf[..., 0].size
        return (leaf - mean) * lax.rsqrt(variance * fan_in + 1e-4)

    return jax.tree.map(standardize, variables)


class GroupNorm(nn.Module):
    """Group normalisation (Wu and He 2018) in one multiply-add, moments in float32.

    Moments are taken over the pixels and channels of one image's group, so images do not mix.
    They are taken of the difference to one pixel of the image: a constant offset, which
    E[x^2] - E[x]^2 alone would cancel digits against, does then no harm.

    Attributes:
        num_groups: groups of neighbouring channels; divides the channels.
        epsilon: added to the variance.
    """

    num_groups: int
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        """Normalises images [N, H, W, C]; same shape and dtype."""
        n, channels = x.shape[0], x.shape[3]
        if channels % self.num_groups:
            raise ValueError(
                f"Expected channels divisible by num_groups, got {channels=} and "
                f"{self.num_groups=}. Choose base_channels as a multiple of the groups."
            )
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        grouped = (n, self.num_groups, channels // self.num_groups)
        # The variance does not depend on the offset, so neither does any gradient. One offset a
        # group, so that channels of a group keep their distances.
        offset = lax.stop_gradient(x[:, :1, :1].reshape(n, 1, 1, *grouped[1:])[..., :1])
        offset = jnp.broadcast_to(offset, (n, 1, 1, *grouped[1:])).reshape(n, 1, 1, channels)
        offset = offset.astype(jnp.float32)
        centred = x.astype(jnp.float32) - offset
        mean = centred.mean((1, 2)).reshape(grouped).mean(-1)
        square = jnp.square(centred).mean((1, 2)).reshape(grouped).mean(-1)
        variance = jnp.maximum(square - jnp.square(mean), 0.0)
        inverse = lax.rsqrt(variance + self.epsilon)

        def per_channel(moment: Array) -> Array:
            return jnp.repeat(moment, grouped[2], axis=1)[:, None, None, :]

        multiplier = per_channel(inverse) * scale
        shift = bias - per_channel(mean) * multiplier
        return (centred * multiplier + shift).astype(x.dtype)


@jax.custom_vjp
def max_pool_2x2(x: Float[Array, "N H W C"]) -> Float[Array, "N H/2 W/2 C"]:
    """Maximum over 2x2 windows, stride 2. Pixels that share a maximum share its gradient."""
    rows = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])


def _max_pool_2x2_fwd(x: Array) -> Any:
    pooled = max_pool_2x2(x)
    return pooled, (x, pooled)


def _max_pool_2x2_bwd(residuals: Any, cotangent: Array) -> Any:
    x, pooled = residuals
    # Every pixel looks at its window's maximum: gradients of strided slices would each be widened
    # to the image's size, and added.
    n, height, width, channels = pooled.shape
    windows = x.reshape(n, height, 2, width, 2, channels)
    is_maximum = windows == pooled[:, :, None, :, None]
    share = cotangent / jnp.maximum(is_maximum.sum((2, 4)), 1).astype(cotangent.dtype)
    return (jnp.where(is_maximum, share[:, :, None, :, None], 0).reshape(x.shape),)


max_pool_2x2.defvjp(_max_pool_2x2_fwd, _max_pool_2x2_bwd)


class UpConv(nn.Module):
    """Transposed convolution 2x2 of stride 2, as one matrix product and a depth-to-space.

    Attributes:
        features: output channels.
        dtype: what is multiplied and returned; None = as the images and the kernel are.
        variant: see `ConvVariant`.
    """

    features: int
    dtype: Any = None
    variant: ConvVariant = "xla"

    @nn.compact
    def __call__(self, x: Float[Array, "N H W I"]) -> Float[Array, "N 2*H 2*W O"]:
        """Doubles height and width: [N, H, W, I] to [N, 2H, 2W, features]."""
        n, height, width, _ = x.shape
        y = nn.Dense(
            4 * self.features,
            use_bias=False,
            dtype=self.dtype,
            dot_general=pixelwise_product(self.variant),
        )(x)
        y = y.reshape(n, height, width, 2, 2, self.features).transpose(0, 1, 3, 2, 4, 5)
        return y.reshape(n, 2 * height, 2 * width, self.features)
