"""What every container of a slide gives: levels, and rectangles of their pixels."""

from typing import NamedTuple, Protocol

import numpy as np

MAX_SIDE = 2_000_000
"""Pixels. The largest scanners stay below 250,000."""


class SlideError(ValueError):
    """A slide that cannot be read; the message names the file and the remedy."""


class Level(NamedTuple):
    """One level of a pyramid.

    Attributes:
        width: pixels.
        height: pixels.
        downsample: (x, y), level-0 pixels per pixel of this level, from the levels' real sizes.
    """

    width: int
    height: int
    downsample: tuple[float, float]


class Bounds(NamedTuple):
    """The part of level 0 that was scanned, in level-0 pixels; QuPath shows a slide from there."""

    x: int
    y: int
    width: int
    height: int


class Pyramid(Protocol):
    """The levels of one open file. Threads may read at once."""

    @property
    def format(self) -> str:
        """What the container is, for reports ("Aperio SVS")."""
        ...

    @property
    def codec(self) -> str:
        """How level 0 is compressed."""
        ...

    @property
    def mpp(self) -> tuple[float, float] | None:
        """Micrometres per level-0 pixel (x, y) as the file states them, None where it does not."""
        ...

    @property
    def levels(self) -> tuple[Level, ...]:
        """From the finest to the coarsest."""
        ...

    @property
    def bounds(self) -> Bounds:
        """What was scanned; all of level 0 where the file does not say."""
        ...

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """uint8 [height, width, 3] of pixels of one level, in the level's own coordinates.

        Pixels beyond the level's edges are white.

        Raises:
            SlideError: the file is damaged there.
        """
        ...

    def close(self) -> None:
        """Releases the file."""
        ...


def levels_of(sizes: list[tuple[int, int]]) -> tuple[Level, ...]:
    """Levels from (width, height), the finest first."""
    finest = sizes[0]
    return tuple(
        Level(width, height, (finest[0] / width, finest[1] / height)) for width, height in sizes
    )
