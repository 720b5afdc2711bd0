"""A label map as large as a slide, on disk, read and written in rectangles."""

import os
import pathlib
from typing import Protocol

import numpy as np

NOT_ANALYSED = 255
"""Of pixels that no model saw."""


class LabelMap(Protocol):
    """Labels of a grid of pixels, uint8, 255 = not analysed."""

    @property
    def height(self) -> int:
        """Pixels."""
        ...

    @property
    def width(self) -> int:
        """Pixels."""
        ...

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """uint8 [height, width] of a rectangle within the map."""
        ...


class LabelFile:
    """One byte for each pixel in a file, without a header.

    What was never written takes no room on disk and reads as `NOT_ANALYSED` (bytes are stored
    inverted). Reads and writes go past the process's memory: mapped pages would count as its own.
    """

    def __init__(self, path: pathlib.Path, height: int, width: int) -> None:
        """Opens the file, or makes it.

        Raises:
            OSError: it cannot be written.
            ValueError: it is there with another size.
        """
        if height < 1 or width < 1:
            raise ValueError(f"Expected a map of at least one pixel, got {width} x {height}.")
        self.height, self.width = height, width
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        size = os.fstat(self._descriptor).st_size
        if size not in (0, height * width):
            os.close(self._descriptor)
            raise ValueError(
                f"Expected {height * width:,} bytes in {path}, got {size:,}: it is of another "
                "slide or scale. Give another --output."
            )
        os.truncate(self._descriptor, height * width)

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """uint8 [height, width] of a rectangle within the map."""
        self._check(y, x, height, width)
        if width == self.width:
            data = os.pread(self._descriptor, height * width, y * width)
            return ~np.frombuffer(data, np.uint8).reshape(height, width)
        found = np.empty((height, width), np.uint8)
        for row in range(height):
            data = os.pread(self._descriptor, width, (y + row) * self.width + x)
            found[row] = np.frombuffer(data, np.uint8)
        return ~found

    def write(self, y: int, x: int, labels: np.ndarray) -> None:
        """Writes uint8 [h, w] at a place within the map.

        Raises:
            OSError: the disk is full.
        """
        height, width = labels.shape
        self._check(y, x, height, width)
        stored = ~np.ascontiguousarray(labels, np.uint8)
        if width == self.width:
            self._put(stored.tobytes(), y * width)
            return
        for row in range(height):
            # Holes stay holes, and what is there is written over.
            if stored[row].any() or (self.read(y + row, x, 1, width) != NOT_ANALYSED).any():
                self._put(stored[row].tobytes(), (y + row) * self.width + x)

    def _put(self, data: bytes, offset: int) -> None:
        while data:
            written = os.pwrite(self._descriptor, data, offset)
            data, offset = data[written:], offset + written

    def sync(self) -> None:
        """Makes durable what was written."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Releases the file."""
        os.close(self._descriptor)

    def _check(self, y: int, x: int, height: int, width: int) -> None:
        fits = 0 <= y <= y + height <= self.height and 0 <= x <= x + width <= self.width
        if not fits:
            raise ValueError(
                f"Expected a rectangle within {self.width} x {self.height} pixels, got "
                f"{width} x {height} at {x}, {y}."
            )
