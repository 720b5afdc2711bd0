"""The run's log: one JSON line a round, durable, and TensorBoard as a view of it.

metrics.jsonl is the truth; the event files are deleted and written again from it whenever a run
is opened or cut back, so both always tell the same story. What was not accounted reaches a log
only through `unwrap_nonprivate`.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from fedjax_dp.typing import NonPrivate

_MOST_CURVES = 64
"""Numbers of one kind, one a client, beyond which TensorBoard gets none; the lines have all."""


class MetricsLog:
    """Appends one line a round to `path`, and its numbers to TensorBoard beside it.

    Guarantees: when `append` returns, the line is on disk; a line torn by a crash is dropped when
    the log is opened; `cut_back` happens whole or not at all.

    Args:
        path: the JSON-lines file, made with its folder if missing; events go to the folder
            `tensorboard` beside it.

    Raises:
        ValueError: a line other than the last is not JSON, or has no round.

    Example:
        >>> with MetricsLog(workdir / "metrics.jsonl") as log:
        ...     log.append({"round": 1, "epsilon": {"max": 0.9}} | unwrap_nonprivate(aux))
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._last_round: int | None = None
        self._open(read_lines(self.path))

    @property
    def last_round(self) -> int | None:
        """Round of the last line; None before the first."""
        return self._last_round

    def lines(self) -> list[dict[str, Any]]:
        """The lines so far, oldest first, read back from the file.

        They are not kept: of a large population each names thousands of clients.
        """
        return read_lines(self.path)

    def append(self, line: Mapping[str, Any]) -> None:
        """Add one round.

        Args:
            line: must have an integer "round" above the last one's; no `NonPrivate` in it.

        Raises:
            ValueError: the round is missing or does not follow.
            TypeError: something in it has no JSON form, a `NonPrivate` for one.
        """
        text = to_json(line)
        plain = json.loads(text)
        last = self._last_round
        if type(plain.get("round")) is not int or (last is not None and plain["round"] <= last):
            raise ValueError(
                f"Expected a line with an integer 'round' after {last}, got "
                f"round={plain.get('round')!r}. After a restore call cut_back(round) first."
            )
        self._file.write(text + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._last_round = plain["round"]
        self._write_events(plain)

    def cut_back(self, last_round: int) -> None:
        """Forget every line after `last_round`, as after restoring a checkpoint of that round."""
        self.close()
        self._open([line for line in read_lines(self.path) if line["round"] <= last_round])

    def close(self) -> None:
        """Close the files; may be called twice."""
        self._file.close()
        self._events.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _open(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write the lines afresh, atomically, and the events from them; leave both open."""
        text = "".join(to_json(line) + "\n" for line in lines)
        if not self.path.exists() or self.path.read_bytes() != text.encode():
            write_text(self.path, text)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        folder = self.path.parent / "tensorboard"
        for stale in folder.glob("events.out.tfevents.*"):
            stale.unlink()
        self._events = SummaryWriter(str(folder))
        self._last_round = None
        for line in lines:
            self._last_round = line["round"]
            self._write_events(line)

    def _write_events(self, line: Mapping[str, Any]) -> None:
        for tag, value in flatten(line, most=_MOST_CURVES):
            if tag != "round" and isinstance(value, int | float) and not isinstance(value, bool):
                self._events.add_scalar(tag, value, line["round"])
        self._events.flush()


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; none where there is no file.

    A last line that is torn (no newline, or no JSON) is left out: the crash came before its
    round was reported.

    Raises:
        ValueError: an earlier line is not a JSON object with an integer "round".
    """
    path = Path(path)
    if not path.exists():
        return []
    *texts, torn = path.read_bytes().split(b"\n")
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            if type(line["round"]) is not int:
                raise ValueError(f"round={line['round']!r}")
        except (ValueError, TypeError, KeyError) as error:
            if number == len(texts) and not torn:
                break
            raise ValueError(
                f"Expected JSON with an integer 'round' in line {number} of {path}, got "
                f"{text[:80]!r}. The file was changed by hand: restore it or start a new workdir."
            ) from error
        lines.append(line)
    return lines


def unwrap_nonprivate(tree: Any) -> dict[str, Any]:
    """Un-noised values for the log, and the ONE place that unwraps `NonPrivate`.

    Args:
        tree: dicts, NamedTuples, dataclasses, lists, arrays and numbers, any of them inside
            `NonPrivate`. All of it goes under "nonprivate", wrapped or not: what arrives beside
            a non-private value is not proven to be private.

    Returns:
        {"nonprivate": the tree in plain Python}.
    """
    return {"nonprivate": _plain(tree, unwrap=True)}


def to_json(obj: Any, *, indent: int | None = None) -> str:
    """Standard JSON text of dicts, dataclasses, NamedTuples, sequences, paths, arrays, numbers.

    JSON knows no infinity, and an epsilon can be infinite: non-finite numbers become the strings
    "infinity", "-infinity" and "nan".

    Raises:
        TypeError: a value without such a form; a `NonPrivate`, which needs `unwrap_nonprivate`.
    """
    return json.dumps(_plain(obj, unwrap=False), indent=indent, allow_nan=False)


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `to_json(obj)`, indented, as `write_text` does."""
    write_text(path, to_json(obj, indent=2) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file so that a crash at any moment leaves the old one or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    # The rename itself lives in the folder, and is durable only when the folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def flatten(
    tree: Mapping[str, Any], prefix: str = "", *, most: int | None = None
) -> Iterator[tuple[str, Any]]:
    """(tag, leaf) of nested dicts, with the keys joined by "/".

    Args:
        tree: the dicts.
        prefix: of every tag.
        most: dicts of more entries are left out; None leaves none out.
    """
    for name, value in tree.items():
        if isinstance(value, Mapping):
            if most is None or len(value) <= most:
                yield from flatten(value, f"{prefix}{name}/", most=most)
        else:
            yield f"{prefix}{name}", value


def _plain(obj: Any, *, unwrap: bool) -> Any:
    """`obj` in dicts, lists, strings, finite numbers, booleans and None."""
    if isinstance(obj, NonPrivate):
        if not unwrap:
            raise TypeError(
                "Expected nothing NonPrivate outside of 'nonprivate/'. If this value may be "
                "logged, log unwrap_nonprivate(value)."
            )
        return _plain(obj.value, unwrap=True)
    if obj is None or isinstance(obj, bool | str):
        return obj
    if isinstance(obj, int):
        return int(obj)
    if isinstance(obj, float):
        if math.isfinite(obj):
            return float(obj)
        return "nan" if math.isnan(obj) else "infinity" if obj > 0 else "-infinity"
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if isinstance(obj, tuple) and hasattr(obj, "_asdict"):
        obj = obj._asdict()
    elif dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        obj = {f.name: getattr(obj, f.name) for f in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {str(name): _plain(value, unwrap=unwrap) for name, value in obj.items()}
    if isinstance(obj, list | tuple | set | frozenset):
        items = sorted(obj) if isinstance(obj, set | frozenset) else obj
        return [_plain(item, unwrap=unwrap) for item in items]
    if hasattr(obj, "__array__"):
        array = np.asarray(obj)
        if array.dtype.kind not in "biufSU":
            array = array.astype(np.float32)  # bfloat16 and its like are no NumPy kinds
        return _plain(array.tolist(), unwrap=unwrap)
    raise TypeError(f"Expected a value with a JSON form, got {type(obj).__name__}: {obj!r:.80}.")
