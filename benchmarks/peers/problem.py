"""What does every peer work on? One set of weights and tiles, in a file of NumPy arrays.

    python -m benchmarks.peers.clipping --output=benchmarks/results/peers.jsonl

makes the file and hands its path to the workers. Weights have the names of our parameters,
"Conv_0/Conv_0/kernel"; `flax_unet` and `torch_unet` translate.
"""

import dataclasses
import json
import pathlib

import numpy as np

NUM_CLASSES = 2
NUM_GROUPS = 8
IGNORE = 255

Flat = dict[str, np.ndarray]
"""Arrays by the names of our parameters, joined by slashes, in our layouts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """The numbers of a problem.

    Attributes:
        base_channels: channels of the U-Net's first level.
        depth: its poolings.
        tile_size: side of a tile, pixels.
        batch: tiles of one step, over all processes of an arrangement.
        steps: local steps of a client's round.
        clients: clients of a round.
        l2_clip_norm: of a tile's gradient.
        noise_multiplier: the noise's standard deviation over the clip norm.
        learning_rate: of plain SGD. Of a single step it is large, so that the gradient can be read
            from the change of parameters without losing digits; every repeat starts anew.
    """

    base_channels: int = 16
    depth: int = 4
    tile_size: int = 128
    batch: int = 8
    steps: int = 1
    clients: int = 1
    l2_clip_norm: float = 2.0
    noise_multiplier: float = 1.0
    learning_rate: float = 1024.0

    @property
    def num_tiles(self) -> int:
        """Tiles that one call works on, each of them once."""
        return self.batch * self.steps * self.clients


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes, weights and tiles.

    Attributes:
        sizes: its numbers.
        weights: parameters to start from.
        images: uint8 [N, H, W, 3], N = clients x steps x batch, in this order.
        labels: uint8 [N, H, W], 255 = ignore.
    """

    sizes: Sizes
    weights: Flat
    images: np.ndarray
    labels: np.ndarray

    def save(self, path: pathlib.Path) -> None:
        """Writes it as one npz file."""
        arrays = {f"weight:{name}": array for name, array in self.weights.items()}
        sizes = json.dumps(dataclasses.asdict(self.sizes))
        np.savez(path, sizes=sizes, images=self.images, labels=self.labels, **arrays)

    def part(self, index: int, count: int) -> "Problem":
        """The `index`-th of `count` equal parts of a single step's batch."""
        if self.sizes.batch % count or self.sizes.num_tiles != self.sizes.batch:
            raise ValueError(
                f"Expected one step of a batch divisible by {count} processes, got {self.sizes}."
            )
        size = self.sizes.batch // count
        mine = slice(index * size, (index + 1) * size)
        sizes = dataclasses.replace(self.sizes, batch=size)
        return Problem(sizes, self.weights, self.images[mine], self.labels[mine])


def load(path: str | pathlib.Path) -> Problem:
    """Reads what `Problem.save` wrote."""
    with np.load(path) as file:
        prefix = "weight:"
        weights = {k.removeprefix(prefix): file[k] for k in file.files if k.startswith(prefix)}
        sizes = Sizes(**json.loads(str(file["sizes"])))
        return Problem(sizes, weights, file["images"], file["labels"])


def make(sizes: Sizes, weights: Flat, seed: int = 0) -> Problem:
    """Tiles on which gradients differ in size: discs of many radii, some with an ignored border.

    The biases of the normalisations become +4 and -4 in turn. Freshly drawn weights leave a few
    activations within rounding of ReLU's kink, where float32 decides the derivative: any two
    implementations, PyTorch's two memory formats among them, then differ by some 1e-3, and a check
    at 1e-4 could not tell a fault from that. With these biases half of the channels are on, half
    are off, and none is in doubt. Speed does not depend on values.
    """
    signs = np.array([4.0, -4.0], np.float32)
    weights = {
        name: np.resize(signs, array.shape)
        if name.startswith("GroupNorm") and "bias" in name
        else array
        for name, array in weights.items()
    }
    rng = np.random.default_rng(seed)
    count, side = sizes.num_tiles, sizes.tile_size
    centred = np.abs(np.mgrid[:side, :side] - side / 2)
    radius = rng.uniform(0.1, 0.6, (count, 1, 1)) * side
    labels = (np.hypot(*centred) < radius).astype(np.uint8)
    contrast = rng.uniform(20.0, 80.0, (count, 1, 1, 3))
    images = 200.0 - contrast * labels[..., None] + rng.normal(0.0, 20.0, (count, side, side, 3))
    labels[::2, : side // 8] = IGNORE
    return Problem(sizes, weights, images.clip(0, 255).astype(np.uint8), labels)


def relative_error(value: Flat, reference: Flat) -> float:
    """L2 norm of the difference over that of the reference, all arrays together.

    Raises:
        ValueError: if names or shapes differ.
    """
    shapes = [{name: array.shape for name, array in flat.items()} for flat in (value, reference)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"Expected arrays {shapes[1]}, got {shapes[0]}.")
    square = sum(float(np.sum((value[n] - reference[n]).astype(float) ** 2)) for n in reference)
    total = sum(float(np.sum(reference[n].astype(float) ** 2)) for n in reference)
    return float(np.sqrt(square / total))
