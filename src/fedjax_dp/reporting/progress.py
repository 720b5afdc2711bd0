"""Signs of life during work that has no rounds to count."""

import contextlib
import threading
from collections.abc import Iterator

from tqdm import tqdm


@contextlib.contextmanager
def busy(message: str, *, show: bool = True) -> Iterator[None]:
    """Shows `message` and the seconds that pass until the block ends.

    Args:
        message: what is being done.
        show: False shows nothing.
    """
    if not show:
        yield
        return
    done = threading.Event()
    with tqdm(desc=message, bar_format="{desc} ... {elapsed}", dynamic_ncols=True) as bar:

        def tick() -> None:
            while not done.wait(1.0):
                bar.refresh()

        thread = threading.Thread(target=tick, name="busy", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
