"""What may leave the building of a finished run: its parameters and a model card.

    python -m experiments.bundle --workdir=runs/feddp --output=runs/feddp_bundle

Writes `parameters.npz` (the averaged parameters, one array a name), `MODEL_CARD.md` and
`privacy.json`. Whether they may leave is for people to decide: a run without privacy, or of an
integer seed, is refused unless `--allow_not_private` says that its data are public.
"""

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from absl import app, flags

from fedjax_dp.privacy.statement import decode
from fedjax_dp.reporting.log import write_text
from fedjax_dp.reporting.summary import epsilon_text
from fedjax_dp.results import finished

_WORKDIR = flags.DEFINE_string("workdir", "", "Of the finished run; required.", allow_override=True)
_OUTPUT = flags.DEFINE_string("output", "", "Folder to write; required.", allow_override=True)
_NOT_PRIVATE = flags.DEFINE_boolean(
    "allow_not_private",
    False,
    "Whether to bundle a run that protects nobody; its card says so.",
    allow_override=True,
)


def main(argv: list[str]) -> int:
    """Writes the bundle; returns the exit code."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
    if not _WORKDIR.value or not _OUTPUT.value:
        raise app.UsageError("Name run and folder: --workdir=runs/feddp --output=bundle.")
    folder, output = pathlib.Path(_WORKDIR.value), pathlib.Path(_OUTPUT.value)
    try:
        write(folder, output, allow_not_private=_NOT_PRIVATE.value)
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"{output} holds parameters.npz, MODEL_CARD.md and privacy.json.")
    return 0


def write(folder: pathlib.Path, output: pathlib.Path, *, allow_not_private: bool = False) -> None:
    """Writes the bundle of the run in `folder`.

    Raises:
        ValueError: no finished run, one that protects nobody, or an output that is not empty.
    """
    import jax
    import numpy as np

    from fedjax_dp.inference.model import load_run

    summary = finished(folder)
    if summary is None:
        raise ValueError(f"Expected a finished run in {folder}: let its experiment end first.")
    if not summary["privacy"]["is_private"] and not allow_not_private:
        raise ValueError(
            f"Expected a run that protects its patients, got {folder}, whose placement is "
            f"{summary['privacy']['placement']} and whose seed is {summary['seed']}: parameters "
            "hold what they were trained on. Train with privacy and --config.seed=-1, or say "
            "--allow_not_private where the data are public."
        )
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"Expected --output to be new or empty, got {output}.")
    run = load_run(folder)
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(run.params)
    }
    stated = (folder / "privacy.json").read_text("utf-8")
    output.mkdir(parents=True, exist_ok=True)
    np.savez(output / "parameters.npz", **flat)  # type: ignore[arg-type]
    write_text(output / "privacy.json", stated)
    write_text(
        output / "MODEL_CARD.md",
        card(
            summary,
            json.loads(stated),
            vars(run.config.model),
            sum(leaf.size for leaf in flat.values()),
            run.digest,
        ),
    )


def card(
    summary: Mapping[str, Any],
    stated: Mapping[str, Any],
    model: Mapping[str, Any],
    parameters: int,
    digest: str,
) -> str:
    """The card: what it is, what it was trained on, what is promised, what it reaches, limits."""
    privacy, about = summary["privacy"], summary["model"]
    mpp = "not stated" if about["mpp"] is None else f"{about['mpp']:g} micrometres a pixel"
    lines = [
        "# Model card",
        "",
        f"U-Net, {parameters:,} parameters (base {model['base_channels']}, depth {model['depth']}, "
        f"{model['num_groups']} groups); BLAKE2b of the parameters {digest}.",
        "",
        f"- **Input**: RGB tiles of H&E, values divided by 255, {mpp}.",
        f"- **Output**: scores of {', '.join(about['class_names'])}.",
        f"- **Training**: {summary['rounds']} rounds at {len(stated['clients'])} sites: "
        f"{', '.join(stated['clients'])}.",
        "",
        "## What is promised",
        "",
    ]
    if not privacy["is_private"]:
        lines += [
            "**Nothing.** This run protects nobody: its placement is "
            f"{privacy['placement']}, its randomness {stated['randomness']}.",
            "",
        ]
    lines += [
        f"- Unit protected: one {privacy['protected']}, relation {privacy['relation']}, placement "
        f"{privacy['placement']}; delta {privacy['target_delta']:g}.",
        f"- Epsilon, the worst site's: {epsilon_text(decode(privacy['epsilon']['max']))}.",
    ]
    for unit in ("tile", "patient"):
        known = privacy[f"{unit}_epsilon"]
        said = "no valid figure" if known is None else epsilon_text(decode(known["max"]))
        reason = privacy[f"{unit}_epsilon_reason"]
        lines.append(f"- For one {unit}: {said}{f' ({reason})' if known is None else ''}.")
    lines += [
        f"- Against {adversary}: {epsilon_text(decode(epsilon))}."
        for adversary, epsilon in privacy["epsilon_by_adversary"].items()
    ]
    lines += [
        "",
        "`privacy.json` has every figure and what it follows from; `python -m "
        "experiments.check_statement --statement=privacy.json` computes them anew.",
        "",
        "## What it reaches",
        "",
        "| patients of | site | Dice | Jaccard | accuracy | images |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for split in ("test", "external"):
        for site, scores in (summary[split] or {"per_site": {}})["per_site"].items():
            cells = [_score(scores[name]) for name in ("dice", "jaccard", "accuracy")]
            lines.append(f"| {split} | {site} | {' | '.join(cells)} | {scores['num_images']} |")
    lines += [
        "",
        "## Limits",
        "",
        "- For research; no medical device, and nobody has validated it for diagnosis.",
        "- Scores are of the sites above; another scanner, stain, organ or magnification can "
        "be far worse.",
        "- Test and external patients were used to measure and have no guarantee.",
    ]
    lines += [f"- {line}" for line in (*stated["not_accounted"], *stated["weak_points"])]
    return "\n".join(lines) + "\n"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    app.run(main)
