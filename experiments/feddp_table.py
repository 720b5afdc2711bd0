"""The paper's comparison on any federation: what privacy costs, with intervals, by one command.

    python -m experiments.feddp_table --workdir=runs/table --config.data.manifest=data/manifest.csv

Trains, on the same tiles for the same rounds and with each seed: all tiles at one place, every
site alone, FedAvg, and FedDP with noise in every step (`dp_sgd`), under secure aggregation
(`distributed`) and on the update (`update`) at every epsilon, also without its clip
(`update_unclipped`). Each run has its own workdir below `--workdir`; what has finished is not
trained again, so the same command goes on, and shows what there is. Writes `table.md` and
`table.json`. Runs of integer seeds can be repeated and are marked "not private"; the epsilons are
those of the same settings with secret randomness.
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from experiments.launcher import EXIT_STOPPED, split_cpu
from fedjax_dp.config import Config, FederationConfig, PrivacyConfig, names
from fedjax_dp.processor import use_huge_pages

_WORKDIR = flags.DEFINE_string(
    "workdir", "runs/table", "Folder of the runs and the table.", allow_override=True
)
_SEEDS = flags.DEFINE_list(
    "seeds", ["0", "1", "2"], "Of the runs of every row.", allow_override=True
)
_EPSILONS = flags.DEFINE_list(
    "epsilons", ["8", "3"], "Of the private rows, each site's.", allow_override=True
)
_ROWS = flags.DEFINE_string(
    "rows", "", "Comma-separated rows to train; empty = all.", allow_override=True
)
_TILES = flags.DEFINE_float(
    "tiles_per_round",
    192.0,
    "Tiles of all sites together that a round visits, on average.",
    allow_override=True,
)
_STEPS = flags.DEFINE_integer(
    "fedavg_steps",
    4,
    "Local steps of FedAvg, alone and update; their tiles are shared out.",
    allow_override=True,
)
_LOCAL_RATE = flags.DEFINE_float(
    "fedavg_learning_rate", 1e-3, "Of their Adam.", allow_override=True
)
_UPDATE_CLIP = flags.DEFINE_float(
    "update_clip_norm", 3e-4, "Of a model update.", allow_override=True
)
_RESAMPLES = flags.DEFINE_integer("resamples", 2000, "Of the bootstrap.", allow_override=True)
_REPORT_ONLY = flags.DEFINE_boolean(
    "report_only", False, "Whether to train nothing.", allow_override=True
)
_DEFAULTS = Config(
    privacy=PrivacyConfig(l2_clip_norm=0.5),
    federation=FederationConfig(rounds=16, server_schedule="cosine", ema_decay=0.8),
    seed=0,
)


def main(argv: list[str]) -> int:
    """Trains what is not there yet, and writes the table; returns the exit code."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
    logging.set_verbosity(logging.WARNING)
    use_huge_pages()
    config, folder = flags.FLAGS.config, pathlib.Path(_WORKDIR.value)
    split_cpu(config.execution.devices)
    # jax starts here.
    from experiments import feddp_table_report, feddp_table_runs
    from fedjax_dp.interrupts import Stopped

    options = feddp_table_runs.Options(
        seeds=tuple(map(int, _SEEDS.value)),
        epsilons=tuple(map(float, _EPSILONS.value)),
        rows=names(_ROWS.value),
        tiles_per_round=_TILES.value,
        fedavg_steps=_STEPS.value,
        fedavg_learning_rate=_LOCAL_RATE.value,
        update_clip_norm=_UPDATE_CLIP.value,
    )
    code = 0
    try:
        rows = feddp_table_runs.rows(config, options, folder, train=not _REPORT_ONLY.value)
        print(feddp_table_report.write(rows, folder, resamples=_RESAMPLES.value))
    except Stopped as stopped:
        print(f"{stopped} The same command goes on.", file=sys.stderr)
        code = EXIT_STOPPED
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    return code


if __name__ == "__main__":
    # Not at import: other experiments have a configuration too.
    config_flags.DEFINE_config_dataclass("config", _DEFAULTS)
    app.run(main)
