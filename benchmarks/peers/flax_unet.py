"""The U-Net from Flax's own layers as they come: what `jax_privacy` gets to differentiate.

    python -m benchmarks.peers.clipping --only=jax_privacy,private

Same weights and same logits as `fedjax_dp.models.unet`, none of its layers.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.problem import NUM_GROUPS, Flat


class FlaxUNet(nn.Module):
    """Plain `nn.Conv`, `nn.GroupNorm`, `nn.max_pool` and `nn.ConvTranspose`.

    Attributes:
        num_classes: K.
        base_channels: channels of the first level.
        depth: number of poolings.
        up: how the way up doubles: "transpose", or "dense", a product and a depth-to-space.
    """

    num_classes: int
    base_channels: int = 16
    depth: int = 4
    up: str = "transpose"

    @nn.compact
    def __call__(self, images):
        """Logits [N, H, W, K] of images [N, H, W, 3] in [0, 1]."""

        def double_conv(x, features):
            for _ in range(2):
                x = nn.Conv(features, (3, 3), use_bias=False)(x)
                x = nn.relu(nn.GroupNorm(NUM_GROUPS, epsilon=1e-5)(x))
            return x

        def double(x, features):
            if self.up == "transpose":
                return nn.ConvTranspose(features, (2, 2), (2, 2), use_bias=False)(x)
            n, height, width, _ = x.shape
            y = nn.Dense(4 * features, use_bias=False)(x)
            y = y.reshape(n, height, width, 2, 2, features).transpose(0, 1, 3, 2, 4, 5)
            return y.reshape(n, 2 * height, 2 * width, features)

        x = 2.0 * images - 1.0
        skips = []
        for level in range(self.depth):
            x = double_conv(x, self.base_channels * 2**level)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = double_conv(x, self.base_channels * 2**self.depth)
        for level in reversed(range(self.depth)):
            features = self.base_channels * 2**level
            x = double(x, features)
            x = double_conv(jnp.concatenate([skips[level], x], -1), features)
        return nn.Dense(self.num_classes, name="head")(x)


def from_flat(weights: Flat, up: str = "transpose") -> dict:
    """The parameters of `FlaxUNet` with our weights."""
    params: dict = {}
    for name, array in weights.items():
        first, *_, last = name.split("/")
        if first.startswith("UpConv"):
            number = first.removeprefix("UpConv_")
            if up == "transpose":
                first, array = f"ConvTranspose_{number}", _to_transpose(array)
            else:
                first = f"Dense_{number}"
        params.setdefault(first, {})[last] = jnp.asarray(array)
    return params


def to_flat(params: dict, up: str = "transpose") -> Flat:
    """The inverse of `from_flat`, for gradients too."""
    flat = {}
    for first, leaves in params.items():
        for last, leaf in leaves.items():
            array = np.asarray(leaf)
            kind, _, number = first.partition("_")
            if kind == "ConvTranspose":
                flat[f"UpConv_{number}/Dense_0/{last}"] = _from_transpose(array)
            elif kind == "Dense":
                flat[f"UpConv_{number}/Dense_0/{last}"] = array
            elif kind == "Conv":
                flat[f"{first}/Conv_0/{last}"] = array
            else:
                flat[f"{first}/{last}"] = array
    return flat


def _to_transpose(kernel: np.ndarray) -> np.ndarray:
    """[I, 2*2*O] of a product and depth-to-space -> [2, 2, I, O] of Flax's ConvTranspose."""
    inputs, outputs = kernel.shape
    # Flax's kernel is not mirrored, so it meets the pixels in reverse order.
    return kernel.reshape(inputs, 2, 2, outputs // 4).transpose(1, 2, 0, 3)[::-1, ::-1].copy()


def _from_transpose(kernel: np.ndarray) -> np.ndarray:
    inputs = kernel.shape[2]
    return kernel[::-1, ::-1].transpose(2, 0, 1, 3).reshape(inputs, -1)
