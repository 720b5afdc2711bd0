"""Pyramids in TIFF files: Aperio SVS, OME-TIFF, and generic ones, through tifffile's pages."""

import itertools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tifffile

from fedjax_dp.data.pyramids import resolution
from fedjax_dp.data.pyramids.base import Bounds, Level, SlideError, levels_of
from fedjax_dp.data.pyramids.segments import CACHE_BYTES, Fill, SegmentCache, SegmentedPage
from fedjax_dp.data.resampling import resample

_MAX_PAGES = 64
_MAX_ASPECT_ERROR = 0.02


class TiffPyramid:
    """The levels of one TIFF file, a `base.Pyramid`.

    Guarantees: threads may read at once (every read is an `os.pread` of its own); no level is read
    whole; label and macro pictures, which show names and barcodes, are no levels.
    """

    def __init__(self, path: pathlib.Path, cache_bytes: int = CACHE_BYTES) -> None:
        """Opens the file and checks the tables of all its levels; reads no pixels.

        Args:
            path: of the file.
            cache_bytes: of decoded segments that are kept.

        Raises:
            SlideError: not a slide in TIFF, of a kind that is not supported, or damaged.
        """
        self._path, self._cache_bytes = path, cache_bytes
        self._descriptor = -1
        try:
            self._file = tifffile.TiffFile(path, is_ndpi=False)
        except Exception as error:  # tifffile raises many types
            raise SlideError(
                f"Cannot read {path} as TIFF: {error}. The file is damaged; copy it again."
            ) from error
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self._read_structure()
        except SlideError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise SlideError(
                f"Cannot make sense of {path}: {error}. The file is damaged; copy it again."
            ) from error

    def _read_structure(self) -> None:
        pages: list[Any] = list(itertools.islice(self._file.pages, _MAX_PAGES))
        first = pages[0]
        self._is_aperio = first.is_svs
        if first.is_svs:
            chosen = [page for page in pages if page.is_tiled]
            base = chosen[0] if chosen else first
        else:
            base = max(pages, key=lambda page: page.imagewidth * page.imagelength)
            chosen = [*pages, *itertools.islice(base.pages or (), _MAX_PAGES)]
        self._check_alone(base, chosen)
        levels = _levels(base, chosen)
        cache = SegmentCache(self._cache_bytes)
        self._pages = tuple(
            SegmentedPage(
                page,
                self._descriptor,
                cache,
                name=f"{self._path}, level {number}",
                fill=self._finer(number) if self._is_aperio and number else None,
            )
            for number, page in enumerate(levels)
        )
        self.levels: tuple[Level, ...] = levels_of([(p.width, p.height) for p in self._pages])
        if first.is_svs:
            self.format, self.mpp = "Aperio SVS", resolution.of_aperio(first.description)
        elif self._file.is_ome:
            xml = self._file.ome_metadata or ""
            self.format, self.mpp = (
                "OME-TIFF",
                resolution.of_ome(xml, base.imagewidth, base.imagelength),
            )
        else:
            self.format, self.mpp = "generic TIFF", resolution.of_tags(base)

    @property
    def codec(self) -> str:
        """How level 0 is compressed."""
        return self._pages[0].codec

    @property
    def bounds(self) -> Bounds:
        """All of level 0: these containers know no smaller part."""
        return Bounds(0, 0, self.levels[0].width, self.levels[0].height)

    @property
    def segment_sizes(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of the tiles or strips of every level, pixels."""
        return tuple(page.segment_size for page in self._pages)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """See `base.Pyramid.read`."""
        return self._pages[level].read(x, y, width, height)

    def close(self) -> None:
        """Releases the file."""
        self._file.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _finer(self, number: int) -> Fill:
        """Fills what a coarser level of an SVS leaves out from the level before it."""

        def fill(x: int, y: int, width: int, height: int) -> np.ndarray:
            finer, own = self._pages[number - 1], self._pages[number]
            scale = finer.width / own.width, finer.height / own.height
            corner = x * scale[0], y * scale[1]
            return resample(finer.read, corner, scale, width, height)

        return fill

    def _check_alone(self, base: tifffile.TiffPage, pages: Sequence[tifffile.TiffPage]) -> None:
        size = base.imagewidth, base.imagelength
        same = sum((page.imagewidth, page.imagelength) == size for page in pages)
        if same > 1:
            raise SlideError(
                f"Expected one picture of full size, got {self._path} with {same} of "
                f"{size[0]:,} x {size[1]:,} pixels: planes of a stack, or colours apart. Export "
                "one plane as interleaved RGB (with Bio-Formats, raw2ometiff --rgb)."
            )


def _levels(base: tifffile.TiffPage, pages: Sequence[tifffile.TiffPage]) -> list[tifffile.TiffPage]:
    """The base and what shows the same picture smaller, by falling width."""
    kind = base.is_tiled, base.samplesperpixel
    smaller = [
        page
        for page in pages
        if (page.is_tiled, page.samplesperpixel) == kind
        and 0 < page.imagewidth < base.imagewidth
        and 0 < page.imagelength < base.imagelength
        and _has_aspect_of(base, page)
    ]
    by_width = {page.imagewidth: page for page in reversed(smaller)}  # of equals the first counts
    return [base, *(by_width[width] for width in sorted(by_width, reverse=True))]


def _has_aspect_of(base: tifffile.TiffPage, page: tifffile.TiffPage) -> bool:
    """Whether the sides shrink alike, but for the rounding of sizes to whole pixels."""
    x, y = base.imagewidth / page.imagewidth, base.imagelength / page.imagelength
    rounding = x / page.imagewidth + y / page.imagelength
    return abs(x - y) <= _MAX_ASPECT_ERROR * min(x, y) + rounding
