"""Three runs on the synthetic federation, and what protecting tiles and patients cost.

    python -m experiments.demo --workdir=runs/demo

FedAvg without privacy, FedDP whose unit is the tile, FedDP whose unit is the patient, on the same
tiles: each with its own workdir below `--workdir`, then `comparison.md` and `comparison.png`.
Stopped, the same command goes on. Needs no data, under ten minutes on two cores.
"""

import pathlib
import sys
import time
from typing import Any

from absl import app, flags, logging

from experiments.launcher import EXIT_STOPPED, split_cpu
from fedjax_dp.config import (
    Config,
    DataConfig,
    FederationConfig,
    ModelConfig,
    PrivacyConfig,
)
from fedjax_dp.interrupts import Stopped
from fedjax_dp.processor import use_huge_pages

BASELINE, TILE, PATIENT = "fedavg", "feddp-tile", "feddp-patient"

_WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Folder of the three runs.")


def configs() -> dict[str, Config]:
    """The runs of the demo: name -> configuration."""

    def config(privacy: PrivacyConfig, federation: FederationConfig) -> Config:
        return Config(
            # 64 pixels of half a micrometre: small enough for two cores, large enough for nuclei.
            data=DataConfig(
                tile_size=64, synthetic_mpp=0.5, patients_per_site=200, tiles_per_patient=4
            ),
            model=ModelConfig(base_channels=8, depth=2, num_groups=4),
            privacy=privacy,
            federation=federation,
            eval_every=10,
            checkpoint_every=20,
        )

    def private(unit: str, batch: float) -> Config:
        return config(
            PrivacyConfig(
                placement="dp_sgd",
                unit=unit,
                l2_clip_norm=0.5,
                target_epsilon=10.0,
                # Below 1/n of the units that are protected: 800 tiles or 200 patients a site.
                target_delta=1e-4 if unit == "tile" else 1e-3,
                expected_batch_size=batch,
                tiles_per_unit=1 if unit == "tile" else 2,
                max_tiles_per_patient=4,
            ),
            FederationConfig(
                rounds=40, local_steps=1, server_optimizer="adam", server_learning_rate=5e-3,
                server_schedule="cosine", ema_decay=0.8,
            ),
        )  # fmt: skip

    return {
        BASELINE: config(
            PrivacyConfig(placement="none", unit="tile", expected_batch_size=16.0),
            FederationConfig(
                rounds=40, local_steps=2, client_optimizer="adam", client_learning_rate=3e-3,
                server_optimizer="sgd", server_learning_rate=1.0, server_momentum=0.0,
                ema_decay=0.8,
            ),
        ),
        TILE: private("tile", 64.0),
        PATIENT: private("patient", 32.0),
    }  # fmt: skip


def main(argv: list[str]) -> int:
    """Runs what is left of the demo and compares; returns the exit code."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
    logging.set_verbosity(logging.WARNING)
    start = time.perf_counter()
    folder = pathlib.Path(_WORKDIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    runs = configs()
    split_cpu(0)
    # jax starts here.
    from fedjax_dp import training
    from fedjax_dp.assembly.federation import load_federation

    federation = load_federation(runs[BASELINE], progress=True)
    summaries = {}
    for number, (name, config) in enumerate(runs.items(), start=1):
        print(f"\n[{number}/{len(runs)}] {name}", flush=True)
        try:
            summaries[name] = training.run(
                config, folder / name, experiment=name, federation=federation
            )
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            return EXIT_STOPPED
    text = compare(folder, federation, runs, summaries)
    print(
        f"\n{text}\nPictures and logs are in {folder}. {time.perf_counter() - start:.0f} s in all."
    )
    return 0


def compare(
    folder: pathlib.Path, federation: Any, runs: dict[str, Config], summaries: dict[str, Any]
) -> str:
    """Writes `comparison.md` and `comparison.png`; returns the text for the terminal."""
    from fedjax_dp import results
    from fedjax_dp.reporting import pictures
    from fedjax_dp.reporting.log import write_text
    from fedjax_dp.reporting.summary import comparison_table, cost_sentence, plain_table

    rows = [results.comparison_row(name, summary) for name, summary in summaries.items()]
    trivial = summaries[BASELINE]["test"]["trivial"]
    rows += [
        results.constant_row(f"predict {which.replace('_', ' ')}", trivial[which])
        for which in ("all_background", "all_foreground")
    ]
    sentence = cost_sentence(rows, baseline=BASELINE, tile=TILE, patient=PATIENT)
    write_text(
        folder / "comparison.md",
        f"# What privacy cost on the {federation.name} federation\n\n{sentence}\n\n"
        f"{comparison_table(rows, baseline=BASELINE)}\n![One tile five ways](comparison.png)\n",
    )
    tiles = [indices[0] for indices in results.showcase(federation.test, per_site=1).values()]
    images, labels = federation.test.images[tiles], federation.test.labels[tiles]
    titles = {BASELINE: "no privacy", TILE: "tile-level", PATIENT: "patient-level"}
    predictions = {
        titles[name]: results.predict(config, federation, folder / name, images)
        for name, config in runs.items()
    }
    pictures.comparison(
        images, labels, predictions, folder / "comparison.png",
        class_names=federation.class_names, row_names=federation.test.sites,
    )  # fmt: skip
    return f"{plain_table(rows, baseline=BASELINE)}\n{sentence}"


if __name__ == "__main__":
    use_huge_pages()
    app.run(main)
