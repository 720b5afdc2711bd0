"""A run in several processes: one leads, the others lend it their devices.

All processes run the same experiment command, read the same data and compile the same programs
over one mesh. Only the leader, process 0, holds secrets, charges rounds, logs and saves. It tells
the others which program to call next, and on what, by the same collectives that the programs use:
there is no second channel. A process that dies breaks the next collective of all others.
"""

import enum
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fedjax_dp.assembly.programs import Device, Programs
from fedjax_dp.federated import cohort
from fedjax_dp.federated.algorithms.base import ServerState
from fedjax_dp.federated.cohort import AnyChunk, CohortChunk
from fedjax_dp.federated.packing import filled, pack, without_pixels
from fedjax_dp.typing import ServerRelease


class _Order(enum.IntEnum):
    BEGIN = 0
    VISIT = 1
    FINISH = 2
    RESTORE = 3
    END = 4


def join(coordinator: str, count: int, index: int) -> None:
    """Makes this process one of several; to be called before JAX is used.

    On CPU the processes talk by gloo, on GPU by NCCL.

    Args:
        coordinator: host:port, which process 0 opens.
        count: processes.
        index: which this one is, from 0; process 0 leads.
    """
    jax.distributed.initialize(coordinator, count, index)
    # The connections are made by the first collective, and only half a minute is given to that.
    _told(np.int32(0))


def is_leader() -> bool:
    """Whether this process holds secrets, charges, logs and saves."""
    return jax.process_index() == 0


def agreed(numbers: Sequence[int]) -> list[int]:
    """The leader's numbers, in every process; the others give as many."""
    return [int(n) for n in _told(np.asarray(numbers, np.int32))]


@contextmanager
def leading(programs: Programs) -> Iterator[Programs]:
    """The programs of the leader: each call makes the other processes call the same.

    At the end, and where an error ends it, the others are told to go. Where this process is alone,
    these are the programs themselves.
    """
    if jax.process_count() == 1:
        yield programs
        return

    def begin(state: ServerState) -> Any:
        _tell(_Order.BEGIN)
        return programs.begin(state)

    def visit(acc: Any, state: ServerState, chunk: AnyChunk) -> Any:
        _tell(_Order.VISIT, without_pixels(chunk))
        # Two programs under way at once could reach their collectives in different orders.
        return jax.block_until_ready(programs.visit(acc, state, chunk))

    def finish(state: ServerState, acc: Any, release: ServerRelease) -> ServerState:
        _tell(_Order.FINISH, release)
        return programs.finish(state, acc, release)

    try:
        yield programs._replace(begin=begin, visit=visit, finish=finish)
    except BaseException:
        with suppress(Exception):  # where another process died, that is the error to show
            _tell(_Order.END)
        raise
    _tell(_Order.END)


def restored(state: ServerState, device: Device) -> ServerState:
    """A state that the leader read from a checkpoint, on the devices of all processes."""
    if jax.process_count() > 1:
        _tell(_Order.RESTORE, state)
    return cohort.place(state, cohort.replicated(device.mesh))


def follow(programs: Programs, device: Device, chunk: CohortChunk, release: ServerRelease) -> None:
    """Calls what the leader calls, until it says that it is done.

    Args:
        programs: compiled as the leader's are.
        device: where they run.
        chunk: of the shapes of every chunk, not packed.
        release: of the shapes of every release.
    """
    state, acc = device.state, None
    numbers = without_pixels(pack(chunk, device.packing))
    while (order := _told(np.int32(0))) != _Order.END:
        if order == _Order.BEGIN:
            acc = programs.begin(state)
        elif order == _Order.VISIT:
            # Each process reads its own clients' tiles: pixels are not told.
            told = filled(_told(numbers), device.packing)
            acc, _, info = programs.visit(acc, state, told)
            jax.block_until_ready(info)  # one call at a time, as the leader does
        elif order == _Order.FINISH:
            state = programs.finish(state, acc, _told(release))
        else:
            state = cohort.place(_told(state), cohort.replicated(device.mesh))


def _tell(order: _Order, payload: Any = None) -> None:
    _told(np.int32(order))
    if payload is not None:
        _told(payload)


def _told(payload: Any) -> Any:
    """What the leader says; in the others `payload` gives structure, shapes and dtypes alone."""
    if jax.process_count() == 1:
        return payload
    raw = jax.tree.map(np.asarray, cohort.raw_keys(payload))
    heard = multihost_utils.broadcast_one_to_all(raw, is_source=is_leader())
    return cohort.typed_keys(jax.tree.map(np.asarray, heard), payload)
