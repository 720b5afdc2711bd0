"""Enters a run into the register that the runs of its folder share, and tells what they cost."""

import dataclasses
import json
import os
import pathlib
import secrets
from collections.abc import Mapping
from typing import Any

from fedjax_dp.data.sources import Holding, SiteSource
from fedjax_dp.privacy import across_runs
from fedjax_dp.privacy.mechanism import Mechanism
from fedjax_dp.privacy.register import Plan, Register, Run
from fedjax_dp.reporting.log import write_json

REGISTER_NAME = "privacy_register.jsonl"

_RUN_ID = "run_id.json"


@dataclasses.dataclass(frozen=True)
class Registration:
    """A run that stands in the register, with all the rounds that it may yet be charged.

    Attributes:
        register: the register.
        run_id: of the run.
        sources: of the sites whose data it trains on.
    """

    register: Register
    run_id: str
    sources: tuple[SiteSource, ...]

    def close(self, charged: Mapping[str, int]) -> None:
        """Replaces planned rounds by those charged, as `ChargeLog.counts` has them."""
        self.register.close_run(self.run_id, charged)

    def across_runs(self, target_delta: float) -> dict[str, Any]:
        """The statement's part on all runs up to now, this one included.

        What an earlier run left behind must not keep this one from ending: where the sum cannot be
        told, the part says why.
        """
        part: dict[str, Any] = {
            "register": self.register.path.name,
            "as_of": "the end of this run; python -m experiments.released tells the present",
        }
        try:
            return part | across_runs.to_json(self.register.runs(), self.sources, target_delta)
        except (ValueError, OSError) as error:
            return part | {"error": f"not known: {error}"}


def register_run(
    folder: str | os.PathLike[str],
    *,
    experiment: str,
    seed: int,
    tile_size: int,
    holdings: Mapping[str, Holding],
    mechanisms: Mapping[str, Mechanism],
    charged: Mapping[str, int],
    rounds_left: int,
    limits: Mapping[str, int],
) -> Registration:
    """Writes down, durably, what a run may be charged; to be called before it charges anything.

    The register lies beside the workdir, so that all runs of one folder share it. Rounds planned
    are those charged already and all that are left, up to the client's limit: rounds since the last
    checkpoint may have to be charged again. A workdir under another name than the one it began
    with, a copy for one, counts as a run of its own.

    Args:
        folder: the workdir, which exists and is this process's alone.
        experiment: name of the experiment.
        seed: -1 where the randomness is secret.
        tile_size: side of a tile, pixels.
        holdings: client -> what it holds, of `data.sources.holdings`.
        mechanisms: client -> its mechanism.
        charged: client -> rounds charged up to now; absent means none.
        rounds_left: rounds after the state that the run goes on from.
        limits: client -> the most rounds its budget allows; one without an entry has no limit.

    Returns:
        The registration, to be closed when the run ends.

    Raises:
        OSError: the register cannot be written.
        ValueError: the register is damaged, or knows the run with another mechanism.
        RuntimeError: another process holds the register for more than a minute.
    """
    folder = pathlib.Path(folder).absolute()
    register = Register(folder.parent / REGISTER_NAME)
    run_id = _run_id(folder)
    plans = {}
    for client, mechanism in mechanisms.items():
        spent = charged.get(client, 0)
        left = min(rounds_left, max(limits.get(client, spent + rounds_left) - spent, 0))
        plans[client] = Plan(holdings[client], mechanism.descriptor(), spent + left)
    run = Run(
        run_id=run_id,
        name=folder.name,
        seed=seed,
        experiment=experiment,
        tile=f"{tile_size} px",
        plans=plans,
    )
    try:
        register.open_run(run)
    except PermissionError as error:
        raise PermissionError(
            f"Cannot write {register.path} ({error.strerror}), where all runs on the same data are "
            "written down. Use a workdir in a folder that can be written, such as runs/NAME."
        ) from error
    sources = dict.fromkeys(source for held in holdings.values() for source in held.sources)
    return Registration(register, run_id, tuple(sources))


def _run_id(folder: pathlib.Path) -> str:
    """128 random bits in hexadecimal, drawn at the first start and kept in the workdir."""
    path = folder / _RUN_ID
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["name"] == folder.name:
            return str(kept["run_id"])
    run_id = secrets.token_hex(16)
    write_json(path, {"run_id": run_id, "name": folder.name})
    return run_id
