r"""What a run would promise and cost at each site, in seconds and without training.

    python -m experiments.plan --manifest=data/manifest.csv --epsilon=8

Prints of every site its units, sampling probability, noise multiplier, rounds allowed, epsilons,
noise and time, and advice. Image headers are read, pixels are not: experiments.check_manifest does
that. Without a manifest it plans for the synthetic federation. The numbers are those of a run with
the same settings. Computed noise multipliers are kept in --cache.
"""

import math
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, get_args

import jax
from absl import app, flags

from fedjax_dp import planning
from fedjax_dp.assembly.federation import load_outline, with_clients
from fedjax_dp.assembly.programs import make_model
from fedjax_dp.assembly.sites import make_sites
from fedjax_dp.config import Config
from fedjax_dp.planning import SitePlan
from fedjax_dp.privacy.settings import Placement
from fedjax_dp.privacy.statement import decode
from fedjax_dp.reporting.summary import epsilon_text

WIDTH = 120

_DEFAULT = Config()
_PRIVACY, _FEDERATION = _DEFAULT.privacy, _DEFAULT.federation

# Other experiments have flags of these names too; one process of tests imports several.
_MANIFEST = flags.DEFINE_string(
    "manifest", "", "The CSV file; empty = the synthetic federation.", allow_override=True
)
_TRAIN_SITES = flags.DEFINE_string("train_sites", "", "Comma-separated; empty = as the split says.")
_EPSILON = flags.DEFINE_float("epsilon", _PRIVACY.target_epsilon, "Budget of every site.")
_DELTA = flags.DEFINE_float(
    "delta", _PRIVACY.target_delta, "Delta at which epsilon is stated.", allow_override=True
)
_UNIT = flags.DEFINE_enum("unit", "auto", ("auto", "tile", "slide", "patient"), "Who is protected.")
_PLACEMENT = flags.DEFINE_enum(
    "placement", _PRIVACY.placement, get_args(Placement), "Where the noise enters."
)
_ROUNDS = flags.DEFINE_integer("rounds", _FEDERATION.rounds, "Rounds that the budget must last.")
_BATCH = flags.DEFINE_float(
    "expected_batch_size", _PRIVACY.expected_batch_size, "Units that a site draws in a step."
)
_TILE_SIZE = flags.DEFINE_integer(
    "tile_size", _DEFAULT.data.tile_size, "Side of a tile, pixels.", allow_override=True
)
_CAP = flags.DEFINE_integer(
    "max_tiles_per_patient", 0, "Enforced cap, for a conversion from tiles to patients; 0 = none."
)
_DROPOUTS = flags.DEFINE_integer("max_dropouts", 0, "Sites that distributed may lose in a round.")
_COHORT = flags.DEFINE_float(
    "cohort_prob", 0.0, "Probability of each site in a round; 0 = all in every round."
)
_SPEED = flags.DEFINE_float(
    "tiles_per_second", 0.0, "Tiles your machine trains in a second; 0 = estimated for two cores."
)
_CACHE = flags.DEFINE_string("cache", "runs/calibration", "Folder of calibrations; empty = none.")


def main(argv: list[str]) -> int:
    """Plans with the flags of the command line; returns the exit code."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
    jax.config.update("jax_platforms", "cpu")  # nothing is computed; to look for devices takes long
    try:
        config = make_config(
            manifest=_MANIFEST.value,
            train_sites=_TRAIN_SITES.value,
            epsilon=_EPSILON.value,
            delta=_DELTA.value,
            unit=_UNIT.value,
            placement=_PLACEMENT.value,
            rounds=_ROUNDS.value,
            expected_batch_size=_BATCH.value,
            tile_size=_TILE_SIZE.value,
            max_tiles_per_patient=_CAP.value,
            max_dropouts=_DROPOUTS.value,
            cohort_prob=_COHORT.value,
        )
        print(plan(config, tiles_per_second=_SPEED.value, cache=_CACHE.value))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def make_config(
    *,
    manifest: str = "",
    train_sites: str = "",
    epsilon: float = _PRIVACY.target_epsilon,
    delta: float = _PRIVACY.target_delta,
    unit: str = "auto",
    placement: str = _PRIVACY.placement,
    rounds: int = _FEDERATION.rounds,
    expected_batch_size: float = _PRIVACY.expected_batch_size,
    tile_size: int = _DEFAULT.data.tile_size,
    max_tiles_per_patient: int = 0,
    max_dropouts: int = 0,
    cohort_prob: float = 0.0,
) -> Config:
    """The configuration of the run that is planned; all that has no argument is the default."""
    config = Config()
    config.data.manifest, config.data.train_sites = manifest, train_sites
    config.data.tile_size = tile_size
    privacy = config.privacy
    privacy.placement, privacy.unit = placement, unit
    privacy.target_epsilon, privacy.target_delta = epsilon, delta
    privacy.expected_batch_size = expected_batch_size
    privacy.max_tiles_per_patient, privacy.max_dropouts = max_tiles_per_patient, max_dropouts
    config.federation.rounds = rounds
    if cohort_prob:
        config.federation.cohort, config.federation.cohort_prob = "poisson", cohort_prob
    if placement in ("none", "update_unclipped"):
        # Nothing can be calibrated there; the noise of "update_unclipped" is any number.
        privacy.target_epsilon, privacy.noise_multiplier = 0.0, float(placement != "none")
    return config


def plan(config: Config, *, tiles_per_second: float = 0.0, cache: str = "") -> str:
    """The plan as text.

    Args:
        config: the run's.
        tiles_per_second: of the machine; 0 = estimated.
        cache: folder of calibrations; empty = none.

    Raises:
        ValueError: as of a run, as far as it can be told without pixels.
    """
    if tiles_per_second < 0:
        raise ValueError(f"Expected tiles_per_second >= 0, got {tiles_per_second}.")
    outline = with_clients(config, load_outline(config))
    dimension = make_model(config, len(outline.class_names)).dimension
    made = make_sites(config, outline, dimension=dimension, cache_dir=cache or None)
    speed = tiles_per_second or planning.estimated_tiles_per_second(
        config, len(outline.class_names)
    )
    plans = planning.site_plans(config, outline, made, speed)
    how = "as given"
    if not tiles_per_second:
        how = f"estimated: {planning.FLOPS_PER_SECOND / 1e9:g} GFLOP/s, two CPU cores"
    m, settings, privacy = made.sites[0].mechanism, config.federation, config.privacy
    steps = f"{settings.local_steps} step{'s' * (settings.local_steps != 1)}"
    parts = [
        f"{outline.name}: {_count(len(plans), 'client')}, {len(outline.train):,} training tiles of "
        f"{config.data.tile_size} pixels. Nothing was trained, and no pixel was looked at.",
        f"Placement {privacy.placement}, unit {made.unit} ({made.unit_note}), "
        f"{_count(settings.rounds, 'round')} of {steps}. Epsilon is of one {m.headline.unit}, at "
        f"delta {privacy.target_delta:g}, against {m.headline.adversary}.",
        _table(plans, made.unit),
        *_reasons(plans),
        f"Noise/signal: noise on one parameter (standard deviation) over the largest norm of the "
        f"mean it is added to; times {dimension**0.5:,.0f}, the root of {dimension:,} parameters, "
        "norm over norm.",
        f"Time: {_duration(sum(p.seconds for p in plans))} for all, one after another, at "
        f"{speed:.3g} tiles a second ({how}).",
    ]
    lines = planning.advice(config, outline, made, plans)
    if lines:
        parts.append("\n".join(["Advice:", *(_wrap(f"- {line}", "  ") for line in lines)]))
    return "\n\n".join(_wrap(part) for part in parts)


def _table(plans: Sequence[SitePlan], unit: str) -> str:
    """Aligned text, one line a client."""
    header = (
        "client", f"{unit}s", "patients", "tiles", "q", "noise z", "rounds", "epsilon",
        "one tile", "one patient", "noise/signal", "time",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [header]
    for p in plans:
        rows.append((
            p.name if len(p.name) <= 24 else f"{p.name[:21]}...",
            f"{p.num_units:,}",
            "unknown" if p.num_patients is None else str(p.num_patients),
            f"{p.num_tiles:,}",
            f"{p.sampling_prob:.3g}",
            f"{p.noise_multiplier:.3g}",
            "-" if p.rounds_allowed is None else f"{p.rounds_allowed:,}",
            epsilon_text(p.epsilon),
            _proven(p.tile, p.epsilon),
            _proven(p.patient, p.epsilon),
            "-" if p.noise_to_signal is None else f"{p.noise_to_signal:.3g}",
            _duration(p.seconds),
        ))  # fmt: skip
    # With unit = patient, or tile, a column would stand there twice.
    kept = [i for i, name in enumerate(header) if name not in header[:i]]
    rows = [tuple(row[i] for i in kept) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def _proven(found: dict[str, Any], epsilon: float) -> str:
    if found["epsilon"] is None:
        return "infinite" if math.isinf(epsilon) else "none valid"
    return epsilon_text(decode(found["epsilon"]))


def _reasons(plans: Sequence[SitePlan]) -> list[str]:
    """Why a conversion is not valid, once for all sites of which it holds."""
    lines: list[str] = []
    if any(math.isinf(p.epsilon) for p in plans):
        return lines
    for unit in ("tile", "patient"):
        reasons = dict.fromkeys(
            getattr(p, unit)["reason"] for p in plans if getattr(p, unit)["epsilon"] is None
        )
        lines += [f"No valid conversion to one {unit}: {reason}." for reason in reasons]
    return lines


def _wrap(text: str, indent: str = "") -> str:
    """A paragraph at the width of a terminal; what has lines already is left as it is."""
    if "\n" in text:
        return text
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    app.run(main)
