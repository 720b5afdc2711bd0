"""A painted mask as annotation: its own grid, laid over the whole slide, read by nearest."""

import pathlib

import numpy as np

from fedjax_dp.data.annotations.classes import ClassTable
from fedjax_dp.data.annotations.shapes import AnnotationError, Findings
from fedjax_dp.data.images import ImageError, read_mask
from fedjax_dp.data.tiles import IGNORE_INDEX

_MAX_ASPECT_ERROR = 0.01


class MaskLabels:
    """Labels from a mask image or mask TIFF of the slide's extent, of any size.

    Masks above `images.MAX_PIXELS` pixels are refused.
    """

    def __init__(self, path: pathlib.Path, table: ClassTable, dimensions: tuple[int, int]) -> None:
        """Reads the mask: values are labels, 255 is ignored.

        Raises:
            AnnotationError: unreadable, of another shape than the slide, or with other values.
        """
        try:
            mask = read_mask(path)
        except ImageError as error:
            raise AnnotationError(str(error)) from error
        height, width = mask.shape
        aspect = (width / height) / (dimensions[0] / dimensions[1])
        if abs(aspect - 1) > _MAX_ASPECT_ERROR:
            raise AnnotationError(
                f"Expected a mask in proportion to the slide, {dimensions[0]} x {dimensions[1]} "
                f"pixels, got {path} with {width} x {height}. Export it for the whole slide."
            )
        values, counts = np.unique(mask, return_counts=True)
        known = (values < len(table.names)) | (values == IGNORE_INDEX)
        if not known.all():
            found = ", ".join(
                f"{value} ({count:,} pixels)"
                for value, count in zip(values[~known][:8], counts[~known][:8], strict=True)
            )
            raise AnnotationError(
                f"Expected labels 0 to {len(table.names) - 1} or {IGNORE_INDEX} (ignore), got "
                f"{path} with {found}. Correct the class table or the mask."
            )
        self.findings = Findings()  # a mask has nothing to tell
        self._mask = mask.astype(np.uint8)
        self._per_pixel = width / dimensions[0], height / dimensions[1]

    def label_region(
        self, x: float, y: float, width: int, height: int, scale_x: float, scale_y: float
    ) -> np.ndarray:
        """See `reading.RegionLabels.label_region`; pixels beyond the mask are ignored."""
        columns = np.floor((x + (np.arange(width) + 0.5) * scale_x) * self._per_pixel[0])
        rows = np.floor((y + (np.arange(height) + 0.5) * scale_y) * self._per_pixel[1])
        inside_x = (columns >= 0) & (columns < self._mask.shape[1])
        inside_y = (rows >= 0) & (rows < self._mask.shape[0])
        labels = np.full((height, width), IGNORE_INDEX, np.uint8)
        labels[np.ix_(inside_y, inside_x)] = self._mask[
            np.ix_(rows[inside_y].astype(np.int64), columns[inside_x].astype(np.int64))
        ]
        return labels
