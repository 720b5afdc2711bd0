"""Reading a tile store: its index in memory, its pixels as they are asked for."""

import csv
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from fedjax_dp.data.store import layout
from fedjax_dp.data.store.layout import SlideRecord, StoreError

_CACHE_BYTES = 2**25
"""Of all slides of a table together: where in its shard a tile lies is not read again each time."""

_ITERATED = 64


class StoredPixels:
    """The images or the labels of the tiles of several slides, as one array that is read in parts.

    It is indexed like NumPy along its first axis, by a number, a slice or an array of numbers, and
    every answer is an array in memory. Threads may read at once.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self, folders: Sequence[pathlib.Path], counts: Sequence[int], shape: tuple[int, ...]
    ) -> None:
        """Takes the arrays' folders and how many tiles each has; nothing is read yet."""
        self._folders = tuple(folders)
        self._ends = np.cumsum([0, *counts])
        self._open: dict[int, Any] = {}
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        self.shape = (int(self._ends[-1]), *shape)
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all of it, were it in memory."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), _ITERATED):
            yield from self[start : start + _ITERATED]

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(index, int | np.integer):
            return self[np.asarray([index])][0]
        wanted = np.arange(len(self))[index] if isinstance(index, slice) else np.asarray(index)
        if wanted.dtype == bool or wanted.ndim != 1:
            raise IndexError("Expected a number, a slice or a list of numbers of tiles.")
        wanted = np.where(wanted < 0, wanted + len(self), wanted).astype(np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"Expected tiles below {len(self)}, got {wanted.max()}.")
        found = np.empty((len(wanted), *self.shape[1:]), np.uint8)
        slides = np.searchsorted(self._ends, wanted, side="right") - 1
        reads = []
        for slide in np.unique(slides):
            places = np.flatnonzero(slides == slide)
            inside = wanted[places] - self._ends[slide]
            reads.append((slide, places, self._array(int(slide))[inside.tolist()].read()))
        for slide, places, future in reads:
            try:
                found[places] = future.result()
            except ValueError as error:
                raise StoreError(
                    f"Cannot read tiles of slide {self._folders[slide].parent.name}: {error}. "
                    "Delete its folder and prepare it anew."
                ) from error
        return found

    def _array(self, slide: int) -> Any:
        if slide not in self._open:
            folder = self._folders[slide]
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
            try:
                array = ts.open(spec, open=True, read=True, context=self._context).result()
            except ValueError as error:
                raise StoreError(
                    f"Cannot open the tiles of slide {folder.parent.name}: {error}. Delete its "
                    "folder and prepare it anew."
                ) from error
            count = int(self._ends[slide + 1] - self._ends[slide])
            if array.shape != (count, *self.shape[1:]):
                raise StoreError(
                    f"Expected {count} tiles of {self.shape[1:]} of slide {folder.parent.name}, "
                    f"got an array of {array.shape}. Delete its folder and prepare it anew."
                )
            self._open[slide] = array
        return self._open[slide]


def stored_pixels(
    folder: pathlib.Path, records: Sequence[SlideRecord], tile_size: int
) -> tuple[StoredPixels, StoredPixels]:
    """Images [N, T, T, 3] and labels [N, T, T] of the slides, one after the other."""
    slides = [folder / layout.SLIDES / record.slide for record in records]
    counts = [record.tiles for record in records]
    side = (tile_size, tile_size)
    images = StoredPixels([slide / layout.IMAGES for slide in slides], counts, (*side, 3))
    return images, StoredPixels([slide / layout.LABELS for slide in slides], counts, side)


def tile_rows(folder: pathlib.Path, record: SlideRecord) -> list[dict[str, str]]:
    """The index of one slide's tiles: x, y, tissue, pixels of every class."""
    path = folder / layout.SLIDES / record.slide / layout.TILES
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise StoreError(f"Cannot read {path}: {error.strerror or error}.") from error
    if len(rows) != record.tiles:
        raise StoreError(
            f"Expected {record.tiles} tiles in {path}, got {len(rows)}. Delete its folder and "
            "prepare it anew."
        )
    return rows
