"""The model of a finished run, as a function from windows to probabilities."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_dp.assembly.programs import make_model
from fedjax_dp.checkpoint import load_params
from fedjax_dp.config import Config
from fedjax_dp.federated import cohort
from fedjax_dp.inference.sliding_window import PredictFn


@dataclasses.dataclass(frozen=True)
class RunModel:
    """What a run knows of itself.

    Attributes:
        config: of the run.
        class_names: K names.
        mpp: micrometres per pixel of its tiles; None where nobody said.
        params: the averaged parameters.
        digest: of the parameters, hex.
    """

    config: Config
    class_names: tuple[str, ...]
    mpp: float | None
    params: Any
    digest: str


def load_run(folder: pathlib.Path) -> RunModel:
    """Loads the model of a finished run.

    Args:
        folder: its workdir.

    Raises:
        ValueError: the folder holds no finished run, or one of another version.
    """
    try:
        identity = json.loads((folder / "config.json").read_text(encoding="utf-8"))["identity"]
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        class_names = tuple(summary["model"]["class_names"])
        mpp = summary["model"]["mpp"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"Expected the workdir of a finished run, got {folder}: {error!r}. Let the run end "
            "first, or give another --checkpoint."
        ) from error
    config = _config(identity)
    model = make_model(config, len(class_names))
    like = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.device_get(load_params(folder / "checkpoints", like))
    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return RunModel(config, class_names, mpp, params, digest.hexdigest())


def predictor(run: RunModel, *, window: int, batch_size: int) -> PredictFn:
    """Compiles the model for windows of one size; batches are filled up with blank ones.

    Args:
        run: from `load_run`.
        window: side, pixels; a multiple of 2**depth.
        batch_size: windows at once, rounded up to a multiple of the devices.

    Raises:
        ValueError: the window does not fit the network.
    """
    factor = 2**run.config.model.depth
    if window % factor:
        raise ValueError(f"Expected --window to be a multiple of {factor}, got {window}.")
    mesh = cohort.client_mesh()
    sharding = cohort.by_device(mesh)
    size = -(-max(batch_size, 1) // mesh.size) * mesh.size
    model = make_model(run.config, len(run.class_names))
    params = cohort.place(run.params, cohort.replicated(mesh))

    def program(params: Any, images: Any) -> Any:
        logits = model.apply(params, images.astype(jnp.float32) / 255.0, jax.random.key(0))
        return jax.nn.softmax(logits.astype(jnp.float32), -1)

    like = jax.ShapeDtypeStruct((size, window, window, 3), jnp.uint8, sharding=sharding)
    compiled = jax.jit(program).lower(params, like).compile()

    def predict(images: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(images), size):
            some = images[start : start + size]
            padding = ((0, size - len(some)), (0, 0), (0, 0), (0, 0))
            batch = jax.device_put(np.pad(some, padding), sharding)
            parts.append(np.asarray(compiled(params, batch))[: len(some)])
        return np.concatenate(parts)

    return predict


def _config(identity: dict[str, Any]) -> Config:
    """The configuration of a run from its flattened identity."""
    config = Config()
    for name, value in identity.items():
        section, _, field = name.partition(".")
        target = getattr(config, section, None) if field else config
        if target is not None and hasattr(target, field or section):
            setattr(target, field or section, value)
    return config
