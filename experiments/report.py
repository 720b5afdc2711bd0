"""One page about finished runs, for people who decide: a file that needs no network.

    python -m experiments.report --workdirs=runs/table/real,runs/inversion --output=report.html

Takes workdirs of runs, of `experiments.feddp_table` and of `experiments.inversion`, as many as
there are. First a sentence: what protection cost, and what an attacker's best guess fell to; then
the pictures, then everything else. Pictures show test patients or synthetic tissue;
`--show_training_pixels` also those of an attack on training tiles, under a banner; `--no_pixels`
leaves out every picture of tissue, for sharing.
"""

import pathlib
import sys

from absl import app, flags

from fedjax_dp.config import names

_WORKDIRS = flags.DEFINE_string(
    "workdirs", "", "Comma-separated folders; required.", allow_override=True
)
_OUTPUT = flags.DEFINE_string("output", "report.html", "The page to write.", allow_override=True)
_TITLE = flags.DEFINE_string(
    "title", "Federated segmentation under differential privacy", "Of it.", allow_override=True
)
_TRAINING = flags.DEFINE_boolean(
    "show_training_pixels",
    False,
    "Whether to show what was rebuilt of training tiles.",
    allow_override=True,
)
_NO_PIXELS = flags.DEFINE_boolean(
    "no_pixels", False, "Whether to leave out pictures of tissue.", allow_override=True
)


def main(argv: list[str]) -> int:
    """Writes the page; returns the exit code."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
    if not names(_WORKDIRS.value):
        raise app.UsageError("Name the folders: --workdirs=runs/table,runs/inversion.")
    if _TRAINING.value and _NO_PIXELS.value:
        raise app.UsageError("Expected --show_training_pixels or --no_pixels, got both.")
    from experiments import report_content
    from fedjax_dp.reporting.log import write_text

    try:
        content = report_content.read([pathlib.Path(name) for name in names(_WORKDIRS.value)])
        text = report_content.render(
            content,
            title=_TITLE.value,
            with_pixels=not _NO_PIXELS.value,
            with_training_pixels=_TRAINING.value,
        )
        write_text(_OUTPUT.value, text)
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"{report_content.verdict(content)}\n\nThe page is {_OUTPUT.value}.")
    return 0


if __name__ == "__main__":
    app.run(main)
