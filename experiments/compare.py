"""Finished runs side by side: what each reached, and what its privacy cost.

    python -m experiments.compare --workdirs=runs/fedavg,runs/feddp --output=comparison.md

The first workdir is the baseline that the others are held against.
"""

import json
import math
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from absl import app, flags

from fedjax_dp.config import names
from fedjax_dp.reporting.log import write_text
from fedjax_dp.reporting.summary import comparison_table, epsilon_text
from fedjax_dp.results import comparison_row, finished

# Other experiments have flags of these names too; one process of tests imports several.
_WORKDIRS = flags.DEFINE_string(
    "workdirs",
    "",
    "Comma-separated, required; the first is the baseline.",
    allow_override=True,
)
_OUTPUT = flags.DEFINE_string(
    "output", "", "Markdown file to write; empty = the terminal.", allow_override=True
)


def main(argv: list[str]) -> int:
    """Reads the summaries and writes the tables; returns the exit code."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
    if not names(_WORKDIRS.value):
        raise app.UsageError("Name the runs: --workdirs=runs/fedavg,runs/feddp.")
    summaries, statements = {}, {}
    for folder in map(pathlib.Path, names(_WORKDIRS.value)):
        summary = finished(folder)
        if summary is None:
            print(
                f"{folder} holds no finished run: run its experiment to the end.", file=sys.stderr
            )
            return 1
        summaries[folder.name] = summary
        statements[folder.name] = json.loads((folder / "privacy.json").read_text("utf-8"))
    text = compare(summaries, statements)
    if _OUTPUT.value:
        write_text(_OUTPUT.value, text)
    else:
        print(text)
    return 0


def compare(
    summaries: Mapping[str, Mapping[str, Any]], statements: Mapping[str, Mapping[str, Any]]
) -> str:
    """Markdown tables of runs: name -> summary and name -> statement, the baseline first."""
    baseline = next(iter(summaries))
    parts = []
    for split, title in (
        ("test", "Test patients of the training sites"),
        ("external", "External hospitals"),
    ):
        if all(summary[split] for summary in summaries.values()):
            rows = [comparison_row(name, summary, split) for name, summary in summaries.items()]
            parts += [f"### {title}", comparison_table(rows, baseline=baseline)]
            parts += [_pooled(summaries, split)]
    parts += ["### Dice of each site", _per_site(summaries)]
    parts += ["### Epsilon of each site", _epsilons(statements)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _pooled(summaries: Mapping[str, Mapping[str, Any]], split: str) -> str:
    body = []
    for name, summary in summaries.items():
        scores = summary[split]
        worst = scores["worst_site"]
        body.append(
            [name]
            + [f"{scores['pooled'][metric]:.3f}" for metric in ("dice", "jaccard", "accuracy")]
            + [f"{worst['dice']:.3f} ({worst['site']})", f"{scores['dhunet']['dice']:.3f}"]
        )
    trivial = next(iter(summaries.values()))[split]["trivial"]
    for which in ("all_background", "all_foreground"):
        pooled = trivial[which]["pooled"]
        body.append(
            [which.replace("_", " ")]
            + [f"{pooled[metric]:.3f}" for metric in ("dice", "jaccard", "accuracy")]
            + ["", f"{trivial[which]['dhunet']['dice'] or 0:.3f}"]
        )
    header = ["pooled", "Dice", "Jaccard", "Accuracy", "worst site, Dice", "Dice, DHUnet's rule"]
    return _markdown(header, body)


def _per_site(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    rows: dict[str, dict[str, str]] = {}
    for name, summary in summaries.items():
        for split in ("test", "external"):
            for site, scores in (summary[split] or {"per_site": {}})["per_site"].items():
                value = scores["dice"]
                rows.setdefault(site, {})[name] = "-" if value is None else f"{value:.3f}"
    return _markdown(
        ["site", *summaries],
        [[site, *(row.get(name, "-") for name in summaries)] for site, row in rows.items()],
    )


def _epsilons(statements: Mapping[str, Mapping[str, Any]]) -> str:
    body = []
    for name, stated in statements.items():
        rows: dict[tuple[str, str, str], list[str]] = {}
        for site, entry in stated["clients"].items():
            for row in entry["guarantees"]:
                epsilon = math.inf if row["epsilon"] == "infinity" else row["epsilon"]
                text = "no valid conversion" if row["reason"] else epsilon_text(epsilon)
                if stated["placement"] in ("none", "update_unclipped"):
                    text = "infinite"
                key = (row["unit"], row["relation"], row["adversary"])
                rows.setdefault(key, []).append(f"{site} {text}")
        body += [
            [name, unit, relation, adversary, f"{stated['target_delta']:g}", ", ".join(values)]
            for (unit, relation, adversary), values in rows.items()
        ]
    return _markdown(
        ["run", "protected", "relation", "against", "delta", "epsilon of each site"], body
    )


def _markdown(header: list[str], body: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *body)]
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
