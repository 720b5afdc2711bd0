"""The U-Net and its loss in PyTorch: same weights, same logits, same loss of every tile.

python -m benchmarks.peers.clipping --only=torch,opacus,private
"""

import re

import numpy as np
import torch
from torch import nn

from benchmarks.peers.problem import NUM_GROUPS, Flat


class Up(nn.Module):
    """Doubles height and width: a 1x1 convolution and a pixel shuffle, or a transposed one."""

    def __init__(self, inputs: int, features: int, kind: str):
        super().__init__()
        self.kind = kind
        if kind == "transpose":
            self.conv = nn.ConvTranspose2d(inputs, features, 2, stride=2, bias=False)
        else:
            self.conv = nn.Conv2d(inputs, 4 * features, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, I, H, W] to [N, O, 2H, 2W]."""
        x = self.conv(x)
        return x if self.kind == "transpose" else nn.functional.pixel_shuffle(x, 2)


class TorchUNet(nn.Module):
    """Counterpart of `fedjax_dp.models.unet.UNet`, NCHW; layers numbered in the same order."""

    def __init__(
        self, num_classes: int, *, base_channels: int = 16, depth: int = 4, up: str = "shuffle"
    ):
        super().__init__()
        self.depth = depth
        widths = [base_channels * 2**level for level in range(depth + 1)]
        down = [(inputs, width) for inputs, width in zip([3, *widths], widths, strict=False)]
        rising = [(2 * width, width) for width in reversed(widths[:-1])]
        pairs = [
            pair for inputs, width in down + rising for pair in ((inputs, width), (width,) * 2)
        ]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in pairs)
        self.norms = nn.ModuleList(nn.GroupNorm(NUM_GROUPS, o, eps=1e-5) for _, o in pairs)
        self.ups = nn.ModuleList(Up(2 * width, width, up) for width in reversed(widths[:-1]))
        self.head = nn.Conv2d(base_channels, num_classes, 1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [N, K, H, W] of images [N, 3, H, W] in [0, 1]."""
        layers = iter(zip(self.convs, self.norms, strict=True))

        def double_conv(x: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                conv, norm = next(layers)
                x = torch.relu(norm(conv(x)))
            return x

        x = 2.0 * images - 1.0
        skips = []
        for _ in range(self.depth):
            x = double_conv(x)
            skips.append(x)
            x = self.pool(x)
        x = double_conv(x)
        for up in self.ups:
            x = double_conv(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)


def tile_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`soft_dice_cross_entropy` of each tile: [N] from logits [N, K, H, W], labels [N, H, W]."""
    num_classes, smoothing = logits.shape[1], 0.01
    valid = labels < num_classes
    scores = torch.where(valid[:, None], logits, 0.0)
    log_probs = torch.log_softmax(scores, 1)
    classes = torch.arange(num_classes, device=labels.device).view(1, -1, 1, 1)
    truth = (labels[:, None] == classes).to(logits.dtype)
    per_pixel = 1.0 / valid.sum((1, 2)).clamp(min=1).to(logits.dtype)
    cross_entropy = -(truth * log_probs).sum((1, 2, 3)) * per_pixel
    probs = log_probs[:, 1:].exp() * valid[:, None]
    truth = truth[:, 1:]
    overlap = (probs * truth).sum((2, 3)) * per_pixel[:, None]
    total = (probs.sum((2, 3)) + truth.sum((2, 3))) * per_pixel[:, None]
    dice = (2.0 * overlap + smoothing) / (total + smoothing)
    return cross_entropy + 1.0 - dice.mean(1)


def load_flat(model: TorchUNet, weights: Flat) -> None:
    """Copies our weights into the model.

    Raises:
        ValueError: if a name is missing on either side.
    """
    parameters = dict(model.named_parameters())
    names = {our_name(name): name for name in parameters}
    if set(names) != set(weights):
        raise ValueError(f"Names differ: {sorted(set(names) ^ set(weights))}.")
    with torch.no_grad():
        for ours, name in names.items():
            value = to_torch(ours, weights[ours], parameters[name].shape)
            parameters[name].copy_(torch.from_numpy(np.ascontiguousarray(value)))


def to_flat(named: dict[str, torch.Tensor]) -> Flat:
    """Tensors by the model's names (weights or gradients) -> ours."""
    return {our_name(name): from_torch(name, tensor) for name, tensor in named.items()}


def our_name(name: str) -> str:
    """The name that a parameter of `TorchUNet` has in our network."""
    name = re.sub(r"^(_module\.|_orig_mod\.)+", "", name)
    kind, *_, leaf = name.split(".")
    if kind == "head":
        return f"head/{'kernel' if leaf == 'weight' else 'bias'}"
    number = name.split(".")[1]
    if kind == "norms":
        return f"GroupNorm_{number}/{'scale' if leaf == 'weight' else 'bias'}"
    return f"UpConv_{number}/Dense_0/kernel" if kind == "ups" else f"Conv_{number}/Conv_0/kernel"


def to_torch(ours: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Our layout -> that of PyTorch's parameter of the given shape."""
    if len(shape) == 1:
        return array
    if ours.startswith("Conv"):
        return array.transpose(3, 2, 0, 1)
    if ours == "head/kernel":
        return array.T[:, :, None, None]
    inputs, outputs = array.shape
    cells = array.reshape(inputs, 2, 2, outputs // 4)  # [I, row, column, O]
    if shape[2] == 2:  # of a transposed convolution
        return cells.transpose(0, 3, 1, 2)
    return cells.transpose(3, 1, 2, 0).reshape(outputs, inputs)[:, :, None, None]


def from_torch(name: str, tensor: torch.Tensor) -> np.ndarray:
    """PyTorch's layout -> ours."""
    array, ours = tensor.detach().contiguous().numpy(), our_name(name)
    if array.ndim == 1:
        return array
    if ours.startswith("Conv"):
        return array.transpose(2, 3, 1, 0)
    if ours == "head/kernel":
        return array[:, :, 0, 0].T
    if array.shape[2] == 2:  # [I, O, row, column]
        return array.transpose(0, 2, 3, 1).reshape(array.shape[0], -1)
    outputs, inputs = array.shape[:2]
    return array.reshape(outputs // 4, 2, 2, inputs).transpose(3, 1, 2, 0).reshape(inputs, outputs)
