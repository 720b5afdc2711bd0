"""Whole slides: regions of any size at any scale, from files that hold gigapixels."""

import contextlib
import math
import os
import pathlib
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import tifffile

from fedjax_dp.data.manifest import MAX_MPP, MIN_MPP
from fedjax_dp.data.pyramids.base import Bounds, Level, Pyramid, SlideError
from fedjax_dp.data.pyramids.openslide import OpenSlidePyramid
from fedjax_dp.data.pyramids.resolution import plausible
from fedjax_dp.data.pyramids.segments import CACHE_BYTES
from fedjax_dp.data.pyramids.tiff import TiffPyramid
from fedjax_dp.data.resampling import resample

MAX_REGION_PIXELS = 2**27
"""Of one answer of `Slide.read_region`; larger ones are asked for in parts."""

_LEVEL_TOLERANCE = 1.01
"""A level that is coarser by less than this is taken: sizes of levels are rounded."""

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class FileState(NamedTuple):
    """What tells whether a file is the one that was opened."""

    size: int
    modified_ns: int


class Slide:
    """An open slide. Threads may read from it at once.

    Attributes:
        path: of the file.
        mpp: (x, y), micrometres per level-0 pixel.
        levels: from the finest to the coarsest, with real downsamples.
        bounds: what was scanned, level-0 pixels; annotations may count from there.
        format: of the container, for reports.
        codec: how level 0 is compressed.
        state: of the file when it was opened.
    """

    def __init__(
        self, path: pathlib.Path, pyramid: Pyramid, mpp: tuple[float, float], state: FileState
    ) -> None:
        self.path, self.mpp, self.state = path, mpp, state
        self._pyramid = pyramid
        self.levels: tuple[Level, ...] = pyramid.levels
        self.bounds: Bounds = pyramid.bounds
        self.format, self.codec = pyramid.format, pyramid.codec

    @property
    def dimensions(self) -> tuple[int, int]:
        """(width, height) of level 0, pixels."""
        return self.levels[0].width, self.levels[0].height

    def read_region(
        self, x: float, y: float, width: int, height: int, mpp: float | None = None
    ) -> np.ndarray:
        """A rectangle of the slide.

        Output pixel (i, j) covers level-0 pixels `[x + i s, x + (i + 1) s)` and likewise in y, with
        `s = mpp / self.mpp` of the axis. It is resampled from the next finer level, see
        `resampling.resample`; where that needs no resampling, pixels are those of the file.

        Args:
            x: of the top left corner, level-0 pixels; may be negative or a fraction.
            y: likewise.
            width: OUTPUT pixels.
            height: OUTPUT pixels.
            mpp: micrometres per output pixel, the same in both axes; None = level 0 as it is.

        Returns:
            uint8 [height, width, 3], RGB, white beyond the slide's edges.

        Raises:
            SlideError: the file is damaged there; or an argument out of range.
        """
        if not (width > 0 and height > 0 and width * height <= MAX_REGION_PIXELS):
            raise SlideError(
                f"Expected a region of 1 to {MAX_REGION_PIXELS:,} pixels, got {width} x {height}. "
                "Read it in parts."
            )
        if not (math.isfinite(x) and math.isfinite(y) and max(abs(x), abs(y)) < 2**40):
            raise SlideError(f"Expected a corner in level-0 pixels, got {x=}, {y=}.")
        scale = (1.0, 1.0)
        if mpp is not None:
            if not (math.isfinite(mpp) and mpp > 0):
                raise SlideError(f"Expected mpp > 0 micrometres per pixel, got {mpp=}.")
            scale = _near_one(mpp / self.mpp[0]), _near_one(mpp / self.mpp[1])
        number = self._level_for(scale)
        dx, dy = self.levels[number].downsample

        def read(x: int, y: int, width: int, height: int) -> np.ndarray:
            return self._pyramid.read(number, x, y, width, height)

        in_level = _near_one(scale[0] / dx), _near_one(scale[1] / dy)
        return resample(read, (x / dx, y / dy), in_level, width, height)

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Pixels of one level as the file has them.

        Args:
            level: index into `levels`.
            x: of the top left corner, in the LEVEL's pixels; may lie beyond its edges.
            y: likewise.
            width: pixels.
            height: pixels.

        Returns:
            uint8 [height, width, 3], white beyond the edges.

        Raises:
            SlideError: the file is damaged there.
        """
        return self._pyramid.read(level, x, y, width, height)

    def check_unchanged(self) -> None:
        """Refuses a file that is no longer the one that was opened.

        Raises:
            SlideError: it was changed, replaced or removed.
        """
        if _state(self.path) != self.state:
            raise SlideError(
                f"{self.path} was changed while it was read. Wait until it is copied, and start "
                "again."
            )

    def close(self) -> None:
        """Releases the file."""
        self._pyramid.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _level_for(self, scale: tuple[float, float]) -> int:
        """The coarsest level that is not coarser than the output."""
        fine_enough = [
            number
            for number, level in enumerate(self.levels)
            if level.downsample[0] <= scale[0] * _LEVEL_TOLERANCE
            and level.downsample[1] <= scale[1] * _LEVEL_TOLERANCE
        ]
        return fine_enough[-1] if fine_enough else 0


def open_slide(
    path: str | os.PathLike[str],
    mpp: float | tuple[float, float] | None = None,
    *,
    cache_bytes: int = CACHE_BYTES,
) -> Slide:
    """Opens a slide: SVS, OME-TIFF, pyramidal or plain TIFF; other vendors through OpenSlide.

    Args:
        path: of the file, recognised by its content.
        mpp: micrometres per level-0 pixel, (x, y) or one number for both, instead of what the file
            says; None = as the file says.
        cache_bytes: of decoded tiles that are kept, for regions side by side.

    Returns:
        The open slide; close it, or use it in a `with` statement.

    Raises:
        SlideError: the file is missing, damaged, of a kind that is not supported, or does not say
            how large its pixels are and nobody else did.
    """
    path = pathlib.Path(path)
    stated = None if mpp is None else _checked(mpp)
    state = _state(path)
    pyramid = _open(path, cache_bytes)
    found = stated or pyramid.mpp
    if found is None:
        with contextlib.suppress(Exception):
            pyramid.close()
        raise SlideError(
            f"{path} ({pyramid.format}) does not say how large its pixels are. Pass mpp=, "
            "micrometres per pixel (about 0.25 at 40x, 0.5 at 20x): in the column mpp of the table "
            "of sites, or as --slide_mpp."
        )
    return Slide(path, pyramid, found, state)


def _open(path: pathlib.Path, cache_bytes: int) -> Pyramid:
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise SlideError(f"Cannot open {path}: {error.strerror or error}.") from error
    if not head:
        raise SlideError(f"Expected a slide, got {path}, which is empty. Copy it again.")
    if head not in _TIFF or _is_of_other_vendor(path):
        return OpenSlidePyramid(path)
    return TiffPyramid(path, cache_bytes)


def _is_of_other_vendor(path: pathlib.Path) -> bool:
    """Whether a TIFF is of a kind whose tiles do not lie on one plain grid."""
    try:
        with tifffile.TiffFile(path, is_ndpi=False) as tiff:
            page = tiff.pages.first
            return page.is_ndpi or page.is_philips or page.is_scn or page.is_bif
    except Exception:  # damaged: `TiffPyramid` tells in which way
        return False


def _checked(mpp: float | tuple[float, float]) -> tuple[float, float]:
    x, y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    if plausible(x, y) is None:
        raise SlideError(
            f"Expected {MIN_MPP} <= mpp <= {MAX_MPP} micrometres per pixel, got {mpp=}."
        )
    return float(x), float(y)


def _state(path: pathlib.Path) -> FileState:
    try:
        status = path.stat()
    except OSError as error:
        raise SlideError(f"Cannot open {path}: {error.strerror or error}.") from error
    return FileState(status.st_size, status.st_mtime_ns)


def _near_one(scale: float) -> float:
    """One, where only rounding keeps a scale from it: less than a pixel in a million."""
    return 1.0 if abs(scale - 1.0) < 1e-7 else scale


__all__ = ["Bounds", "FileState", "Level", "Slide", "SlideError", "open_slide"]
