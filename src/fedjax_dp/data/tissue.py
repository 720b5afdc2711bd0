"""Where a slide shows stained tissue: at low power, by fixed rules, or by given outlines."""

import functools
import math
from typing import Literal, get_args

import numpy as np
from scipy import ndimage
from shapely.geometry.base import BaseGeometry
from skimage.filters import threshold_otsu

from fedjax_dp.data.annotations.rasterise import Grid, rasterise
from fedjax_dp.data.slides import Slide
from fedjax_dp.data.tiles import MIN_SATURATION, saturation_of

Method = Literal["saturation", "otsu"]

TISSUE_MPP = 8.0
"""Micrometres per pixel at which tissue is looked for."""

_OTSU_RANGE = (8, 40)
"""Of 255: alone, Otsu's threshold calls half of a blank slide tissue."""

_BLACK = 45
"""Of 255, the brightest channel of what was not scanned, of black ink and of an edge's shadow."""

_COLD_HUES, _INK_SATURATION = (60, 190), 75
"""Of 255: green to blue, and as vivid as no stained nucleus of such a hue. Red ink is not told from
blood, and stays."""

_INK_MARGIN_UM = 30.0
"""Around ink its own blurred edge has hues of tissue."""

_SMOOTHING_UM = 8.0
_MIN_SPECK_UM2 = 10_000.0
_MAX_HOLE_UM2 = 20_000.0
_STRIP_ROWS = 512


class TissueMask:
    """Tissue of one slide.

    Attributes:
        mask: bool [h, w].
        scale: (x, y), level-0 pixels per pixel of the mask.
        method: how it was found.
        threshold: of saturation, of 255; None where outlines were given.
    """

    def __init__(
        self,
        mask: np.ndarray,
        scale: tuple[float, float],
        method: str,
        threshold: float | None = None,
    ) -> None:
        self.mask, self.scale, self.method, self.threshold = mask, scale, method, threshold

    def fraction(self, x: float, y: float, width: float, height: float) -> float:
        """How much of a rectangle of level-0 pixels is tissue; beyond the slide there is none."""
        left, right = (v / self.scale[0] for v in (x, x + width))
        top, bottom = (v / self.scale[1] for v in (y, y + height))
        area = (right - left) * (bottom - top)
        if area <= 0:
            raise ValueError(f"Expected a rectangle with an area, got {width} x {height}.")
        found = (
            self._until(bottom, right)
            - self._until(top, right)
            - self._until(bottom, left)
            + self._until(top, left)
        )
        return float(np.clip(found / area, 0.0, 1.0))

    def touches(self, x: float, y: float, width: float, height: float) -> bool:
        """Whether any pixel of the mask that meets a rectangle of level-0 pixels is tissue."""
        left, right = math.floor(x / self.scale[0]), math.ceil((x + width) / self.scale[0])
        top, bottom = math.floor(y / self.scale[1]), math.ceil((y + height) / self.scale[1])
        return bool(self.mask[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)].any())

    def region(
        self, x: float, y: float, width: int, height: int, scale: tuple[float, float]
    ) -> np.ndarray:
        """Which pixels of a grid have their centre in tissue.

        Args:
            x: of the grid's corner, level-0 pixels.
            y: likewise.
            width: pixels.
            height: pixels.
            scale: (x, y), level-0 pixels per pixel of the grid.

        Returns:
            bool [height, width].
        """
        places = []
        for start, count, step, own, limit in (
            (y, height, scale[1], self.scale[1], self.mask.shape[0]),
            (x, width, scale[0], self.scale[0], self.mask.shape[1]),
        ):
            place = np.floor((start + (np.arange(count) + 0.5) * step) / own).astype(np.int64)
            places.append((np.clip(place, 0, limit - 1), (place >= 0) & (place < limit)))
        (rows, has_row), (columns, has_column) = places
        return self.mask[np.ix_(rows, columns)] & has_row[:, None] & has_column

    @functools.cached_property
    def _sums(self) -> np.ndarray:
        """int64 [h + 1, w + 1], tissue pixels above and left of every corner."""
        sums = np.zeros((self.mask.shape[0] + 1, self.mask.shape[1] + 1), np.int64)
        np.cumsum(np.cumsum(self.mask, 0, dtype=np.int64), 1, out=sums[1:, 1:])
        return sums

    def _until(self, row: float, column: float) -> float:
        """Tissue pixels above and left of a point, parts of pixels in proportion."""
        height, width = self.mask.shape
        row, column = min(max(row, 0.0), float(height)), min(max(column, 0.0), float(width))
        i, j = min(int(row), height - 1), min(int(column), width - 1)
        a, b = row - i, column - j
        corner = self._sums[i : i + 2, j : j + 2]
        return float((1 - a) * ((1 - b) * corner[0, 0] + b * corner[0, 1])
                     + a * ((1 - b) * corner[1, 0] + b * corner[1, 1]))  # fmt: skip


def is_local(method: str) -> bool:
    """Whether a pixel's own surroundings alone decide, and not the slide as a whole.

    Where the slide decides, tiles of a slide decide about each other, and a tile is no unit of
    privacy.
    """
    return method in ("saturation", "none")


def tissue_mask(slide: Slide, *, method: str = "saturation", mpp: float = TISSUE_MPP) -> TissueMask:
    """Finds tissue by its colour.

    A pixel is tissue where its saturation reaches a threshold and it is neither black nor the ink
    of a marker; then the mask is smoothed, specks go and small holes are filled. "saturation" has a
    fixed threshold, `tiles.MIN_SATURATION`. "otsu" fits it to the slide, between 8 and 40, and so
    takes tinted glass for tissue where there is nothing else.

    Args:
        slide: open.
        method: see `Method`.
        mpp: micrometres per pixel of the mask; coarser where the slide is.

    Raises:
        ValueError: an unknown method.
        SlideError: the slide is damaged.
    """
    if method not in get_args(Method):
        raise ValueError(f"Expected tissue method in {get_args(Method)}, got {method!r}.")
    mpp = max(mpp, *slide.mpp)
    saturation, is_excluded = _look(slide, mpp)
    threshold = float(MIN_SATURATION)
    if method == "otsu":
        threshold = float(np.clip(_otsu(saturation[~is_excluded]), *_OTSU_RANGE))
    mask = (saturation >= threshold) & ~is_excluded
    # Excluded once more: a dot of ink within tissue is a small hole.
    return TissueMask(_cleaned(mask, mpp) & ~is_excluded, _scale(slide, mpp), method, threshold)


def tissue_from_outlines(
    slide: Slide, outlines: BaseGeometry, *, mpp: float = TISSUE_MPP
) -> TissueMask:
    """Tissue that somebody outlined, in level-0 pixels."""
    mpp = max(mpp, *slide.mpp)
    width, height = _size(slide, mpp)
    mask, _ = rasterise([(outlines, 1)], Grid(0.0, 0.0, width, height, _scale(slide, mpp)))
    return TissueMask(mask == 1, _scale(slide, mpp), "outlines")


def everywhere(slide: Slide) -> TissueMask:
    """All of a slide."""
    width, height = slide.dimensions
    return TissueMask(np.ones((1, 1), bool), (float(width), float(height)), "none")


def _size(slide: Slide, mpp: float) -> tuple[int, int]:
    width, height = (
        math.ceil(side * own / mpp) for side, own in zip(slide.dimensions, slide.mpp, strict=True)
    )
    return width, height


def _scale(slide: Slide, mpp: float) -> tuple[float, float]:
    return mpp / slide.mpp[0], mpp / slide.mpp[1]


def _look(slide: Slide, mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """Saturation uint8 [h, w] and where no tissue can be, bool [h, w], strip by strip."""
    width, height = _size(slide, mpp)
    saturation = np.zeros((height, width), np.uint8)
    is_black, is_ink = np.zeros((2, height, width), bool)
    for top in range(0, height, _STRIP_ROWS):
        rows = min(_STRIP_ROWS, height - top)
        pixels = slide.read_region(0, top * mpp / slide.mpp[1], width, rows, mpp)
        some = slice(top, top + rows)
        saturation[some], is_black[some], is_ink[some] = _colours(pixels)
    margin = math.ceil(_INK_MARGIN_UM / mpp)
    is_ink = ndimage.binary_opening(is_ink)  # single pixels of a blue nucleus are no ink
    return saturation, is_black | ndimage.binary_dilation(is_ink, iterations=margin)


def _colours(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Saturation, and whether a pixel is black, and whether it is of a marker's ink."""
    red, green, blue = (pixels[..., channel].astype(np.int32) for channel in range(3))
    largest, span, saturation = saturation_of(pixels)
    # Hue in 255ths of a turn: green at 85, cyan at 127, blue at 170.
    sector = np.select(
        [largest == red, largest == green],
        [(green - blue) % np.maximum(6 * span, 1), 2 * span + blue - red],
        4 * span + red - green,
    )
    hue = sector * 255 // np.maximum(6 * span, 1)
    is_cold = (hue >= _COLD_HUES[0]) & (hue <= _COLD_HUES[1]) & (green >= red)
    return (
        saturation,
        largest <= _BLACK,
        (saturation >= _INK_SATURATION) & is_cold,
    )


def _otsu(saturation: np.ndarray) -> float:
    if saturation.size == 0 or saturation.min() == saturation.max():
        return float(MIN_SATURATION)
    return float(threshold_otsu(saturation))


def _cleaned(mask: np.ndarray, mpp: float) -> np.ndarray:
    """Smoothed, without specks and small holes."""
    radius = max(1, round(_SMOOTHING_UM / mpp))
    disc = np.hypot(*np.mgrid[-radius : radius + 1, -radius : radius + 1]) <= radius
    mask = ndimage.binary_closing(np.pad(mask, radius), disc)[radius:-radius, radius:-radius]
    mask = ndimage.binary_opening(mask, disc)
    mask = _without_small(mask, _MIN_SPECK_UM2 / mpp**2)
    return ~_without_small(~mask, _MAX_HOLE_UM2 / mpp**2, keeps_edge=True)


def _without_small(mask: np.ndarray, pixels: float, *, keeps_edge: bool = False) -> np.ndarray:
    """The mask without connected parts of fewer pixels; perhaps with those at the slide's edge."""
    parts, count = ndimage.label(mask)
    is_kept = np.bincount(parts.ravel(), minlength=count + 1) >= max(pixels, 1.0)
    if keeps_edge:  # glass there is no hole, however little of it is seen
        for edge in (parts[0], parts[-1], parts[:, 0], parts[:, -1]):
            is_kept[edge] = True
    is_kept[0] = False
    return is_kept[parts]
