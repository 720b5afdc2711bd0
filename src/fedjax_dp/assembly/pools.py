"""Whether the training tiles lie on the devices, or are packed for each chunk from the host's."""

import os
from typing import Literal, get_args

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from fedjax_dp.data.tiles import TileTable
from fedjax_dp.federated import cohort
from fedjax_dp.typing import TilePool

PoolPlace = Literal["auto", "resident", "packed"]

DEVICE_SHARE = 0.5
"""Of an accelerator's memory, what a resident pool may take: the network needs the rest."""

HOST_SHARE = 0.25
"""Of the host's memory, what a resident pool may take on CPU: the host's own copy is there, too."""

_ALIGNMENT = 64
_COPIED_TILES = 256


def resolve_pool(setting: str, table: TileTable, mesh: Mesh) -> str:
    """Where the pool lies: "resident" or "packed", in every process the same.

    Args:
        setting: `config.ExecutionConfig.pool`; "auto" is resident where it fits.
        table: the training tiles; they are not read.
        mesh: the devices.

    Raises:
        ValueError: an unknown setting.
    """
    if setting not in get_args(PoolPlace):
        raise ValueError(f"Expected execution.pool in {get_args(PoolPlace)}, got {setting!r}.")
    if setting != "auto":
        return setting
    fits = pool_bytes(table) <= room(mesh)
    if jax.process_count() > 1:  # one that has no room decides for all: they share one program
        fits = bool(multihost_utils.process_allgather(np.bool_(fits)).all())
    return "resident" if fits else "packed"


def resident_pool(table: TileTable, mesh: Mesh) -> TilePool:
    """The training tiles on all devices of the mesh; of CPU devices one copy serves all.

    XLA's CPU devices read an array of the host in place if it begins at a multiple of 64 bytes, so
    the table's arrays are not to be written to afterwards.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    arrays = [
        _aligned(array) if on_cpu or not isinstance(array, np.ndarray) else array
        for array in (table.images, table.labels)
    ]
    return cohort.place(TilePool(*arrays), cohort.replicated(mesh))


def _aligned(array: np.ndarray) -> np.ndarray:
    """The array itself if it begins at a multiple of `_ALIGNMENT` bytes, else a copy that does.

    Pixels of a tile store are read into the copy part by part.
    """
    is_plain = isinstance(array, np.ndarray) and array.flags.c_contiguous
    if is_plain and array.ctypes.data % _ALIGNMENT == 0:
        return array
    buffer = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    for begin in range(0, len(array), _COPIED_TILES):
        copy[begin : begin + _COPIED_TILES] = array[begin : begin + _COPIED_TILES]
    return copy


def pool_bytes(table: TileTable) -> int:
    """Bytes of all training tiles and their labels."""
    return int(np.prod(table.images.shape) + np.prod(table.labels.shape))


def room(mesh: Mesh) -> int:
    """Bytes that a resident pool may take on each of this process's devices."""
    devices = mesh.local_devices
    if devices[0].platform == "cpu":  # all of them share the host's memory, and one copy
        return int(HOST_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices]
    return int(DEVICE_SHARE * min(limits))
