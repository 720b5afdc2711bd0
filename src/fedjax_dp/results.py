"""What a run leaves behind: its description, pictures, privacy statement and summary."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fedjax_dp.assembly.federation import client_kind
from fedjax_dp.assembly.programs import make_model
from fedjax_dp.assembly.sites import Sites
from fedjax_dp.checkpoint import Position, load_params
from fedjax_dp.config import Config
from fedjax_dp.data.federation import Federation
from fedjax_dp.data.tiles import IGNORE_INDEX, TileTable
from fedjax_dp.evaluation import Evaluator
from fedjax_dp.federated.cohort import client_mesh
from fedjax_dp.privacy.mechanism import Mechanism
from fedjax_dp.privacy.statement import INFINITY, decode, proven, statement
from fedjax_dp.reporting import pictures
from fedjax_dp.reporting.log import write_json, write_text
from fedjax_dp.reporting.officer import statement_page
from fedjax_dp.reporting.progress import busy
from fedjax_dp.reporting.summary import ComparisonRow, epsilon_text
from fedjax_dp.segmentation.metrics import ImageCounts, image_counts, summarise
from fedjax_dp.workdir import versions

_MOST_NAMES = 8
"""Clients alike that are named in one line; a population has thousands."""


def finished(folder: pathlib.Path) -> dict[str, Any] | None:
    """The summary of a run that has finished in `folder`, or None."""
    path = folder / "summary.json"
    if not path.exists():
        return None
    summary = json.loads(path.read_text(encoding="utf-8"))
    return summary if summary["finished"] else None


def describe(config: Config, federation: Federation, sites: Sites) -> list[str]:
    """Lines that tell, before anything runs, what will be trained and protected."""
    privacy = config.privacy
    tiles = {split: len(getattr(federation, split)) for split in _SPLITS}
    lines = [
        f"{federation.name}: {len(sites.sites)} clients; tiles: "
        + ", ".join(f"{split} {count}" for split, count in tiles.items()),
    ]
    if privacy.placement == "none":
        lines.append("No privacy: placement none; epsilon is infinite.")
        return lines
    lines.append(f"Placement {privacy.placement}, unit {sites.unit} ({sites.unit_note}):")
    rounds = config.federation.rounds
    alike: dict[str, list[str]] = {}
    for site in sites.sites:
        mechanism = site.mechanism
        epsilon = mechanism.epsilon(rounds, privacy.target_delta)
        text = (
            f"{mechanism.num_units} units, q {mechanism.sampling_prob:.4g}, noise "
            f"multiplier {mechanism.noise_multiplier:.4g}, {rounds} rounds: epsilon {epsilon:.3f} "
            f"at delta {privacy.target_delta:g}"
            + "".join(
                f"; one {unit} {text}"
                for unit, text in conversions(
                    mechanism, rounds, privacy.target_delta, client_kind(config)
                ).items()
                if unit != mechanism.headline.unit
            )
        )
        alike.setdefault(text, []).append(site.name)
    for text, who in alike.items():
        named = ", ".join(who[:_MOST_NAMES])
        others = f" and {len(who) - _MOST_NAMES} more" if len(who) > _MOST_NAMES else ""
        lines.append(f"  {named}{others}: {text}")
    lines += [f"Warning: {warning}" for warning in sites.warnings]
    if config.seed >= 0:
        lines.append("Warning: an integer seed makes the noise reproducible: NOT private.")
    return lines


def conversions(
    mechanism: Mechanism, rounds: int, delta: float, client_is: str = "site"
) -> dict[str, str]:
    """What the headline's adversary is proven to learn of one tile and of one patient, in words."""
    headline = mechanism.headline
    rows = [row for row in mechanism.guarantees() if row.adversary == headline.adversary]
    texts = {}
    for unit in ("tile", "patient"):
        covering = [row for row in rows if row.covers(unit, client_is=client_is)]
        epsilons = {row.name: row.epsilon(rounds, delta) for row in covering}
        found = proven(covering, epsilons, unit, client_is)
        texts[unit] = f"no valid conversion: {found['reason']}"
        if found["epsilon"] is not None:
            texts[unit] = epsilon_text(decode(found["epsilon"]))
    return texts


def finish(
    folder: pathlib.Path,
    *,
    config: Config,
    experiment: str,
    federation: Federation,
    sites: Sites,
    evaluator: Evaluator,
    params: Any,
    lines: Sequence[Mapping[str, Any]],
    charged: Mapping[str, int],
    position: Position,
    compile_seconds: float,
    across_runs: Mapping[str, Any] | None = None,
    progress: bool,
) -> dict[str, Any]:
    """Evaluates on test and external tiles, draws, states and sums up; returns the summary."""
    with busy("Evaluating on test and external tiles", show=progress):
        scores = _scores(folder, evaluator, params, federation)
    with busy("Drawing, and stating what is protected", show=progress):
        draw_overlays(folder, federation, evaluator, params)
        draw_curves(folder, lines)
        stated = privacy_statement(config, sites, charged, across_runs)
    write_json(folder / "privacy.json", stated)
    write_text(folder / "privacy.md", statement_page(stated))
    seconds = max(position.seconds, 1e-9)
    summary = {
        "experiment": experiment,
        "finished": True,
        "rounds": position.round,
        "seed": config.seed,
        "model": {"class_names": list(federation.class_names), "mpp": federation.mpp},
        **scores,
        "privacy": _privacy(config, sites, stated),
        "throughput": {
            "tiles_per_second": position.tiles / seconds,
            "seconds_per_round": position.seconds / max(position.round, 1),
            "compile_seconds": compile_seconds,
            "host_share": 1.0 - position.device_seconds / seconds,
        },
        "versions": versions(),
    }
    write_json(folder / "summary.json", summary)
    return summary


def comparison_row(name: str, summary: Mapping[str, Any], split: str = "test") -> ComparisonRow:
    """One row of a comparison table from a run's summary: scores of a split, and epsilons."""
    scores = summary[split] or {}
    privacy = summary["privacy"]

    def worst(unit: str) -> float | None:
        """Of all clients, as the statement proves it; without any guarantee it is infinite."""
        known = privacy[f"{unit}_epsilon"]
        if known is not None:
            return decode(known["max"])
        return math.inf if privacy["epsilon"]["max"] == INFINITY else None

    return ComparisonRow(
        name=name,
        **{metric: scores.get(metric) for metric in ("dice", "jaccard", "accuracy")},
        tile_epsilon=worst("tile"),
        patient_epsilon=worst("patient"),
    )


def constant_row(name: str, scores: Mapping[str, Any]) -> ComparisonRow:
    """The row of a predictor that ignores the image, and so the training data."""
    metrics = {metric: scores[metric] for metric in ("dice", "jaccard", "accuracy")}
    return ComparisonRow(name=name, **metrics, tile_epsilon=0.0, patient_epsilon=0.0)


def predict(
    config: Config, federation: Federation, folder: pathlib.Path, images: np.ndarray
) -> np.ndarray:
    """Label maps uint8 [N, H, W] of images uint8 [N, H, W, 3] by the run saved in `folder`."""
    model = make_model(config, len(federation.class_names))
    params = load_params(folder / "checkpoints", jax.eval_shape(model.init, jax.random.key(0)))
    evaluator = Evaluator(
        model.apply,
        params,
        tile_size=images.shape[1],
        batch_size=config.execution.eval_batch_size,
        mesh=client_mesh(config.execution.devices),
    )
    return evaluator.predictions(params, images)


def privacy_statement(
    config: Config,
    sites: Sites,
    charged: Mapping[str, int],
    across_runs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The statement of the run, rule by rule; see `privacy.statement.statement`."""
    notes = []
    if config.model.init_from:
        notes.append(
            f"the parameters it started from ({config.model.init_from}): what their own training "
            "data owe to privacy is stated by that run, and nothing of it is counted here"
        )
    return statement(
        {site.name: site.mechanism for site in sites.sites},
        charged,
        target_delta=config.privacy.target_delta,
        is_private_randomness=config.seed < 0,
        client_is=client_kind(config),
        unit_note=sites.unit_note,
        not_accounted=notes,
        warnings=sites.warnings,
        across_runs=across_runs,
    )


def draw_curves(folder: pathlib.Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Loss, validation Dice and epsilon over the rounds: `curves.png`."""
    pictures.plot_curves(lines, folder / "curves.png")


def draw_overlays(
    folder: pathlib.Path, federation: Federation, evaluator: Evaluator, params: Any
) -> None:
    """Image, truth and prediction of evaluation tiles: `overlays.png` and `overlays_external.png`.

    Training tiles are never drawn.
    """
    tables = {
        "overlays.png": federation.test if len(federation.test) else federation.validation,
        "overlays_external.png": federation.external,
    }
    for name, table in tables.items():
        chosen = showcase(table)
        if not chosen:
            continue
        index = np.concatenate(list(chosen.values()))
        predicted = dict(
            zip(index, evaluator.predictions(params, table.images[index]), strict=True)
        )
        tiles = {
            site: [(table.images[i], table.labels[i], predicted[i]) for i in some]
            for site, some in chosen.items()
        }
        pictures.site_overlays(tiles, folder / name, class_names=federation.class_names)


def showcase(table: TileTable, per_site: int = 2, max_sites: int = 8) -> dict[str, np.ndarray]:
    """Indices of tiles to show of each site: those whose foreground is nearest to a third."""
    valid, positive = np.zeros((2, len(table)))
    for i, labels in enumerate(table.labels):  # one at a time: they may lie on disk
        is_valid = labels != IGNORE_INDEX
        valid[i], positive[i] = is_valid.mean(), ((labels > 0) & is_valid).mean()
    area = np.maximum(valid, 1e-9)
    foreground = positive / area
    distance = np.abs(foreground - 1 / 3) + (area < 1)
    chosen = {}
    for site in table.sites[:max_sites]:
        tiles = table.of_site(site)
        chosen[site] = tiles[np.argsort(distance[tiles], kind="stable")[:per_site]]
    return chosen


_SPLITS = ("train", "validation", "test", "external")


_EVALUATED = ("test", "external")

_COUNTS_NAME = "image_counts.npz"


def _scores(
    folder: pathlib.Path, evaluator: Evaluator, params: Any, federation: Federation
) -> dict[str, Any]:
    """The summary of each split, None of an empty one; each image's counts go to a file."""
    summaries: dict[str, Any] = dict.fromkeys(_EVALUATED)
    arrays: dict[str, np.ndarray] = {}
    for split in _EVALUATED:
        table: TileTable = getattr(federation, split)
        if not len(table):
            continue
        confusions = evaluator.confusions(params, table)
        summaries[split] = summarise(confusions, table, federation.class_names)
        counts = image_counts(confusions, table)
        arrays |= {f"{split}_{name}": np.asarray(getattr(counts, name)) for name in counts._fields}
    partial = folder / f"partial_{_COUNTS_NAME}"
    np.savez_compressed(partial, **arrays)  # type: ignore[arg-type]
    partial.replace(folder / _COUNTS_NAME)
    return summaries


def load_image_counts(folder: pathlib.Path, split: str) -> ImageCounts | None:
    """The counts of each image of a finished run; None where the split was empty.

    Raises:
        ValueError: the run was finished by a version that kept none.
    """
    try:
        with np.load(folder / _COUNTS_NAME, allow_pickle=False) as arrays:
            if f"{split}_site" not in arrays:
                return None
            found = {name: arrays[f"{split}_{name}"] for name in ImageCounts._fields}
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Expected {_COUNTS_NAME} of a finished run in {folder}, got {error!r}. Run it again: "
            "an older version kept no counts of single images."
        ) from error
    return ImageCounts(**found | {"sites": tuple(map(str, found["sites"]))})


def _privacy(config: Config, sites: Sites, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The summary's part on privacy, taken from the statement."""
    clients = stated["clients"]
    epsilon = {name: entry["epsilon"] for name, entry in clients.items()}
    is_protected = stated["placement"] not in ("none", "update_unclipped")
    rows: dict[str, dict[str, Any]] = {}
    for entry in clients.values():
        for row in entry["guarantees"]:
            seen = rows.setdefault(
                row["name"],
                {"unit": row["unit"], "relation": row["relation"], "epsilon": 0.0},
            )
            valid = row["event"] is not None or not is_protected
            if not valid or seen["epsilon"] is None:
                seen["epsilon"] = None  # no valid guarantee at one client is none at all
            else:
                seen["epsilon"] = max(seen["epsilon"], row["epsilon"], key=decode)
    converted: dict[str, Any] = {}
    for unit in ("tile", "patient"):
        of_client = {name: entry[f"{unit}_epsilon"] for name, entry in clients.items()}
        reasons = {entry["reason"] for entry in of_client.values() if entry["reason"]}
        is_known = all(entry["epsilon"] is not None for entry in of_client.values())
        converted[f"{unit}_epsilon_reason"] = "; ".join(sorted(reasons)) or None
        converted[f"{unit}_epsilon"] = None
        if is_known:
            per_client = {name: entry["epsilon"] for name, entry in of_client.items()}
            worst = max(per_client.values(), key=decode)
            converted[f"{unit}_epsilon"] = {"max": worst, "per_client": per_client}
    return {
        "placement": config.privacy.placement,
        "unit": sites.unit,
        "relation": stated["relation"],
        "target_delta": config.privacy.target_delta,
        "accountant": stated["accountant"],
        "is_private": stated["private"],
        "protected": stated["protected"],
        "epsilon": {"max": max(epsilon.values(), key=decode), "per_client": epsilon},
        "epsilon_by_adversary": {
            adversary: entry["epsilon"]
            for adversary, entry in stated["epsilon_by_adversary"].items()
        },
        **converted,
        "guarantees": rows,
    }
