"""Rectangles of one TIFF page: its tiles or strips, read with `os.pread` and decoded one by one."""

import collections
import math
import os
import struct
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from fedjax_dp.data.pyramids.base import MAX_SIDE, SlideError
from fedjax_dp.data.pyramids.jpeg import JpegTiles, frames

WHITE = 255
CACHE_BYTES = 32 * 2**20
"""Decoded segments that an open file keeps: neighbouring regions share them."""

_MAX_SEGMENT_PIXELS = 2**26
"""A segment is decoded whole; a strip of this size takes 200 MB."""

_PLAIN_STRIP_BYTES = 2**20

_JPEG, _YCBCR_JPEG2000, _JPEG2000 = 7, 33003, (33003, 33004, 33005, 34712)
_CODECS = {
    1: "none",
    5: "LZW",
    _JPEG: "JPEG",
    8: "deflate",
    32946: "deflate",
    32773: "PackBits",
    33003: "JPEG 2000 (YCbCr)",
    33004: "JPEG 2000",
    33005: "JPEG 2000 (RGB)",
    34712: "JPEG 2000",
    50000: "Zstandard",
}

Fill = Callable[[int, int, int, int], np.ndarray]
"""(x, y, width, height) -> uint8 [height, width, 3], for segments that the file leaves out."""


class SegmentCache:
    """The last decoded segments, up to a number of bytes. Threads may use it at once."""

    def __init__(self, limit: int) -> None:
        self.limit, self._bytes, self._lock = limit, 0, threading.Lock()
        self._held: collections.OrderedDict[Any, np.ndarray] = collections.OrderedDict()

    def get(self, key: Any) -> np.ndarray | None:
        """The segment, or None."""
        with self._lock:
            segment = self._held.get(key)
            if segment is not None:
                self._held.move_to_end(key)
            return segment

    def put(self, key: Any, segment: np.ndarray) -> None:
        """Keeps a segment, and lets go of those not used for longest."""
        if segment.nbytes > self.limit:
            return
        with self._lock:
            if key not in self._held:
                self._bytes += segment.nbytes
            self._held[key] = segment
            while self._bytes > self.limit:
                self._bytes -= self._held.popitem(last=False)[1].nbytes


class SegmentedPage:
    """The pixels of one TIFF page.

    Guarantees: no more than one segment is decoded at a time by a thread, none that is outside the
    rectangle asked for, and none whose own header claims more pixels than the page's tables.
    """

    def __init__(
        self,
        page: tifffile.TiffPage,
        descriptor: int,
        cache: SegmentCache,
        *,
        name: str,
        fill: Fill | None = None,
    ) -> None:
        """Checks the page's tables; reads no pixels.

        Args:
            page: of an open file.
            descriptor: of the same file, open for reading as long as this object is used.
            cache: shared by the pages of a file.
            name: of file and level, for errors.
            fill: for segments of zero bytes; by default they are white.

        Raises:
            SlideError: a kind of pixels that is not supported, or tables that cannot be true.
        """
        self.name, self._descriptor, self._cache, self._fill = name, descriptor, cache, fill
        self.width, self.height = int(page.imagewidth), int(page.imagelength)
        self.compression = int(page.compression)
        self._check_kind(page)
        self._samples = int(page.samplesperpixel)
        self._planes = self._samples if int(page.planarconfig) == 2 else 1
        if page.is_tiled:
            self._size = int(page.tilewidth), int(page.tilelength)
        else:
            self._size = self.width, min(int(page.rowsperstrip), self.height)
        self._check_segments(page)
        self._key = page.offset
        self._is_white_zero = int(page.photometric) == 0
        self._has_alpha = self._samples in (2, 4)
        self._offsets, self._counts = page.dataoffsets, page.databytecounts
        self._decode = page.decode  # computed at first sight, which threads must not do at once
        if self._is_one_plain_strip(page):
            self._cut_strip()
        self._arguments: dict[str, Any] = {}
        self._jpeg: JpegTiles | None = None
        if self.compression == _JPEG:
            self._jpeg = JpegTiles(page) if JpegTiles.suits(page) else None
            self._arguments = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}

    @property
    def codec(self) -> str:
        """Name of the compression."""
        return _CODECS[self.compression]

    @property
    def segment_size(self) -> tuple[int, int]:
        """(width, height) of a tile or strip, pixels."""
        return self._size

    def read(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """uint8 [height, width, 3]; pixels beyond the edges are white."""
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, self.width), min(y + height, self.height)
        region = np.empty((height, width, 3), np.uint8)
        if (left, top, right, bottom) != (x, y, x + width, y + height):
            region[...] = WHITE
        if left >= right or top >= bottom:
            return region
        step_x, step_y = self._size
        for row in range(top // step_y, (bottom - 1) // step_y + 1):
            for column in range(left // step_x, (right - 1) // step_x + 1):
                x0, y0 = column * step_x, row * step_y
                x1, y1 = min(x0 + step_x, right), min(y0 + step_y, bottom)
                from_x, from_y = max(x0, left), max(y0, top)
                segment = self._segment(row, column, y1 - y0)
                region[from_y - y : y1 - y, from_x - x : x1 - x] = segment[
                    from_y - y0 : y1 - y0, from_x - x0 : x1 - x0
                ]
        return region

    def _segment(self, row: int, column: int, rows: int) -> np.ndarray:
        """uint8 [h, w, 3] of one segment, at least its first `rows`, where it lies in the page."""
        index = row * self._columns + column
        known = self._cache.get((self._key, index))
        if known is not None:
            return known
        step_x, step_y = self._size
        width = min(step_x, self.width - column * step_x)
        height = min(step_y, self.height - row * step_y)
        if not self._cache.limit:
            height = min(height, rows)  # a part would be of no use to other regions
        if self._jpeg is not None and (data := self._read(index)) is not None:
            segment = self._guarded(index, lambda: self._jpeg_rows(data, index, height))
            segment = segment[:height, :width]
            segment = segment.copy() if self._cache.limit else segment
        else:
            segment = self._general(index, (column * step_x, row * step_y), width, height)
        self._cache.put((self._key, index), segment)
        return segment

    def _general(self, index: int, corner: tuple[int, int], width: int, height: int) -> np.ndarray:
        """A segment of any codec and number of planes, or what stands for it where it is absent."""
        area = self._columns * self._rows
        there = []
        for number in range(index, index + self._planes * area, area):
            if (data := self._read(number)) is None:
                if self._fill is not None:
                    return self._fill(*corner, width, height)
                return np.full((height, width, 3), WHITE, np.uint8)
            plane = self._guarded(number, lambda d=data, n=number: self._pixels(d, n))  # type: ignore[misc]
            there.append(plane[:height, :width])
        return self._to_rgb(there[0] if len(there) == 1 else np.concatenate(there, -1))

    def _read(self, index: int) -> bytes | None:
        """The bytes of one segment of one plane; None where the file leaves it out."""
        count = int(self._counts[index])
        return os.pread(self._descriptor, count, int(self._offsets[index])) if count else None

    def _jpeg_rows(self, data: bytes, index: int, rows: int) -> np.ndarray:
        assert self._jpeg is not None
        segment = self._jpeg.decode(data, rows)
        return self._pixels(data, index) if segment is None else segment

    def _pixels(self, data: bytes, index: int) -> np.ndarray:
        """uint8 [h, w, samples] of one segment of one plane."""
        if len(data) != int(self._counts[index]):
            raise SlideError(f"its {int(self._counts[index]):,} bytes end after {len(data):,}")
        self._check_header(data)
        segment: Any = self._decode(data, index, **self._arguments)[0]
        return segment[0]

    def _guarded(self, index: int, decode: Callable[[], np.ndarray]) -> np.ndarray:
        """What `decode` returns; whatever it raises as a `SlideError`."""
        try:
            return decode()
        except Exception as error:  # codecs raise many types
            raise SlideError(
                f"Cannot decode segment {index} of {self.name} ({self.codec}): {error}. The file "
                "is truncated or damaged; copy it again."
            ) from error

    def _check_header(self, data: bytes) -> None:
        """Refuses compressed data whose own header names a larger picture than the page's."""
        if self.compression == _JPEG:
            sizes = [(frame.width, frame.height) for frame in frames(data)]
        elif self.compression in _JPEG2000:
            sizes = [jpeg2000_size(data)]
        else:
            return  # told how many bytes to write at most
        for width, height in sizes:
            if width > self._size[0] or height > self._size[1]:
                raise SlideError(
                    f"its data claim {width:,} x {height:,} pixels, the file's tables "
                    f"{self._size[0]:,} x {self._size[1]:,}"
                )

    def _to_rgb(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [h, w, 1..4] to RGB [h, w, 3]: gray spread out, transparent pixels on white."""
        if self.compression == _YCBCR_JPEG2000 and pixels.shape[-1] == 3:
            # The codestream holds luminance and colour differences, and nothing in it says so.
            image = Image.fromarray(np.ascontiguousarray(pixels), "YCbCr")
            return np.asarray(image.convert("RGB"))
        if pixels.shape[-1] == 3:
            return pixels
        if self._is_white_zero and pixels.shape[-1] == 1:
            pixels = ~pixels
        colour = pixels[..., :-1] if self._has_alpha else pixels
        colour = np.broadcast_to(colour, (*colour.shape[:2], 3))
        if not self._has_alpha:
            return np.ascontiguousarray(colour)
        alpha = pixels[..., -1:].astype(np.uint16)
        return ((colour * alpha + WHITE * (255 - alpha) + 127) // 255).astype(np.uint8)

    def _check_kind(self, page: tifffile.TiffPage) -> None:
        photometric = int(page.photometric)
        problems = {
            f"{self.width:,} x {self.height:,} pixels": not (
                0 < self.width <= MAX_SIDE and 0 < self.height <= MAX_SIDE
            ),
            f"compression {page.compression!r}": self.compression not in _CODECS,
            f"pixels of type {page.dtype}": page.dtype != np.uint8 or page.bitspersample != 8,
            f"{page.samplesperpixel} samples a pixel": page.samplesperpixel not in (1, 2, 3, 4),
            f"photometric {page.photometric!r}": photometric not in (0, 1, 2, 6),
            f"{page.imagedepth} planes in depth": page.imagedepth != 1,
            f"planar configuration {page.planarconfig!r}": int(page.planarconfig) not in (1, 2),
            "bits in reversed order": page.fillorder != 1,
        }
        if found := [what for what, is_so in problems.items() if is_so]:
            raise SlideError(
                f"Expected 8-bit RGB or gray pixels in {', '.join(sorted(set(_CODECS.values())))}, "
                f"got {self.name} with {', '.join(found)}. Convert it, for instance with "
                "bfconvert or vips, to a tiled RGB TIFF."
            )

    def _check_segments(self, page: tifffile.TiffPage) -> None:
        width, height = self._size
        most = _MAX_SEGMENT_PIXELS if not self._is_one_plain_strip(page) else MAX_SIDE**2
        if not 0 < width * height <= most:
            kind = "tiles" if page.is_tiled else "strips"
            raise SlideError(
                f"Expected tiles or strips of at most {_MAX_SEGMENT_PIXELS:,} pixels, got "
                f"{self.name} with {kind} of {width:,} x {height:,}. Convert it to a tiled TIFF."
            )
        self._columns, self._rows = math.ceil(self.width / width), math.ceil(self.height / height)
        expected = self._columns * self._rows * self._planes
        found = len(page.dataoffsets), len(page.databytecounts)
        if found != (expected, expected):
            raise SlideError(
                f"Expected {expected:,} tiles or strips for {self.width:,} x {self.height:,} "
                f"pixels, got {self.name} with {found[0]:,} offsets and {found[1]:,} lengths. The "
                "file is damaged; copy it again."
            )
        size = os.fstat(self._descriptor).st_size
        offsets = np.asarray(page.dataoffsets, np.float64)  # exact below 2**53, and never too large
        counts = np.asarray(page.databytecounts, np.float64)
        beyond = np.count_nonzero((counts > 0) & ((offsets <= 0) | (offsets + counts > size)))
        if beyond:
            raise SlideError(
                f"{beyond:,} of {expected:,} tiles or strips of {self.name} lie beyond the "
                f"file's {size:,} bytes. It is truncated; copy it again."
            )

    def _is_one_plain_strip(self, page: tifffile.TiffPage) -> bool:
        """Whether the pixels lie in the file as they are, in one piece."""
        is_plain = self.compression == 1 and int(page.predictor) == 1 and self._planes == 1
        return is_plain and not page.is_tiled and self._size[1] == self.height

    def _cut_strip(self) -> None:
        """Reads one uncompressed strip as many, so that no region needs all of it."""
        row = self.width * self._samples
        rows = max(1, _PLAIN_STRIP_BYTES // row)
        first, counted = int(self._offsets[0]), int(self._counts[0])
        if counted < row * self.height:
            raise SlideError(
                f"Expected {row * self.height:,} bytes of pixels, got {self.name} with "
                f"{counted:,}. The file is damaged; copy it again."
            )
        starts = range(0, self.height, rows)
        self._size, self._rows = (self.width, rows), len(starts)
        self._offsets = tuple(first + start * row for start in starts)
        self._counts = tuple(min(rows, self.height - start) * row for start in starts)
        samples = self._samples

        def decode(data: bytes, index: int) -> Any:
            pixels = np.frombuffer(data, np.uint8).reshape(1, -1, row // samples, samples)
            return pixels, index, pixels.shape

        self._decode = decode


def jpeg2000_size(data: bytes) -> tuple[int, int]:
    """(width, height) of a JPEG 2000 codestream, bare or in the boxes of a JP2 file.

    Raises:
        SlideError: neither; a decoder might look for one elsewhere.
    """
    place = 0
    while data[place : place + 4] != b"\xff\x4f\xff\x51":
        length, kind = data[place : place + 4], data[place + 4 : place + 8]
        size, header = int.from_bytes(length, "big"), 8
        if size == 1:
            size, header = int.from_bytes(data[place + 8 : place + 16], "big"), 16
        if kind == b"jp2c":
            size = header
        if len(kind) < 4 or size < header:
            raise SlideError("its data are no JPEG 2000 codestream")
        place += size
    if place + 24 > len(data):
        raise SlideError("its JPEG 2000 header ends too early")
    right, bottom, left, top = struct.unpack(">4I", data[place + 8 : place + 24])
    return right - left, bottom - top
