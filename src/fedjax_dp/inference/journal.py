"""Which blocks of a slide are done: what lets a stopped call go on."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any


class Journal:
    """Which blocks are done: a header line, and a line for each."""

    def __init__(self, path: pathlib.Path, header: Mapping[str, Any]) -> None:
        self.done: dict[int, list[list[float]]] = {}
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        if len(lines) > 1:  # a torn header never counted either
            self._check(path, json.loads(lines[0]), header)
            for line in lines[1:-1]:  # a torn last line never counted
                entry = json.loads(line)
                self.done[entry["block"]] = entry["fields"]
        whole = b"".join(line + b"\n" for line in lines[:-1])
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        if not whole:
            self._line(header)

    def add(self, number: int, fields: list[list[float]]) -> None:
        """Counts a block as done, durably."""
        self.done[number] = fields
        self._line({"block": number, "fields": self.done[number]})

    def _line(self, value: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    @staticmethod
    def _check(path: pathlib.Path, there: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
        unlike = [
            f"{name}: {there.get(name)!r} there, {mine.get(name)!r} now"
            for name in sorted({*there, *mine})
            if there.get(name) != mine.get(name)
        ]
        if unlike:
            raise ValueError(
                f"{path.parent} holds the work of another call ({'; '.join(unlike)}). Give the "
                "same settings to go on with it, or another --output."
            )

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
