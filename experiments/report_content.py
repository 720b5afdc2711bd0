"""What `experiments.report` says: found in workdirs, put in order, put into words."""

import io
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import feddp_table_report
from fedjax_dp.privacy.statement import decode
from fedjax_dp.reporting import page
from fedjax_dp.reporting.contours import DPI, INK
from fedjax_dp.reporting.log import read_lines
from fedjax_dp.reporting.officer import statement_page
from fedjax_dp.reporting.summary import epsilon_text
from fedjax_dp.results import comparison_row, finished

_MAX_SHOWN = 6
"""Runs whose overlays and statements are in the page; a table may have thirty."""


class Content(NamedTuple):
    """What the folders hold.

    Attributes:
        runs: name -> workdir of each finished run; of a table the first seed of each row.
        table: `table.json` of the first folder that is one; None where there is none.
        attacks: folder -> `inversion.json`.
    """

    runs: dict[str, pathlib.Path]
    table: dict[str, Any] | None
    attacks: dict[pathlib.Path, dict[str, Any]]


def read(folders: Sequence[pathlib.Path]) -> Content:
    """Looks into every folder.

    Raises:
        ValueError: one holds nothing that can be reported, or two runs have one name.
    """
    runs: dict[str, pathlib.Path] = {}
    table, attacks = None, {}
    for folder in folders:
        if (folder / "inversion.json").exists():
            attacks[folder] = json.loads((folder / "inversion.json").read_text("utf-8"))
            continue
        if (folder / "table.json").exists():
            table = table or json.loads((folder / "table.json").read_text("utf-8"))
            found = {
                name: sorted(folder.glob(f"{name}*/seed-*"))[0]
                for name in table["rows"]
                if list(folder.glob(f"{name}*/seed-*"))
            }
        elif finished(folder) is not None:
            found = {folder.name: folder}
        else:
            raise ValueError(
                f"Expected a finished run, a table or an inversion in {folder}, got none. Let its "
                "experiment end, or leave it out of --workdirs."
            )
        if both := sorted(set(found) & set(runs)):
            raise ValueError(f"Expected runs of different names, got {', '.join(both)} twice.")
        runs |= found
    return Content(runs, table, attacks)


def verdict(content: Content) -> str:
    """One or two sentences: what protection cost, and what the attacker's best guess fell to."""
    parts = [_cost(content), *map(_attack_sentence, content.attacks.values())]
    said = " ".join(part for part in parts if part)
    return said or "Nothing here compares a protected run with an unprotected one."


def _cost(content: Content) -> str:
    if content.table is not None:
        rows, scores = (
            content.table["rows"],
            content.table["splits"].get("test", {}).get("rows", {}),
        )
        for name, row in rows.items():
            epsilon = row["tile_epsilon"]
            change = scores.get(name, {}).get("difference")
            if row["placement"] in ("none", "update_unclipped") or change is None:
                continue
            points = change["points"]
            dice, low, high = (100 * points[p]["dice"] for p in ("mean", "low", "high"))
            protected = (
                ""
                if epsilon is None
                else f" of at most {epsilon_text(decode(epsilon))} for one tile"
            )
            return (
                f"With an epsilon{protected}, {name} scored {abs(dice):.1f} Dice points "
                f"{'less' if dice < 0 else 'more'} than FedAvg without privacy on test patients "
                f"(95 %: {low:+.1f} to {high:+.1f})."
            )
    summaries = {name: _summary(folder) for name, folder in content.runs.items()}
    open_runs = [n for n, s in summaries.items() if s["privacy"]["placement"] == "none"]
    for name, summary in summaries.items():
        if not open_runs or summary["privacy"]["placement"] in ("none", "update_unclipped"):
            continue
        ours, theirs = summary["test"], summaries[open_runs[0]]["test"]
        if not ours or not theirs or None in (ours["dice"], theirs["dice"]):
            continue
        change = 100 * (ours["dice"] - theirs["dice"])
        epsilon = decode(summary["privacy"]["epsilon"]["max"])
        return (
            f"With an epsilon of at most {epsilon_text(epsilon)} for a "
            f"{summary['privacy']['protected']}, {name} scored {abs(change):.1f} Dice points "
            f"{'less' if change < 0 else 'more'} than {open_runs[0]} without privacy on test "
            "patients, in one run of each."
        )
    return ""


def _attack_sentence(report: Mapping[str, Any]) -> str:
    rows: list[dict[str, Any]] = next(iter(report["checkpoints"].values()), [])
    bare = next((row for row in rows if row["placement"] == "none"), None)
    noised = [row for row in rows if row["identification"]["epsilon"] is not None]
    # The most noise: the protection that is meant, not the sweep's weakest.
    kept = min(noised, key=lambda row: row["identification"]["epsilon"], default=None)
    if bare is None or kept is None:
        return ""
    ours, theirs = kept["identification"], bare["identification"]
    return (
        f"An attacker who saw one unprotected message named the right tile among "
        f"{report['options']['candidates']} in {100 * theirs['top1']:.0f} % of trials and rebuilt "
        f"it at {bare['scores']['psnr']:.1f} dB, where the mean tile has "
        f"{bare['priors']['mean_tile']['psnr']:.1f} dB; of a message with an epsilon of "
        f"{epsilon_text(ours['epsilon'])} he named {100 * ours['top1']:.0f} % (proven: at most "
        f"{100 * ours['bound']:.0f} %; chance {100 * ours['chance']:.1f} %) and rebuilt it at "
        f"{kept['scores']['psnr']:.1f} dB."
    )


def render(content: Content, *, title: str, with_pixels: bool, with_training_pixels: bool) -> str:
    """The page.

    Args:
        content: from `read`.
        title: of the page.
        with_pixels: whether pictures of tissue are shown at all.
        with_training_pixels: whether also those of training tiles.
    """
    body = []
    is_training = any(
        report["split"] == "train" and not report.get("is_public", False)
        for report in content.attacks.values()
    )
    if is_training and with_training_pixels:
        body.append(page.paragraph(
            "This page shows tissue of training patients, as an attacker rebuilt it and as it is. "
            "It is as confidential as their slides.", "banner"))  # fmt: skip
    body.append(page.paragraph(verdict(content), "verdict"))
    body += _attack_pictures(content, with_pixels, with_training_pixels)
    if with_pixels:
        body += _overlays(content)
    body += _tables(content)
    body += _curves(content)
    body += _attack_tables(content)
    body += _statements(content)
    body += _what_was_run(content)
    return page.page(title, body)


def _attack_pictures(content: Content, with_pixels: bool, with_training_pixels: bool) -> list[str]:
    parts: list[str] = []
    for folder, report in content.attacks.items():
        hidden = report["split"] == "train" and not report.get("is_public", False)
        if not with_pixels or (hidden and not with_training_pixels):
            continue
        parts.append(page.heading("What an attacker rebuilds"))
        for path in sorted(folder.glob("inversion*.png")):
            of = path.stem.removeprefix("inversion").strip("_") or next(iter(report["checkpoints"]))
            parts.append(page.picture(path.read_bytes(), (
                f"Network: {of}. First column: {report['split']} tiles of {report['site']}, "
                f"{report['tile_size']} pixels wide. Beside them: what an honest but curious "
                "server rebuilds of them from what is sent, unprotected on the left, then clipped, "
                "then with ever more noise.")))  # fmt: skip
    return parts


def _overlays(content: Content) -> list[str]:
    parts = [page.heading("What the networks see")] if content.runs else []
    for name, folder in list(content.runs.items())[:_MAX_SHOWN]:
        path = folder / "overlays.png"
        if path.exists():
            parts.append(page.picture(path.read_bytes(), (
                f"{name}: tiles of patients who were not trained on, of every site; the truth and "
                "the prediction, outlined.")))  # fmt: skip
    return parts


def _tables(content: Content) -> list[str]:
    parts = [page.heading("Scores")]
    if content.table is not None:
        text = feddp_table_report.markdown(content.table)
        parts += _from_markdown(text)
    else:
        rows = [comparison_row(name, _summary(folder)) for name, folder in content.runs.items()]
        header = ["run", "Dice", "Jaccard", "Accuracy", "epsilon, tile", "epsilon, patient"]
        body = [
            [row.name, *(_score(v) for v in (row.dice, row.jaccard, row.accuracy)),
             _epsilon(row.tile_epsilon), _epsilon(row.patient_epsilon)]
            for row in rows
        ]  # fmt: skip
        parts.append(page.table(header, body))
    return parts if content.runs or content.table else []


def _from_markdown(text: str) -> list[str]:
    """The headings, tables and paragraphs that our own tables are made of."""
    parts = []
    for block in text.strip().split("\n\n"):
        if block.startswith("### "):
            parts.append(page.heading(block.removeprefix("### "), 3))
        elif block.startswith("|"):
            lines = [
                [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()
            ]
            parts.append(page.table(lines[0], lines[2:]))
        else:
            parts.append(page.paragraph(block))
    return parts


def _curves(content: Content) -> list[str]:
    if not content.runs:
        return []
    figure = Figure(figsize=(11, 3.8), dpi=DPI, layout="constrained")
    utility, privacy = figure.subplots(1, 2)
    has_epsilon = False
    for name, folder in content.runs.items():
        lines = read_lines(folder / "metrics.jsonl")
        scored = [
            (line["round"], line["nonprivate"]["validation"]["dice"])
            for line in lines
            if line.get("nonprivate", {}).get("validation", {}).get("dice") is not None
        ]
        if scored:
            utility.plot(*zip(*scored, strict=True), marker=".", label=name)
        spent = [(line["round"], _largest(line.get("epsilon"))) for line in lines]
        known = [(r, e) for r, e in spent if e is not None and math.isfinite(e)]
        if known:
            privacy.plot(*zip(*known, strict=True), label=name)
            has_epsilon = True
    for axes, title in ((utility, "Dice of validation patients"), (privacy, "Epsilon spent")):
        axes.set_title(title, fontsize=10, color=INK)
        axes.set_xlabel("round")
        axes.spines[["top", "right"]].set_visible(False)
    utility.legend(fontsize=7, frameon=False)
    if has_epsilon:
        privacy.legend(fontsize=7, frameon=False)
    else:
        privacy.text(0.5, 0.5, "no run has a finite epsilon", ha="center", color=INK)
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    caption = "Utility and the largest epsilon of any site, round by round."
    return [page.heading("Over the rounds"), page.picture(stream.getvalue(), caption)]


def _largest(epsilon: Any) -> float | None:
    value = epsilon.get("max") if isinstance(epsilon, Mapping) else epsilon
    return None if value is None else decode(value)


def _attack_tables(content: Content) -> list[str]:
    parts = []
    for report in content.attacks.values():
        parts.append(page.heading("The attack in figures"))
        parts.append(page.paragraph(
            f"Threat: {report['threat']}. {report['split'].capitalize()} tiles of "
            f"{report['site']}, {report['tile_size']} pixels. The mean and a random tile of the "
            "site are guesses that know nothing of the message: a protected tile is rebuilt no "
            "better than they. Naming compares the message itself with that of each candidate, "
            "which needs no picture and is the stronger attack; the last column bounds every "
            "attacker."))  # fmt: skip
        header = ["what is sent", "epsilon of it", "PSNR, dB", "mean tile", "random tile", "SSIM",
                  "mean tile", "picture names it", "message names it", "interval, 95 %",
                  "at most"]  # fmt: skip
        for name, rows in report["checkpoints"].items():
            body = []
            for row in rows:
                naming, priors = row["identification"], row["priors"]
                low, high = naming["interval"]
                body.append([
                    row["setting"], _epsilon(naming["epsilon"], "none"),
                    f"{row['scores']['psnr']:.1f}", f"{priors['mean_tile']['psnr']:.1f}",
                    f"{priors['random_tile']['psnr']:.1f}", f"{row['scores']['ssim']:.2f}",
                    f"{priors['mean_tile']['ssim']:.2f}",
                    f"{100 * row['identified_by_resemblance']['top1']:.0f} %",
                    f"{100 * naming['top1']:.0f} %", f"{100 * low:.0f} to {100 * high:.0f} %",
                    f"{100 * naming['bound']:.0f} %",
                ])  # fmt: skip
            parts += [page.heading(f"Network: {name}", 3), page.table(header, body)]
    return parts


def _statements(content: Content) -> list[str]:
    parts = [page.heading("What is promised, and what is not")] if content.runs else []
    shown = 0
    for name, folder in content.runs.items():
        stated = json.loads((folder / "privacy.json").read_text("utf-8"))
        text = statement_page(stated)
        promise = text.split("\n\n")[1].replace("**", "").replace("\n", " ")
        if shown < _MAX_SHOWN:
            parts += [page.paragraph(f"{name}: {promise}"),
                      page.folded(f"The whole statement of {name}", text)]  # fmt: skip
            shown += 1
    return parts


def _what_was_run(content: Content) -> list[str]:
    if not content.runs:
        return []
    header = ["run", "experiment", "rounds", "placement", "unit", "tiles/s", "s a round",
              "compiled in, s"]  # fmt: skip
    body = []
    for name, folder in content.runs.items():
        summary = _summary(folder)
        speed = summary["throughput"]
        body.append([
            name, summary["experiment"], str(summary["rounds"]), summary["privacy"]["placement"],
            summary["privacy"]["unit"], f"{speed['tiles_per_second']:.1f}",
            f"{speed['seconds_per_round']:.2f}", f"{speed['compile_seconds']:.1f}",
        ])  # fmt: skip
    versions = _summary(next(iter(content.runs.values())))["versions"]
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [page.heading("What was run"), page.table(header, body), page.paragraph(said)]


def _summary(folder: pathlib.Path) -> dict[str, Any]:
    found = finished(folder)
    if found is None:
        raise ValueError(f"Expected a finished run in {folder}.")
    return found


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _epsilon(value: float | None, none: str = "none valid") -> str:
    return none if value is None else epsilon_text(value)
