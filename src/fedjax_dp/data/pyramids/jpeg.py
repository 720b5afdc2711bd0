"""JPEG tiles, decoded as fast as libjpeg-turbo can, and no further down than is asked for."""

import struct
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import tifffile

_RGB = 2  # of TIFF's photometric interpretations, and of imagecodecs' colour spaces
_YCBCR = 6

_ALIGNED, _OFFSET = 32, 8
"""Where a row of output begins at a multiple of 32 (or 16) bytes, libjpeg-turbo writes it past the
caches, and whoever reads it next waits: a tile takes 1.6 times as long. Rows of tiles are multiples
of 48 bytes, so that none begins there when the first does not."""

_CONTEXT = 16
"""Rows below those wanted that are decoded too: half of them enter where colours are interpolated
between rows, and a frame ends with whole blocks of at most 16."""


class Frame(NamedTuple):
    """A frame header of a JPEG stream.

    Attributes:
        width: pixels.
        height: pixels.
        is_baseline: whether rows are coded one after the other, once.
        place: of its height within the stream.
    """

    width: int
    height: int
    is_baseline: bool
    place: int


def frames(data: bytes) -> Iterator[Frame]:
    """Every frame header of a stream, up to its first scan."""
    place = 2 if data[:2] == b"\xff\xd8" else 0
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in (0xFF, 0x01) or 0xD0 <= marker <= 0xD8:  # fill bytes; markers without length
            place += 1 if marker == 0xFF else 2
            continue
        if marker in (0xDA, 0xD9):
            return
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and place + 9 <= len(data):
            height, width = struct.unpack(">HH", data[place + 5 : place + 9])
            yield Frame(width, height, marker in (0xC0, 0xC1), place + 5)
        place += 2 + length


class JpegTiles:
    """Decodes the tiles of one page with three interleaved colours."""

    def __init__(self, page: tifffile.TiffPage) -> None:
        """Takes the page's tables; `suits` tells whether there is such a page."""
        photometric = int(page.photometric)
        self._size = int(page.tilewidth), int(page.tilelength)
        self._arguments: dict[str, Any] = {
            "tables": page.jpegtables,
            # Aperio's RGB tiles say nowhere in the stream that they are no YCbCr.
            "colorspace": _RGB if photometric == _RGB and not page.is_jfif else None,
            "outcolorspace": _RGB,
        }
        self._own = threading.local()

    @staticmethod
    def suits(page: tifffile.TiffPage) -> bool:
        """Whether the page's tiles are of the common kind that this decodes."""
        is_colour = page.samplesperpixel == 3 and not page.extrasamples and not page.jpegheader
        interleaved = int(page.planarconfig) == 1 and page.is_tiled
        return is_colour and interleaved and int(page.photometric) in (_RGB, _YCBCR)

    def decode(self, data: bytes, rows: int) -> np.ndarray | None:
        """The first `rows` rows of a tile.

        Returns:
            uint8 [>= rows, W, 3], which this thread's next call overwrites; None where the stream
            is not of the page's tile size, and a general decoder has to see what it is.
        """
        frame = next(frames(data), None)
        if frame is None or (frame.width, frame.height) != self._size:
            return None
        height = frame.height
        if frame.is_baseline and rows + 2 * _CONTEXT < height:
            height = -(-rows // _CONTEXT) * _CONTEXT + _CONTEXT
            data = data[: frame.place] + height.to_bytes(2, "big") + data[frame.place + 2 :]
        out = self._scratch()[:height]
        imagecodecs.jpeg8_decode(data, out=out, **self._arguments)
        return out[: max(rows, height - _CONTEXT)] if height < frame.height else out

    def _scratch(self) -> np.ndarray:
        """Of this thread, uint8 [H, W, 3] of a whole tile."""
        if not hasattr(self._own, "tile"):
            width, height = self._size
            size = 3 * width * height
            buffer = np.empty(size + _ALIGNED + _OFFSET, np.uint8)
            start = -buffer.ctypes.data % _ALIGNED + _OFFSET
            self._own.tile = buffer[start : start + size].reshape(height, width, 3)
        return self._own.tile
