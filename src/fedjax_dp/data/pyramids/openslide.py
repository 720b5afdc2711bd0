"""Slides of other vendors through OpenSlide, where it is installed.

NDPI, Philips, MRXS, SCN and BIF are read this way. Untested: no sample of these was at hand.
"""

import pathlib
from typing import Any

import numpy as np

from fedjax_dp.data.pyramids import resolution
from fedjax_dp.data.pyramids.base import Bounds, Level, SlideError, levels_of


class OpenSlidePyramid:
    """One file through OpenSlide, a `base.Pyramid`."""

    codec = "through OpenSlide"

    def __init__(self, path: pathlib.Path) -> None:
        """Opens the file.

        Raises:
            SlideError: OpenSlide is absent, or cannot read the file.
        """
        try:
            import openslide
        except ImportError as error:
            raise SlideError(
                f"Expected a tiled TIFF, SVS or OME-TIFF, got {path}. If it is a slide of another "
                "vendor (NDPI, Philips, MRXS, SCN, BIF), install OpenSlide with "
                "pip install 'fedjax_dp[openslide]'."
            ) from error
        try:
            self._slide: Any = openslide.OpenSlide(path)
        except (openslide.OpenSlideError, OSError) as error:
            raise SlideError(
                f"Expected a slide, got {path}, which neither tifffile nor OpenSlide can read: "
                f"{error}. Check the path, or convert it to a tiled RGB TIFF."
            ) from error
        self._path = path
        self.levels: tuple[Level, ...] = levels_of(list(self._slide.level_dimensions))
        self.format = f"{self._slide.properties.get('openslide.vendor', 'unknown')} (OpenSlide)"
        self.mpp = self._resolution()
        self.bounds = self._bounds()

    def _resolution(self) -> resolution.Resolution:
        try:
            x, y = (float(self._slide.properties[f"openslide.mpp-{axis}"]) for axis in "xy")
        except (KeyError, ValueError):
            return None
        return resolution.plausible(x, y)

    def _bounds(self) -> Bounds:
        whole = (0, 0, self.levels[0].width, self.levels[0].height)
        names = ("x", "y", "width", "height")
        found = (self._slide.properties.get(f"openslide.bounds-{name}") for name in names)
        return Bounds(*(int(v) if v else w for v, w in zip(found, whole, strict=True)))

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """See `base.Pyramid.read`."""
        dx, dy = self.levels[level].downsample
        try:
            image = self._slide.read_region((round(x * dx), round(y * dy)), level, (width, height))
        except Exception as error:
            raise SlideError(f"Cannot read {self._path}: {error}. Copy it again.") from error
        pixels = np.asarray(image)
        alpha = pixels[..., 3:].astype(np.uint16)
        return (((pixels[..., :3] * alpha) + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)

    def close(self) -> None:
        """Releases the file."""
        self._slide.close()
