"""Draws many tiles on several cores.

Threads do not help: a tile is hundreds of small array operations, and the interpreter's lock is
between them. Forking after jax was imported may hang, and `multiprocessing`'s spawn imports the
caller's main module again. So the workers are plain processes that know nothing but this file.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import IO

import numpy as np

from fedjax_dp.data.synthetic_tile import TileId, TileSpec, draw_tile
from fedjax_dp.processor import cores

_MIN_TILES_OF_A_WORKER = 100  # starting one takes as long as drawing about this many
_COMMAND = "from fedjax_dp.data.synthetic_workers import main; main()"

Progress = Callable[[int, int], None]
"""Called with (tiles drawn, tiles in all) every now and then."""


def draw_tiles(
    spec: TileSpec,
    tile_ids: Sequence[TileId],
    *,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, H, W, 3] and labels uint8 [N, H, W] of `tile_ids`, in their order.

    Guarantees: the result does not depend on `num_workers`.

    Args:
        spec: what the tiles have in common.
        tile_ids: which tiles.
        num_workers: processes; None for as many as there are cores, and fewer for few tiles.
        progress: told how far the drawing is, on the calling thread.

    Raises:
        ValueError: if `num_workers` < 1.
        RuntimeError: if a worker process fails.
    """
    if num_workers is None:
        num_workers = max(min(cores(), len(tile_ids) // _MIN_TILES_OF_A_WORKER), 1)
    if num_workers < 1:
        raise ValueError(f"Expected num_workers >= 1 or None, got {num_workers}.")
    size = spec.tile_size
    images = np.zeros((len(tile_ids), size, size, 3), np.uint8)
    labels = np.zeros((len(tile_ids), size, size), np.uint8)
    if num_workers == 1:
        for index, tile_id in enumerate(tile_ids):
            images[index], labels[index] = draw_tile(spec, tile_id)
            if progress is not None and (index % 50 == 49 or index + 1 == len(tile_ids)):
                progress(index + 1, len(tile_ids))
    else:
        _draw_with_processes(spec, tile_ids, num_workers, progress, images, labels)
    return images, labels


def _draw_with_processes(
    spec: TileSpec,
    tile_ids: Sequence[TileId],
    num_workers: int,
    progress: Progress | None,
    images: np.ndarray,
    labels: np.ndarray,
) -> None:
    drawn = [0] * num_workers

    def feed_and_read(worker: int, process: subprocess.Popen[bytes]) -> None:
        request = {
            "spec": dataclasses.asdict(spec),
            "tile_ids": [list(map(int, tile_id)) for tile_id in tile_ids[worker::num_workers]],
        }
        try:
            with _pipe(process.stdin) as stdin:
                stdin.write(json.dumps(request).encode())
            for index in range(worker, len(tile_ids), num_workers):
                _read_into(_pipe(process.stdout), images[index])
                _read_into(_pipe(process.stdout), labels[index])
                drawn[worker] += 1
        except (EOFError, OSError) as error:
            raise RuntimeError(
                f"A process that draws synthetic tiles ended with code {process.wait()}; its error "
                "is printed above. Pass num_workers=1 to draw in this process."
            ) from error

    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(_start()) for _ in range(num_workers)]
        pool = stack.enter_context(ThreadPoolExecutor(num_workers))
        try:
            pending = {
                pool.submit(feed_and_read, worker, process)
                for worker, process in enumerate(processes)
            }
            while pending:
                done, pending = wait(pending, timeout=0.5)
                for future in done:
                    future.result()
                if progress is not None:
                    progress(sum(drawn), len(tile_ids))
        except BaseException:  # Ctrl-C too, or the readers would wait for all the tiles
            for process in processes:
                process.kill()
            raise


def _start() -> subprocess.Popen[bytes]:
    paths = [path for path in sys.path if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise RuntimeError("The worker was started without pipes.")
    return stream


def _read_into(stream: IO[bytes], array: np.ndarray) -> None:
    """Fills a contiguous uint8 array from a pipe."""
    view = array.reshape(-1).data
    while len(view):
        count = stream.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise EOFError("the pipe ended early")
        view = view[count:]


def main() -> None:
    """A worker: reads one request from standard input, writes raw pixels to standard output."""
    request = json.load(sys.stdin)
    spec = TileSpec(**request["spec"])
    for tile_id in request["tile_ids"]:
        image, label = draw_tile(spec, TileId(*tile_id))
        sys.stdout.buffer.write(image.tobytes())
        sys.stdout.buffer.write(label.tobytes())
    sys.stdout.buffer.flush()
