"""One step in PyTorch: not private, or private by Opacus in each of its modes.

python -m benchmarks.peers.clipping --only=torch,opacus,private
"""

from collections.abc import Callable
from typing import Any

import torch
from opacus.grad_sample import utils as opacus_modes
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

from benchmarks.peers import torch_unet
from benchmarks.peers.problem import NUM_CLASSES, Flat, Problem


class _TileLosses:
    """The criterion as Opacus's ghost mode wants it: with a reduction that it can switch off."""

    reduction = "mean"

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = torch_unet.tile_losses(logits, labels)
        return losses.mean() if self.reduction == "mean" else losses


class TorchPeer:
    """The step of one process; `benchmarks.peers.worker.Peer`."""

    def __init__(
        self,
        problem: Problem,
        *,
        mode: str = "none",
        channels_last: bool = False,
        compile: bool = False,
        up: str = "shuffle",
        learning_rate: float = 1e-12,
    ):
        """Builds model, optimiser and tensors.

        Args:
            problem: this process's part.
            mode: "none" is not private, else Opacus's "hooks", "functorch" or "ghost", or "func":
                no mode of Opacus, whose optimiser gets the gradients of `torch.func.vmap`.
            channels_last: memory format of tensors and kernels.
            compile: whether `torch.compile` gets the network and the loss.
            up: see `torch_unet.Up`.
            learning_rate: so small that no step moves a weight, and every repeat starts anew.
        """
        sizes = problem.sizes
        self.mode, self.compile = mode, compile
        self.batch, self.clip = sizes.batch, sizes.l2_clip_norm
        model = torch_unet.TorchUNet(
            NUM_CLASSES, base_channels=sizes.base_channels, depth=sizes.depth, up=up
        )
        torch_unet.load_flat(model, problem.weights)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        model = model.to(memory_format=memory_format)
        images = torch.from_numpy(problem.images).permute(0, 3, 1, 2).float() / 255.0
        self.images = images.contiguous(memory_format=memory_format)
        self.labels = torch.from_numpy(problem.labels).long()
        self._names = {id(p): name for name, p in model.named_parameters()}
        if compile and mode in ("hooks", "functorch", "ghost"):
            model.compile()
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=learning_rate)
        settings = {
            "noise_multiplier": sizes.noise_multiplier,
            "max_grad_norm": sizes.l2_clip_norm,
            "expected_batch_size": sizes.batch,
        }
        self.module: Any = model
        self.criterion: Any = _TileLosses()
        if mode == "ghost":
            self.module = opacus_modes.prepare_module(model, mode, max_grad_norm=self.clip)
            optimizer = DPOptimizerFastGradientClipping(optimizer, **settings)
            self.criterion = DPLossFastGradientClipping(self.module, optimizer, self.criterion)
        elif mode in ("hooks", "functorch"):
            self.module = opacus_modes.prepare_module(model, mode)
            optimizer = DPOptimizer(optimizer, **settings)
        elif mode == "func":
            optimizer = DPOptimizer(optimizer, **settings)
        self.optimizer = optimizer
        self._backward = self._per_tile() if mode == "func" else self._plain()

    def _plain(self) -> Callable[[torch.Tensor, torch.Tensor], None]:
        module, criterion = self.module, self.criterion

        def loss(images: torch.Tensor, labels: torch.Tensor) -> Any:
            return criterion(module(images), labels)

        if self.compile and self.mode == "none":
            loss = torch.compile(loss)
        return lambda images, labels: loss(images, labels).backward()

    def _per_tile(self) -> Callable[[torch.Tensor, torch.Tensor], None]:
        parameters = dict(self.module.named_parameters())

        def tile_loss(values: Any, image: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            logits = torch.func.functional_call(self.module, values, (image[None],))
            return torch_unet.tile_losses(logits, labels[None])[0]

        gradients = torch.func.vmap(torch.func.grad(tile_loss), in_dims=(None, 0, 0))
        if self.compile:
            gradients = torch.compile(gradients)

        def backward(images: torch.Tensor, labels: torch.Tensor) -> None:
            detached = {name: p.detach() for name, p in parameters.items()}
            for name, value in gradients(detached, images, labels).items():
                parameters[name].grad_sample = value

        return backward

    def backward(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Gradients of a batch, per tile where the mode has them, left at the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        self._backward(images, labels)

    def train_step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Gradients, clipping, noise and the optimiser."""
        self.backward(images, labels)
        self.optimizer.step()

    def step(self) -> None:
        """One timed step on this process's tiles."""
        self.train_step(self.images, self.labels)

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """By the names of `TorchUNet`, whatever wraps it."""
        return {self._names[id(p)]: p for p in self.module.parameters()}

    def summed(self) -> Flat:
        """The sum of the tiles' gradients, clipped where the mode clips, before noise."""
        self.backward(self.images, self.labels)
        named = self.named_parameters()
        if self.mode == "none":
            return torch_unet.to_flat({name: p.grad * self.batch for name, p in named.items()})
        if self.mode == "ghost":
            self.optimizer.accumulate()
        else:
            self.optimizer.clip_and_accumulate()
        flat = torch_unet.to_flat({name: p.summed_grad for name, p in named.items()})
        self.optimizer.zero_grad(set_to_none=True)
        return flat

    def info(self) -> dict[str, Any]:
        """Nothing beside what the worker knows itself."""
        return {"versions": {"torch": torch.__version__, "threads": torch.get_num_threads()}}


def make(problem: Problem, **options: Any) -> TorchPeer:
    """See `TorchPeer`."""
    return TorchPeer(problem, **options)
