"""What an honest-but-curious server can rebuild of a tile from what a client sends.

    python -m experiments.inversion --workdir=runs/inversion --checkpoints=fresh,runs/fedavg \
        --config.data.manifest=data/manifest.csv --site=curie

Attacks tiles of one site as each placement would send them: one tile's gradient, means over
batches, several local steps, clipped, clipped and noised; with untrained parameters ("fresh") and
with those of finished runs. Beside every score stands that of a guess that knows nothing, and
beside identification its proven bound. Writes `inversion.json`, `inversion.md` and
`inversion.png`; stopped, the same command goes on. Tiles are the site's test tiles unless `--split`
says otherwise: what it would send if it trained on them.
"""

import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

from experiments.launcher import EXIT_STOPPED, split_cpu
from fedjax_dp.config import Config, ModelConfig, names
from fedjax_dp.processor import use_huge_pages

_WORKDIR = flags.DEFINE_string(
    "workdir", "runs/inversion", "Folder of the report.", allow_override=True
)
_CHECKPOINTS = flags.DEFINE_string(
    "checkpoints",
    "fresh",
    "Comma-separated: fresh (untrained parameters of config.model), or workdirs of finished runs.",
    allow_override=True,
)
_SITE = flags.DEFINE_string(
    "site", "", "Whose tiles; empty = the site with the most.", allow_override=True
)
_SPLIT = flags.DEFINE_enum(
    "split",
    "test",
    ["train", "validation", "test", "external"],
    "Which of its tiles.",
    allow_override=True,
)
_TILE_SIZE = flags.DEFINE_integer(
    "tile_size", 32, "Side of the attacked tile, cut from the middle.", allow_override=True
)
_VICTIMS = flags.DEFINE_integer(
    "victims", 4, "Tiles that are rebuilt; a batch fills up with others.", allow_override=True
)
_CANDIDATES = flags.DEFINE_integer(
    "candidates", 64, "Tiles among which the victim is looked for.", allow_override=True
)
_BATCHES = flags.DEFINE_list(
    "batch_sizes", ["1", "4", "16"], "Tiles of an unprotected message.", allow_override=True
)
_NOISE = flags.DEFINE_list(
    "noise_multipliers",
    ["0.0001", "0.001", "0.01", "0.1", "0.65", "3.7"],
    "Of a clipped and noised message of one tile.",
    allow_override=True,
)
_CLIP = flags.DEFINE_float("l2_clip_norm", 0.5, "Of a tile's gradient.", allow_override=True)
_UPDATE_CLIP = flags.DEFINE_float(
    "update_clip_norm", 0.01, "Of a model update.", allow_override=True
)
_LOCAL_STEPS = flags.DEFINE_integer(
    "local_steps", 4, "Of the message that is a model update.", allow_override=True
)
_LOCAL_RATE = flags.DEFINE_float(
    "local_learning_rate", 0.01, "Of its gradient descent.", allow_override=True
)
_STEPS = flags.DEFINE_integer("steps", 1500, "Of the attack's optimiser.", allow_override=True)
_BATCH_STEPS = flags.DEFINE_integer(
    "batch_steps",
    750,
    "The same for messages of more than one tile or local step.",
    allow_override=True,
)
_RESTARTS = flags.DEFINE_integer("restarts", 1, "Starts of every victim.", allow_override=True)
_MASK = flags.DEFINE_enum(
    "mask", "known", ["known", "joint"], "Whether the attacker has the mask.", allow_override=True
)
_DELTA = flags.DEFINE_float(
    "delta", 1e-5, "At which a message's epsilon is stated.", allow_override=True
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Of the choice of tiles, the starts and the noise.", allow_override=True
)
# One level less than a run's: the smallest network for which a tile of 32 pixels has depth.
_DEFAULTS = Config(model=ModelConfig(base_channels=16, depth=3))


def main(argv: list[str]) -> int:
    """Attacks what is not yet attacked and reports; returns the exit code."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
    use_huge_pages()
    split_cpu(1)
    # jax starts here.
    from experiments import inversion_report, inversion_sweep

    folder = pathlib.Path(_WORKDIR.value)
    options = inversion_sweep.Options(
        checkpoints=names(_CHECKPOINTS.value),
        site=_SITE.value,
        split=_SPLIT.value,
        tile_size=_TILE_SIZE.value,
        victims=_VICTIMS.value,
        candidates=_CANDIDATES.value,
        batch_sizes=tuple(map(int, _BATCHES.value)),
        noise_multipliers=tuple(map(float, _NOISE.value)),
        l2_clip_norm=_CLIP.value,
        update_clip_norm=_UPDATE_CLIP.value,
        local_steps=_LOCAL_STEPS.value,
        local_learning_rate=_LOCAL_RATE.value,
        steps=_STEPS.value,
        batch_steps=_BATCH_STEPS.value,
        restarts=_RESTARTS.value,
        mask=_MASK.value,
        delta=_DELTA.value,
        seed=_SEED.value,
    )
    try:
        report, pictures = inversion_sweep.sweep(flags.FLAGS.config, options, folder)
        print(inversion_report.write(report, pictures, folder))
    except KeyboardInterrupt:
        print("Stopped. What was attacked is kept; the same command goes on.", file=sys.stderr)
        return EXIT_STOPPED
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"The report is in {folder}.")
    return 0


if __name__ == "__main__":
    # Not at import: other experiments have a configuration too.
    config_flags.DEFINE_config_dataclass("config", _DEFAULTS)
    app.run(main)
