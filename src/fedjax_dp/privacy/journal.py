"""Files of JSON lines that only grow, and whose every line is on disk before it counts."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO


def read_lines(file: BinaryIO, *, cut: bool) -> list[bytes]:
    """The whole lines of `file`, without their ends.

    Guarantees: `append` never returned for a line that lacks its end, so nothing that was to follow
    it happened; such a line is left out.

    Args:
        file: opened unbuffered for appending and reading; for reading alone where not `cut`.
        cut: whether to cut a torn line off the file, durably, so that none continues it. Only for
            who holds the file's lock: to anyone else the line may be one that is being written.
    """
    file.seek(0)
    body = file.read()
    whole = body[: body.rfind(b"\n") + 1]
    if cut and len(whole) < len(body):
        file.truncate(len(whole))
        os.fsync(file.fileno())
    return whole.splitlines()


def append(file: BinaryIO, record: Mapping[str, Any]) -> None:
    """Adds `record` as a line; returns when it is on disk.

    Args:
        file: opened unbuffered for appending, with no torn line at its end.
        record: of JSON types; its keys are sorted.

    Raises:
        OSError: the line could not be written whole; the file is as before.
    """
    line = json.dumps(record, sort_keys=True, allow_nan=False).encode() + b"\n"
    size = os.fstat(file.fileno()).st_size
    try:
        written = file.write(line)
        if written != len(line):
            raise OSError(f"Wrote {written} of {len(line)} bytes to {file.name}.")
        os.fsync(file.fileno())
    except BaseException:
        # Half a line must not be continued by the next one.
        with contextlib.suppress(OSError):
            file.truncate(size)
        raise


def sync_new(file: BinaryIO) -> None:
    """Makes a new file durable: itself, and its name, which lives in the folder."""
    os.fsync(file.fileno())
    folder = os.open(Path(file.name).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
