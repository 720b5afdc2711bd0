"""Checkpoints: the server's state, the ledger and the position of a run, saved as one."""

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from fedjax_dp.federated.algorithms.base import ServerState


class Position(NamedTuple):
    """Where a checkpoint stands in its run.

    Attributes:
        round: rounds finished.
        ledger: `privacy.ledger.Ledger.to_json()`.
        charge_head: `privacy.ledger.ChargeLog.head`, "" without a charge log.
        seconds: wall time spent in rounds so far.
        device_seconds: the part of it that the devices worked.
        tiles: tiles visited so far, un-noised.
    """

    round: int
    ledger: dict[str, Any]
    charge_head: str
    seconds: float
    device_seconds: float
    tiles: int


class Checkpoints:
    """The checkpoints of one workdir.

    Guarantees: a checkpoint is whole or absent (Orbax renames a finished folder); state and ledger
    are of the same round.

    Args:
        folder: where they lie; made if absent.
        max_to_keep: older ones are deleted.
    """

    def __init__(self, folder: pathlib.Path, *, max_to_keep: int = 2):
        folder.mkdir(parents=True, exist_ok=True)  # Orbax makes none for one process of several
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=max_to_keep,
                create=False,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=False,
                multiprocessing_options=_alone(),
            ),
        )

    @property
    def latest_round(self) -> int | None:
        """Round of the newest whole checkpoint, None without one."""
        return self._manager.latest_step()

    def save(self, state: ServerState, position: Position) -> None:
        """Saves, durably, unless this round is saved already."""
        if self._manager.latest_step() == position.round:
            return
        self._manager.save(
            position.round,
            args=ocp.args.Composite(
                # Of the host: arrays of devices Orbax saves with all processes or not at all.
                state=ocp.args.StandardSave(jax.device_get(state)),
                position=ocp.args.JsonSave(position._asdict()),
            ),
        )
        self._manager.wait_until_finished()

    def restore(self, like: ServerState) -> tuple[ServerState, Position]:
        """The newest checkpoint, on the host, in the shapes and dtypes of `like`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it holds a state of other shapes.
        """
        step = self._manager.latest_step()
        if step is None:
            raise FileNotFoundError("There is no checkpoint to restore.")
        abstract = jax.device_get(like)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract),
                position=ocp.args.JsonRestore(),
            ),
        )
        return restored["state"], Position(**restored["position"])

    def close(self) -> None:
        """Waits for what is being saved."""
        self._manager.close()


def _alone() -> Any:
    """Of several processes of a run one saves, and each reads for itself: none waits for others."""
    here = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process_{here}"
    )


def load_params(folder: pathlib.Path, like: Any) -> Any:
    """The averaged parameters of the newest checkpoint in `folder`, for a warm start.

    Args:
        folder: the `checkpoints` folder of a workdir.
        like: parameters whose structure, shapes and dtypes are expected.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint is of another network.
    """
    missing = f"Expected model.init_from to hold a finished run, got {folder}."
    if not folder.is_dir():  # the manager would make it
        raise FileNotFoundError(missing)
    handlers: Any = {
        "state": ocp.StandardCheckpointHandler(),
        "position": ocp.JsonCheckpointHandler(),
    }
    options = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=_alone())
    with ocp.CheckpointManager(
        folder.absolute(), options=options, item_handlers=handlers
    ) as manager:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(missing)
        saved = jax.tree.map(
            lambda leaf: np.empty(leaf.shape, leaf.dtype), manager.item_metadata(step)["state"]
        )
        restored = manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(saved))
        )["state"]
    params = restored["averaged_params"]
    shapes = jax.tree.map(lambda leaf: leaf.shape, like)
    found = jax.tree.map(lambda leaf: leaf.shape, params)
    if shapes != found:
        raise ValueError(
            f"The checkpoint in {folder} is of another network. Use the same model.base_channels, "
            "model.depth and number of classes."
        )
    return params
