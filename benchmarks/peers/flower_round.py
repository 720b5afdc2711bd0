"""A whole private round of Flower's simulation with Opacus in its clients.

    python -m benchmarks.peers.round --only=flower

The server's loop is that of Flower's `Strategy.start`, without evaluation, one round each time it
is asked; starting the simulation and its actors is not timed. Actors keep model, optimiser and
tiles from round to round, and parameters travel as Flower's arrays.
"""

import functools
import pathlib
import queue
import resource
import tempfile
import threading
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.peers import problem as problems
from benchmarks.peers import torch_unet
from benchmarks.peers.problem import NUM_CLASSES, Flat, Problem
from benchmarks.peers.torch_steps import TorchPeer

_TIMEOUT = 600.0


@functools.lru_cache(maxsize=1)  # an actor serves many clients and rounds
def _peer(path: str, mode: str, channels_last: bool) -> tuple[Problem, TorchPeer]:
    torch.set_num_threads(1)
    problem = problems.load(path)
    peer = TorchPeer(
        problem,
        mode=mode,
        channels_last=channels_last,
        learning_rate=problem.sizes.learning_rate,
    )
    return problem, peer


def _train(message: Message, context: Context) -> Message:
    """What a client does: its local steps, each on its own batch."""
    config = message.content["config"]
    problem, peer = _peer(config["problem"], config["mode"], config["channels_last"])
    sizes = problem.sizes
    tensors = dict(peer.named_parameters())
    with torch.no_grad():
        for name, value in message.content["arrays"].to_torch_state_dict().items():
            tensors[name].copy_(value)
    peer.optimizer.noise_multiplier = config["noise_multiplier"]
    first = int(context.node_config["partition-id"]) * sizes.steps * sizes.batch
    for step in range(sizes.steps):
        mine = slice(first + step * sizes.batch, first + (step + 1) * sizes.batch)
        peer.train_step(peer.images[mine], peer.labels[mine])
    arrays = ArrayRecord({name: tensor.detach() for name, tensor in tensors.items()})
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    metrics = MetricRecord({"num-examples": sizes.steps * sizes.batch, "peak-bytes": peak})
    content = RecordDict({"arrays": arrays, "metrics": metrics})
    return Message(content=content, reply_to=message)


client_app = ClientApp()
client_app.train()(_train)


class FlowerRound:
    """The server's side of a simulation that waits between rounds; `worker.Peer`."""

    def __init__(
        self, problem: Problem, *, mode: str, channels_last: bool = False, actors: int = 2
    ):
        """Starts the simulation.

        Args:
            problem: whose sizes have clients, steps and batch.
            mode: see `TorchPeer`.
            channels_last: see `TorchPeer`.
            actors: processes of one core each that serve the clients.
        """
        self._folder = tempfile.TemporaryDirectory()
        path = pathlib.Path(self._folder.name) / "problem.npz"
        problem.save(path)
        self._weights, self._sizes, self._actors = problem.weights, problem.sizes, actors
        self._settings = {"problem": str(path), "mode": mode, "channels_last": channels_last}
        model = torch_unet.TorchUNet(
            NUM_CLASSES, base_channels=problem.sizes.base_channels, depth=problem.sizes.depth
        )
        torch_unet.load_flat(model, problem.weights)
        self._arrays = ArrayRecord(model.state_dict())
        self._asked: queue.Queue = queue.Queue()
        self._done: queue.Queue = queue.Queue()
        self._actor_bytes = 0
        app = ServerApp()
        app.main()(self._serve)
        backend = {
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": actors, "include_dashboard": False},
        }

        def simulate() -> None:
            try:
                run_simulation(
                    app, client_app, num_supernodes=self._sizes.clients, backend_config=backend
                )
                self._done.put(RuntimeError("Flower's simulation ended."))
            except BaseException as error:
                self._done.put(error)

        self._thread = threading.Thread(target=simulate, daemon=True)
        self._thread.start()

    def _serve(self, grid: Grid, context: Context) -> None:
        """Rounds on demand, inside Flower's server; None ends it."""
        del context
        clients = self._sizes.clients
        strategy = FedAvg(
            fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        number = 0
        while (noise_multiplier := self._asked.get()) is not None:
            number += 1
            config = ConfigRecord({**self._settings, "noise_multiplier": noise_multiplier})
            messages = strategy.configure_train(number, self._arrays, config, grid)
            replies = list(grid.send_and_receive(messages=messages, timeout=_TIMEOUT))
            failed = [reply.error for reply in replies if reply.has_error()]
            if failed or len(replies) != clients:
                self._done.put(RuntimeError(f"{len(replies)} clients answered, {failed}"))
                continue
            peaks = {reply.content["metrics"]["peak-bytes"] for reply in replies}
            arrays, _ = strategy.aggregate_train(number, replies)
            self._actor_bytes = max(self._actor_bytes, self._actors * max(peaks))
            self._done.put(arrays)

    def _round(self, noise_multiplier: float) -> ArrayRecord:
        self._asked.put(float(noise_multiplier))
        arrays = self._done.get(timeout=_TIMEOUT)
        if isinstance(arrays, BaseException):
            raise arrays
        return arrays

    def step(self) -> None:
        """One timed round."""
        self._round(self._sizes.noise_multiplier)

    def summed(self) -> Flat:
        """The clients' mean model delta, without noise."""
        after = torch_unet.to_flat(self._round(0.0).to_torch_state_dict())
        return {name: after[name] - self._weights[name] for name in after}

    def info(self) -> dict[str, Any]:
        """Memory of the actors beside the server's process."""
        return {"children_bytes": self._actor_bytes}

    def close(self) -> None:
        """Ends the simulation."""
        self._asked.put(None)
        self._thread.join(timeout=60)
        self._folder.cleanup()


def make(problem: Problem, **options: Any) -> FlowerRound:
    """See `FlowerRound`."""
    return FlowerRound(problem, **options)
