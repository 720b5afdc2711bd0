"""Label maps as pyramidal OME-TIFF: for machines as labels, for people in colours."""

import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import tifffile

from fedjax_dp.inference.label_file import NOT_ANALYSED, LabelFile, LabelMap

_TILE = 512
_BAND = 2048
_BLANK = (245, 245, 245)
"""Colour of pixels that were not analysed."""


def write_labels(path: pathlib.Path, labels: LabelMap, *, mpp: tuple[float, float]) -> None:
    """Writes the labels: uint8, deflate, tiles of 512, levels as SubIFDs, micrometres per pixel.

    Levels halve by nearest (every second pixel, from the first), down to less than one tile.

    Args:
        path: of the OME-TIFF; it appears whole or not at all.
        labels: 0 is background, 255 not analysed.
        mpp: (x, y) micrometres per pixel.

    Raises:
        OSError: the disk is full.
    """
    _write(path, labels, mpp, "minisblack", lambda some: some)


def write_colours(
    path: pathlib.Path, labels: LabelMap, *, mpp: tuple[float, float], colours: np.ndarray
) -> None:
    """Writes the labels as they look: RGB, not analysed pixels light gray.

    Args:
        path: of the OME-TIFF.
        labels: as of `write_labels`.
        mpp: (x, y) micrometres per pixel.
        colours: uint8 [K, 3], of every label.
    """
    table = np.full((256, 3), _BLANK, np.uint8)
    table[: len(colours)] = colours
    _write(path, labels, mpp, "rgb", lambda some: table[some])


def _write(
    path: pathlib.Path,
    labels: LabelMap,
    mpp: tuple[float, float],
    photometric: str,
    pixels: Callable[[np.ndarray], np.ndarray],
) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    channels = (3,) if photometric == "rgb" else ()
    metadata = {
        "axes": "YXS" if channels else "YX",
        "PhysicalSizeX": mpp[0],
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": mpp[1],
        "PhysicalSizeYUnit": "µm",
    }
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".levels") as folder:
            levels = [labels, *_smaller(labels, pathlib.Path(folder))]
            with tifffile.TiffWriter(partial, bigtiff=True, ome=True) as writer:
                for number, level in enumerate(levels):
                    writer.write(
                        (pixels(tile) for tile in _tiles(level)),
                        shape=(level.height, level.width, *channels),
                        dtype=np.uint8,
                        tile=(_TILE, _TILE),
                        photometric=photometric,
                        compression="zlib",
                        subifds=None if number else len(levels) - 1,
                        subfiletype=1 if number else 0,
                        metadata=None if number else metadata,
                        maxworkers=1,
                    )
            for level in levels[1:]:
                level.close()  # type: ignore[attr-defined]
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _smaller(labels: LabelMap, folder: pathlib.Path) -> list[LabelFile]:
    """The coarser levels, each made from the one before it: all of them read level 0 only once."""
    found: list[LabelFile] = []
    level = labels
    while max(level.height, level.width) > _TILE:
        height, width = -(-level.height // 2), -(-level.width // 2)
        coarser = LabelFile(folder / f"{len(found) + 1}.raw", height, width)
        for y in range(0, level.height, _BAND):
            for x in range(0, level.width, _BAND):
                high, wide = min(_BAND, level.height - y), min(_BAND, level.width - x)
                coarser.write(y // 2, x // 2, level.read(y, x, high, wide)[::2, ::2])
        found.append(coarser)
        level = coarser
    return found


def _tiles(level: LabelMap) -> Iterator[np.ndarray]:
    """Tiles uint8 [512, 512] in reading order; beyond the edges nothing was analysed."""
    for y in range(0, level.height, _TILE):
        for x in range(0, level.width, _TILE):
            high, wide = min(_TILE, level.height - y), min(_TILE, level.width - x)
            tile = np.full((_TILE, _TILE), NOT_ANALYSED, np.uint8)
            tile[:high, :wide] = level.read(y, x, high, wide)
            yield tile
