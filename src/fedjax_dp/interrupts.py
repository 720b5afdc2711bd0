"""Stopping between pieces of work instead of in their middle."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop and has saved its last whole round."""


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Notes SIGINT and SIGTERM in the list it yields; a second one ends the program at once.

    Outside the main thread Python delivers no signals, and nothing is changed.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: Any) -> None:
        del frame
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
