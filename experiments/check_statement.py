"""Checks a privacy statement against itself: every figure is computed anew from the file alone.

    python -m experiments.check_statement --statement=runs/mine/privacy.json

Prints the epsilon of every row of every site, and what in the file does not follow from the rest of
it. Exits with 1 where anything does not. Needs neither the data nor the run.
"""

import json
import pathlib
import sys

from absl import app, flags

from fedjax_dp.privacy.statement import recompute
from fedjax_dp.privacy.statement_check import disagreements
from fedjax_dp.reporting.summary import epsilon_text

_STATEMENT = flags.DEFINE_string("statement", "", "The file privacy.json of a run; required.")


def main(argv: list[str]) -> int:
    """Checks the file; returns the exit code."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
    if not _STATEMENT.value:
        raise app.UsageError("Name the statement: --statement=runs/mine/privacy.json.")
    return check(_STATEMENT.value)


def check(path: str | pathlib.Path) -> int:
    """Prints what follows and what does not; 0 where all does, else 1."""
    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"Expected the privacy.json of a run, cannot read {path}: {error}", file=sys.stderr)
        return 1
    found = disagreements(value)
    if found:
        print(f"{path}: {len(found)} figures do not follow from the file:", file=sys.stderr)
        for line in found:
            print(f"  {line}", file=sys.stderr)
        return 1
    for client, rows in recompute(value).items():
        for entry in value["clients"][client]["guarantees"]:
            # A row without an event stands for no promise, not for a very weak one.
            text = epsilon_text(rows[entry["name"]]) if entry["event"] else "none valid"
            print(f"{client}: one {entry['unit']}, {entry['relation']}: epsilon {text}, against "
                  f"{entry['adversary']}")  # fmt: skip
    print(f"{path}: every figure follows, at delta {value['target_delta']:g}.")
    return 0


if __name__ == "__main__":
    app.run(main)
