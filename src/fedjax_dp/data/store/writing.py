"""Writing the tiles of one slide: whole shards, and nothing that is half there."""

import dataclasses
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from fedjax_dp.data.store import layout
from fedjax_dp.data.store.layout import Recipe, SlideRecord, StoreError
from fedjax_dp.data.store.pseudonyms import table_text
from fedjax_dp.data.tiles import IGNORE_INDEX

SHARD_BYTES = 16 * 2**20
"""Of images in a shard, about: what is written at once."""


class StoredTile(NamedTuple):
    """One tile on its way into a store.

    Attributes:
        x: of its top left corner, level-0 pixels.
        y: likewise.
        tissue: fraction of it that is tissue.
        image: uint8 [T, T, 3].
        labels: uint8 [T, T], class index, 255 = ignore.
    """

    x: float
    y: float
    tissue: float
    image: np.ndarray
    labels: np.ndarray


def write_slide(
    folder: pathlib.Path, tiles: Iterable[StoredTile], recipe: Recipe, record: SlideRecord
) -> SlideRecord:
    """Writes the tiles of one slide, and then its mark.

    Guarantees: the slide's folder appears whole, by one rename, or not at all; whatever stops the
    writing, an error, a full disk or a kill, leaves no folder that a reader would use. The same
    tiles give the same bytes.

    Args:
        folder: of the store.
        tiles: in the order in which they shall lie.
        recipe: of the store.
        record: of the slide; its `tiles`, `pixels` and `content` are filled in here.

    Returns:
        The record as written.

    Raises:
        StoreError: the disk is full or cannot be written; or a label beyond the classes.
    """
    final = folder / layout.SLIDES / record.slide
    partial = final.with_name(f".{record.slide}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        record = _write(partial, tiles, recipe, record)
        layout.write_record(partial, record)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        layout.sync_folder(final.parent)
    except OSError as error:
        raise StoreError(
            f"Cannot write the tiles of slide {record.slide} to {folder}: "
            f"{error.strerror or error}. Make room, or choose another --output; what is finished "
            "is kept."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return record


def _write(
    folder: pathlib.Path, tiles: Iterable[StoredTile], recipe: Recipe, record: SlideRecord
) -> SlideRecord:
    """Images, labels and the slide's own index."""
    side, classes = recipe.tile_size, len(recipe.class_names)
    per_shard = tiles_per_shard(side)
    arrays = [_create(folder / name, side, per_shard, recipe) for name in _ARRAYS]
    digest, pixels, rows, count = hashlib.blake2b(digest_size=16), np.zeros(256, np.int64), [], 0
    for some in _batches(tiles, per_shard):
        images = np.stack([tile.image for tile in some])
        labels = np.stack([tile.labels for tile in some])
        end = count + len(some)
        # Grown batch by batch: cutting a larger size would look for every shard beyond.
        arrays = [_done(array.resize(exclusive_max=[end, *array.shape[1:]])) for array in arrays]
        written = [
            array[count:end].write(values)
            for array, values in zip(arrays, (images, labels), strict=True)
        ]
        for tile in some:
            of_tile = np.bincount(tile.labels.ravel(), minlength=256)
            pixels += of_tile
            counts = [*of_tile[:classes].tolist(), int(of_tile[IGNORE_INDEX])]
            rows.append((f"{tile.x:.3f}", f"{tile.y:.3f}", f"{tile.tissue:.4f}", *counts))
        digest.update(images.tobytes())
        digest.update(labels.tobytes())
        for future in written:
            _done(future)  # a write whose future is let go is lost
        count = end
    if (wrong := np.flatnonzero(pixels[classes:IGNORE_INDEX])).size:
        raise StoreError(
            f"Expected labels below {classes} or {IGNORE_INDEX}, got {(wrong + classes).tolist()}."
        )
    header = ("x", "y", "tissue", *(f"pixels_{name}" for name in recipe.class_names), "ignored")
    layout.write_text(folder / layout.TILES, table_text(header, rows))
    return dataclasses.replace(
        record,
        tiles=count,
        pixels=(*pixels[:classes].tolist(), int(pixels[IGNORE_INDEX])),
        content=digest.hexdigest(),
    )


_ARRAYS = (layout.IMAGES, layout.LABELS)


def tiles_per_shard(side: int) -> int:
    """Tiles of this side that lie in one shard."""
    return max(1, SHARD_BYTES // (3 * side * side))


def _create(path: pathlib.Path, side: int, per_shard: int, recipe: Recipe) -> Any:
    """An array without tiles yet."""
    channels = [3] if path.name == layout.IMAGES else []
    tile = [side, side, *channels]
    inner: list[dict[str, Any]] = [{"name": "bytes"}]
    if recipe.compression == "zstd" or (recipe.compression == "lz4" and not channels):
        inner.append({"name": "zstd", "configuration": {"level": 1}})
    elif recipe.compression == "lz4":
        lz4 = {"cname": "lz4", "clevel": 1, "shuffle": "noshuffle", "typesize": 1, "blocksize": 0}
        inner.append({"name": "blosc", "configuration": lz4})
    sharded = {
        "name": "sharding_indexed",
        "configuration": {"chunk_shape": [1, *tile], "codecs": inner},
    }
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": {
            "shape": [0, *tile],
            "data_type": "uint8",
            "fill_value": 0,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [per_shard, *tile]},
            },
            "codecs": [sharded],
        },
    }
    return _done(ts.open(spec, create=True, delete_existing=False))


def _done(future: Any) -> Any:
    """What a tensorstore operation returns; where the disk refuses it, an OSError."""
    try:
        return future.result()
    except ValueError as error:  # so tensorstore names every failure
        raise OSError(str(error)) from error


def _batches(tiles: Iterable[StoredTile], size: int) -> Iterator[list[StoredTile]]:
    """Shards of tiles, the last one shorter."""
    some: list[StoredTile] = []
    for tile in tiles:
        some.append(tile)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some
