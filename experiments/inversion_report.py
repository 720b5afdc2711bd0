"""What `experiments.inversion` found, as JSON, as tables and as one picture a checkpoint."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedjax_dp.reporting.attack_panel import save_panel
from fedjax_dp.reporting.log import write_json, write_text
from fedjax_dp.reporting.summary import epsilon_text

_HEADER = (
    "what is sent", "noise", "epsilon of it", "PSNR", "mean tile's", "random tile's", "SSIM",
    "mean tile's", "looks like the target (95 %)", "named from the message (95 %)", "at most",
    "s a message",
)  # fmt: skip


def write(
    report: Mapping[str, Any], pictures: Mapping[str, np.ndarray], folder: pathlib.Path
) -> str:
    """Writes `inversion.json`, `inversion.md` and the pictures; returns the tables."""
    write_json(folder / "inversion.json", dict(report))
    parts = []
    for name, rows in report["checkpoints"].items():
        file = "inversion.png" if len(report["checkpoints"]) == 1 else f"inversion_{name}.png"
        columns = {_title(row): pictures[f"{name}/{row['setting']}"] for row in rows}
        save_panel(pictures["original"], columns, folder / file)
        parts += [f"## {name}", table(rows), f"![{name}]({file})"]
    head = (
        f"# Gradient inversion, {report['site']}, {report['split']} tiles of "
        f"{report['tile_size']} px\n\nThreat: {report['threat']}. Chance of naming one of "
        f"{report['options']['candidates']} candidates: "
        f"{1 / report['options']['candidates']:.3f}."
    )
    text = "\n\n".join([head, *parts]) + "\n"
    write_text(folder / "inversion.md", text)
    return text


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a line a setting."""
    lines = ["| " + " | ".join(_HEADER) + " |"]
    lines.append("| " + " | ".join(["---"] + ["---:"] * (len(_HEADER) - 1)) + " |")
    for row in rows:
        naming, priors = row["identification"], row["priors"]
        cells = [
            row["setting"],
            f"{row['noise_multiplier']:g}",
            "none" if naming["epsilon"] is None else epsilon_text(naming["epsilon"]),
            f"{row['scores']['psnr']:.1f}",
            f"{priors['mean_tile']['psnr']:.1f}",
            f"{priors['random_tile']['psnr']:.1f}",
            f"{row['scores']['ssim']:.2f}",
            f"{priors['mean_tile']['ssim']:.2f}",
            _rate(row["identified_by_resemblance"]),
            _rate(naming),
            f"{naming['bound']:.2f}",
            f"{row['seconds_per_message']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rate(success: Mapping[str, Any]) -> str:
    low, high = success["interval"]
    return f"{success['top1']:.2f} ({low:.2f}-{high:.2f}, {success['trials']})"


def _title(row: Mapping[str, Any]) -> str:
    epsilon = row["identification"]["epsilon"]
    protected = "" if epsilon is None else f", epsilon {epsilon_text(epsilon)}"
    return f"{row['setting']}{protected}\nPSNR {row['scores']['psnr']:.1f} dB"
