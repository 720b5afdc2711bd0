"""Counting pixels of a table of tiles: one compiled program, whatever the split."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedjax_dp.data.tiles import IGNORE_INDEX, TileTable
from fedjax_dp.federated import cohort
from fedjax_dp.segmentation.metrics import confusion_matrix
from fedjax_dp.typing import ApplyFn, Params


class Evaluator:
    """Runs a model over tiles in batches of one size, so one compiled program serves all splits.

    Args:
        apply: the model.
        params: parameters of the shapes, dtypes and sharding it will be called with.
        tile_size: side of the tiles.
        batch_size: tiles of a batch, rounded up to a multiple of the mesh's devices.
        mesh: over whose devices a batch is spread, as far as this process can reach them.

    Attributes:
        compile_seconds: what compiling took.
    """

    def __init__(
        self, apply: ApplyFn, params: Params, *, tile_size: int, batch_size: int, mesh: Mesh
    ):
        self._mesh = cohort.local_mesh(mesh)
        self.batch_size = -(-max(batch_size, 1) // self._mesh.size) * self._mesh.size
        self._sharding = cohort.by_device(self._mesh)

        def program(params: Params, images: Any, labels: Any) -> tuple[Any, Any]:
            logits = apply(params, images.astype(jnp.float32) / 255.0, jax.random.key(0))
            confusions = jax.vmap(confusion_matrix)(logits, labels)
            return confusions, logits.argmax(-1).astype(jnp.uint8)

        shape = (self.batch_size, tile_size, tile_size)
        images = jax.ShapeDtypeStruct((*shape, 3), jnp.uint8, sharding=self._sharding)
        labels = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=self._sharding)
        self._program = jax.jit(program).lower(self._here(params), images, labels).compile()

    def confusions(
        self, params: Params, table: TileTable, *, tick: Callable[[], None] = lambda: None
    ) -> np.ndarray:
        """Pixel counts int64 [N, K, K] of every tile, rows truth.

        Args:
            params: the parameters.
            table: the tiles.
            tick: called after every batch.
        """
        parts = []
        for count, (counts, _) in self._batches(params, table.images, table.labels):
            parts.append(np.asarray(counts)[:count].astype(np.int64))
            tick()
        return np.concatenate(parts) if parts else np.zeros((0, 0, 0), np.int64)

    def predictions(self, params: Params, images: np.ndarray) -> np.ndarray:
        """Label maps uint8 [N, H, W] of images uint8 [N, H, W, 3]."""
        labels = np.full(images.shape[:3], IGNORE_INDEX, np.uint8)
        parts = [
            np.asarray(predicted)[:count]
            for count, (_, predicted) in self._batches(params, images, labels)
        ]
        return np.concatenate(parts) if parts else labels

    def _here(self, params: Params) -> Params:
        return cohort.fetch(params, self._mesh)

    def _batches(
        self, params: Params, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, Any]]:
        params = self._here(params)
        for start in range(0, len(images), self.batch_size):
            some = images[start : start + self.batch_size], labels[start : start + self.batch_size]
            count = len(some[0])
            padding = self.batch_size - count
            padded = (
                np.pad(some[0], ((0, padding), (0, 0), (0, 0), (0, 0))),
                np.pad(some[1], ((0, padding), (0, 0), (0, 0)), constant_values=IGNORE_INDEX),
            )
            yield count, self._program(params, *jax.device_put(padded, self._sharding))
