"""What `experiments.feddp_table` writes: the table, its intervals, and what the runs cost."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.feddp_table_runs import BASELINE, Row
from fedjax_dp.privacy.mechanism import mechanism_from_descriptor
from fedjax_dp.privacy.statement import decode
from fedjax_dp.reporting.log import write_json, write_text
from fedjax_dp.reporting.summary import epsilon_text
from fedjax_dp.results import finished, load_image_counts
from fedjax_dp.segmentation import intervals
from fedjax_dp.segmentation.metrics import ImageCounts

_METRICS = ("dice", "jaccard", "accuracy")
_TITLES = {"test": "Test patients of the training sites", "external": "External hospitals"}


def write(rows: Sequence[Row], folder: pathlib.Path, *, resamples: int = 2000) -> str:
    """Writes `table.md` and `table.json` of the runs that have finished; returns the text."""
    report = collect(rows, resamples=resamples)
    write_json(folder / "table.json", report)
    text = markdown(report)
    write_text(folder / "table.md", text)
    return text


def collect(rows: Sequence[Row], *, resamples: int = 2000) -> dict[str, Any]:
    """All figures of the table, as plain numbers.

    Raises:
        ValueError: no run has finished.
    """
    there = [row for row in rows if row.folders]
    if not there:
        raise ValueError("Expected a finished run, got none: train first.")
    by_name = {row.name: row for row in there}
    report: dict[str, Any] = {
        "missing": {
            row.name: row.planned - sum(map(len, row.folders.values()))
            for row in rows
            if row.planned > sum(map(len, row.folders.values()))
        },
        "rows": {},
        "splits": {},
    }
    for row in there:
        report["rows"][row.name] = {"seeds": sorted(row.folders)} | _privacy(row)
    for split in _TITLES:
        baseline = _counts(by_name[BASELINE], split) if BASELINE in by_name else {}
        entries = {}
        for row in there:
            counts = _counts(row, split)
            if counts:
                entries[row.name] = _scored(row, split, counts, baseline, resamples)
        if entries:
            summaries = [_summary(next(iter(there[0].folders.values()))[0])]
            trivial = summaries[0][split]["trivial"]
            report["splits"][split] = {
                "rows": entries,
                "trivial": {
                    name: {m: scores[m] for m in _METRICS}
                    | {"pooled": {m: scores["pooled"][m] for m in _METRICS}}
                    for name, scores in trivial.items()
                },
            }
    return report


def _summary(folder: pathlib.Path) -> dict[str, Any]:
    found = finished(folder)
    if found is None:
        raise ValueError(f"Expected a finished run in {folder}.")
    return found


def _counts(row: Row, split: str) -> dict[int, ImageCounts]:
    """Of each seed the counts of every image; a site alone is scored on its own test images."""
    found = {}
    for seed, folders in sorted(row.folders.items()):
        parts = [load_image_counts(folder, split) for folder in folders]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or not known:
            continue
        found[seed] = known[0] if row.name != "alone" else _own(folders, known, split)
    return found


def _own(folders: Sequence[pathlib.Path], parts: Sequence[ImageCounts], split: str) -> ImageCounts:
    """Test images each by its own site's network; external ones by all, their counts added up."""
    first = parts[0]
    if split == "external":
        return first._replace(confusions=np.sum([part.confusions for part in parts], axis=0))
    confusions = first.confusions.copy()
    is_own = np.zeros(len(first.site), bool)
    for folder, part in zip(folders, parts, strict=True):
        site = folder.parent.name.removeprefix("alone-")
        own = first.site == first.sites.index(site)
        confusions[own], is_own = part.confusions[own], is_own | own
    kept = {name: getattr(first, name)[is_own] for name in ("site", "patient")}
    return first._replace(confusions=confusions[is_own], **kept)


def _scored(
    row: Row,
    split: str,
    counts: Mapping[int, ImageCounts],
    baseline: Mapping[int, ImageCounts],
    resamples: int,
) -> dict[str, Any]:
    each = np.stack([intervals.headline(of_seed) for of_seed in counts.values()])
    pooled = np.stack([
        intervals.headline(of_seed._replace(
            confusions=of_seed.confusions.sum(0, keepdims=True),
            site=np.zeros(1, np.int32), patient=np.zeros(1, np.int32)))
        for of_seed in counts.values()
    ])  # fmt: skip
    of_sites = np.mean([intervals.site_means(c)[:, 0] for c in counts.values()], axis=0)
    any_counts = next(iter(counts.values()))
    names = [any_counts.sites[i] for i in np.unique(any_counts.site)]
    worst = int(np.nanargmin(of_sites))
    entry: dict[str, Any] = {
        "mean": _named(each.mean(0)),
        "seeds": {str(seed): _named(scores) for seed, scores in zip(counts, each, strict=True)},
        "pooled": _named(pooled.mean(0)),
        "worst_site": {"site": names[worst], "dice": float(of_sites[worst])},
        "per_site": dict(zip(names, map(float, of_sites), strict=True)),
    }
    shared = sorted(set(counts) & set(baseline))
    if row.name != BASELINE and shared:
        ours, theirs = [counts[s] for s in shared], [baseline[s] for s in shared]
        same = len(ours[0].site) == len(theirs[0].site)
        if same:
            entry["difference"] = {
                kind: _interval(intervals.difference(
                    ours, theirs, np.random.default_rng(0), resamples=resamples,
                    relative=kind == "relative"))
                for kind in ("points", "relative")
            }  # fmt: skip
    return entry


def _privacy(row: Row) -> dict[str, Any]:
    """Epsilons of the worst seed at tile and patient level, by adversary and site; and of all."""
    folders = [folder for of_seed in row.folders.values() for folder in of_seed]
    stated = [json.loads((folder / "privacy.json").read_text("utf-8")) for folder in folders]
    summaries = [_summary(folder) for folder in folders]
    first = stated[0]
    is_protected = first["placement"] not in ("none", "update_unclipped")
    result: dict[str, Any] = {
        "placement": first["placement"],
        "unit": first["unit"] if "unit" in first else summaries[0]["privacy"]["unit"],
        "protected": first["protected"],
        "delta": first["target_delta"],
        "tile_epsilon": _worst([s["privacy"]["tile_epsilon"] for s in summaries], is_protected),
        "patient_epsilon": _worst(
            [s["privacy"]["patient_epsilon"] for s in summaries], is_protected
        ),
        "patient_epsilon_reason": summaries[0]["privacy"]["patient_epsilon_reason"],
        "by_adversary": summaries[0]["privacy"]["epsilon_by_adversary"],
        "per_site": summaries[0]["privacy"]["epsilon"]["per_client"],
    }
    if is_protected:
        composed = 0.0
        for site, entry in first["clients"].items():
            rounds = sum(s["clients"].get(site, entry)["rounds"] for s in stated)
            mechanism = mechanism_from_descriptor(entry["mechanism"])
            composed = max(composed, mechanism.epsilon(rounds, first["target_delta"]))
        result["all_seeds_epsilon"] = composed
    return result


def _worst(found: Sequence[Mapping[str, Any] | None], is_protected: bool) -> float | None:
    if not is_protected:
        return math.inf
    if any(one is None for one in found):
        return None
    return max(decode(one["max"]) for one in found if one is not None)


def _named(values: np.ndarray) -> dict[str, float | None]:
    return {
        name: None if np.isnan(value) else float(value)
        for name, value in zip(_METRICS, values, strict=True)
    }


def _interval(interval: intervals.Interval) -> dict[str, Any]:
    return {part: _named(getattr(interval, part)) for part in interval._fields}


def markdown(report: Mapping[str, Any]) -> str:
    """The tables of a report, as in `table.md`."""
    parts = []
    for split, title in _TITLES.items():
        if split in report["splits"]:
            parts += [f"### {title}", _scores_table(report, split)]
    parts += ["### Epsilon", _epsilon_table(report["rows"]), _notes(report)]
    return "\n\n".join(parts) + "\n"


def _scores_table(report: Mapping[str, Any], split: str) -> str:
    entries = report["splits"][split]["rows"]
    header = [
        "row", "seeds", "Dice (pooled)", f"points of {BASELINE}'s (95 %)", "relative",
        "Jaccard (pooled)", "points (95 %)", "Accuracy (pooled)", "points (95 %)", "worst site",
    ]  # fmt: skip
    body = []
    for name, entry in entries.items():
        change = entry.get("difference")
        cells = [name, str(len(entry["seeds"]))]
        for metric in _METRICS:
            mean, pooled = entry["mean"][metric], entry["pooled"][metric]
            cells.append(f"{_score(mean)} ({_score(pooled)})")
            cells.append(_points(change["points"], metric) if change else "")
            if metric == "dice":
                relative = change["relative"]["mean"][metric] if change else None
                cells.append("" if relative is None else f"{100 * relative:+.1f} %")
        cells.append(f"{entry['worst_site']['dice']:.3f} ({entry['worst_site']['site']})")
        body.append(cells)
    for name, scores in report["splits"][split]["trivial"].items():
        cells = [name.replace("_", " "), ""]
        for metric in _METRICS:
            cells += [f"{_score(scores[metric])} ({_score(scores['pooled'][metric])})", ""]
            cells += [""] if metric == "dice" else []
        body.append([*cells, ""])
    return _markdown(header, body)


def _epsilon_table(rows: Mapping[str, Any]) -> str:
    header = [
        "row", "protects a", "delta", "tile", "patient", "against each adversary (worst site)",
        "if all seeds are released",
    ]  # fmt: skip
    body = []
    for name, row in rows.items():
        adversaries = "; ".join(
            f"{adversary}: {epsilon_text(decode(epsilon))}"
            for adversary, epsilon in row["by_adversary"].items()
        )
        together = row.get("all_seeds_epsilon")
        body.append(
            [
                name,
                row["protected"],
                f"{row['delta']:g}",
                _told(row["tile_epsilon"]),
                _told(row["patient_epsilon"]),
                adversaries,
                "infinite" if together is None else f"{epsilon_text(together)}",
            ]
        )
    return _markdown(header, body)


def _told(epsilon: float | str | None) -> str:
    """Of a report just made, or read back from JSON, where infinity is a word."""
    return "none valid" if epsilon is None else epsilon_text(decode(epsilon))


def _notes(report: Mapping[str, Any]) -> str:
    lines = [
        "Mean within a site over its images, then over sites; in brackets all pixels pooled. "
        "Differences are in points (hundredths), with a bootstrap over seeds, sites and patients "
        "(images where patients are unknown). Integer seeds make a run repeatable and not private: "
        "the epsilons are those of the same settings with secret randomness."
    ]
    lines += [f"Not finished: {count} runs of {name}." for name, count in report["missing"].items()]
    return "\n\n".join(lines)


def _points(change: Mapping[str, Any], metric: str) -> str:
    mean, low, high = (change[part][metric] for part in ("mean", "low", "high"))
    if mean is None:
        return ""
    return f"{100 * mean:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *body)]
    return "\n".join(lines)
