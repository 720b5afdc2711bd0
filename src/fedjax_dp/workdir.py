"""The folder of a run: whose it is, and what its bytes depend on."""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import platform
from importlib import metadata
from typing import Any

import jax

import fedjax_dp
from fedjax_dp.config import Config, identity
from fedjax_dp.processor import cores
from fedjax_dp.reporting.log import to_json, write_json

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "dp-accounting", "orbax-checkpoint")


_SETTINGS = (
    "jax_default_matmul_precision",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"fedjax_dp": fedjax_dp.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def environment_hash(plan: dict[str, Any]) -> str:
    """Hash of all that a round's bytes depend on beside configuration, data and secrets.

    Two processes with the same hash that replay a round send byte-identical messages: versions,
    device, cores and instruction set (they decide the order of sums) and the execution plan.

    Args:
        plan: the resolved execution plan.
    """
    device = jax.devices()[0]
    parts = {
        "versions": versions(),
        "device": [device.platform, device.device_kind, jax.device_count()],
        "machine": [platform.machine(), _processor(), *_parallelism()],
        "flags": [os.environ.get("XLA_FLAGS", ""), *(getattr(jax.config, n) for n in _SETTINGS)],
        "source": _source_digest(pathlib.Path(fedjax_dp.__file__).parent),
        "plan": plan,
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


@functools.cache  # an edit while the program runs does not reach it
def _source_digest(folder: pathlib.Path) -> str:
    """Digest of this package's source: an edit between a crash and its replay changes messages."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _parallelism() -> tuple[int | str, ...]:
    """What XLA sizes its thread pool by."""
    return cores(), *(os.environ.get(name, "") for name in ("NPROC", "PJRT_NPROC"))


def _processor() -> str:
    """The processor's model and instruction sets, where the system tells."""
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        wanted = ("model name", "flags", "Features")
        return "|".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
    return platform.processor()


def check(folder: pathlib.Path, experiment: str, config: Config, fingerprint: str) -> None:
    """Refuses a workdir that belongs to another run; changes nothing.

    Args:
        folder: the workdir; may be absent.
        experiment: name of the experiment.
        config: what the run was told.
        fingerprint: of the training data.

    Raises:
        ValueError: the folder belongs to another experiment, configuration or data; the message
            shows each difference.
    """
    path = folder / "config.json"
    if not path.exists():
        return
    mine = _identity(experiment, config, fingerprint)
    theirs = json.loads(path.read_text(encoding="utf-8"))["identity"]
    differences = [
        f"  {name}: {theirs.get(name, 'absent')!r} there, {mine.get(name, 'absent')!r} now"
        for name in sorted({*mine, *theirs})
        if theirs.get(name, "absent") != mine.get(name, "absent")
    ]
    if differences:
        raise ValueError(
            f"The workdir {folder} belongs to another run:\n" + "\n".join(differences) + "\n"
            "Use its configuration to go on with it, or another --workdir."
        )


def claim(folder: pathlib.Path, experiment: str, config: Config, fingerprint: str) -> None:
    """`check`, and then writes `config.json` where there is none: the folder is this run's.

    To be called when all that can be wrong with a configuration has been tried, so that a mistake
    claims no folder.
    """
    check(folder, experiment, config, fingerprint)
    path = folder / "config.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        identity_ = _identity(experiment, config, fingerprint)
        write_json(path, {"identity": identity_, "execution": _execution(config)})


def _identity(experiment: str, config: Config, fingerprint: str) -> dict[str, Any]:
    mine = {"experiment": experiment, "data.fingerprint": fingerprint, **identity(config)}
    return json.loads(to_json(mine))  # as it reads back: JSON knows no infinity


def _execution(config: Config) -> dict[str, Any]:
    return {
        **vars(config.execution),
        "eval_every": config.eval_every,
        "checkpoint_every": config.checkpoint_every,
    }
