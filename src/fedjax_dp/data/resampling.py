"""Rectangles of pixels at another scale, piece by piece, as if the whole were resampled at once."""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

MAX_SOURCE_PIXELS = 2**24
"""Pixels that are read for one piece of the output, more or less."""

_SUPPORT = 1.0
"""Half the width of Pillow's bilinear filter, in pixels of the coarser of the two scales."""

ReadPixels = Callable[[int, int, int, int], np.ndarray]
"""(x, y, width, height) -> uint8 [height, width, 3], of whole source pixels, anywhere."""


def resample(
    read: ReadPixels,
    corner: tuple[float, float],
    scale: tuple[float, float],
    width: int,
    height: int,
) -> np.ndarray:
    """The region of `width x height` output pixels that begins at a corner of the source.

    Guarantees: output pixel (i, j) is the same, to one gray level, whatever region it is part of
    (Pillow's bilinear filter, widened where the output is coarser so that nothing aliases); where
    `scale` is one and the corner whole, pixels are copied. Memory follows the output.

    Args:
        read: gives whole source pixels.
        corner: (x, y) of the region's top left corner, source pixels; may be fractions.
        scale: (x, y), source pixels per output pixel, positive.
        width: of the output, pixels.
        height: of the output, pixels.

    Returns:
        uint8 [height, width, 3].
    """
    left, top = (_snapped(value) for value in corner)
    if scale == (1.0, 1.0) and left == int(left) and top == int(top):
        return read(int(left), int(top), width, height)
    rows = max(1, int(MAX_SOURCE_PIXELS // max(1.0, width * scale[0] * scale[1])))
    if rows < height or (rows == 1 and width * scale[0] * scale[1] > MAX_SOURCE_PIXELS):
        return _in_pieces(read, (left, top), scale, width, height)
    x0, x1 = _reach(left, scale[0], width)
    y0, y1 = _reach(top, scale[1], height)
    source = Image.fromarray(read(x0, y0, x1 - x0, y1 - y0))
    box = (left - x0, top - y0, left - x0 + width * scale[0], top - y0 + height * scale[1])
    return np.asarray(source.resize((width, height), Image.Resampling.BILINEAR, box=box))


def _in_pieces(
    read: ReadPixels,
    corner: tuple[float, float],
    scale: tuple[float, float],
    width: int,
    height: int,
) -> np.ndarray:
    """The two halves of a region along its longer side, one after the other."""
    out = np.empty((height, width, 3), np.uint8)
    left, top = corner
    if width == height == 1:
        raise ValueError(
            f"Expected a scale below {math.isqrt(MAX_SOURCE_PIXELS)} source pixels, got {scale=}."
        )
    if height >= width:
        half = height // 2
        out[:half] = resample(read, corner, scale, width, half)
        out[half:] = resample(read, (left, top + half * scale[1]), scale, width, height - half)
    else:
        half = width // 2
        out[:, :half] = resample(read, corner, scale, half, height)
        out[:, half:] = resample(read, (left + half * scale[0], top), scale, width - half, height)
    return out


def _reach(start: float, scale: float, count: int) -> tuple[int, int]:
    """First and last (exclusive) source pixel that the filter sees along one axis."""
    margin = _SUPPORT * max(scale, 1.0) + 1.0
    return math.floor(start - margin), math.ceil(start + count * scale + margin)


def _snapped(value: float) -> float:
    """The value itself, or the whole number that only rounding keeps it from being."""
    nearest = round(value)
    return float(nearest) if abs(value - nearest) < 1e-6 else value
