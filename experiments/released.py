"""What all runs on the same data cost together, if everything of all of them is released.

    python -m experiments.released --register=runs/privacy_register.jsonl --delta=1e-5

Of each site one table of its runs and one of the units: tile, slide, patient and client. A run that
has not ended counts with all the rounds it planned, and so does one whose workdir was deleted.
--only=a,b adds up the named runs alone: honest only if nothing of the others was released, and
nothing that others showed has decided which these are.
"""

import math
import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

from fedjax_dp.config import names
from fedjax_dp.data.sources import SiteSource
from fedjax_dp.privacy import across_runs
from fedjax_dp.privacy.across_runs import Total
from fedjax_dp.privacy.register import Register, Run
from fedjax_dp.reporting.summary import epsilon_text

_REGISTER = flags.DEFINE_string(
    "register", "", "The file privacy_register.jsonl beside the workdirs; required."
)
_DELTA = flags.DEFINE_float("delta", 1e-5, "Delta of each total.")
_ONLY = flags.DEFINE_string("only", "", "Comma-separated names of runs; empty = all.")


def main(argv: list[str]) -> int:
    """Reads the register and prints the tables; returns the exit code."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
    if not _REGISTER.value:
        raise app.UsageError("Name the register: --register=runs/privacy_register.jsonl.")
    try:
        text = tables(_REGISTER.value, delta=_DELTA.value, only=names(_ONLY.value))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(text, end="")
    return 0


def tables(register: str | pathlib.Path, *, delta: float = 1e-5, only: Sequence[str] = ()) -> str:
    """Markdown tables of every site in a register.

    Args:
        register: the file.
        delta: of each total, in (0, 1).
        only: names of the runs to count; empty = all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or empty, a name is unknown, or delta is out of range.
    """
    runs = Register(register).runs()
    if not runs:
        raise ValueError(f"{register} knows no runs yet.")
    known = dict.fromkeys(run.name for run in runs)
    if unknown := [name for name in only if name not in known]:
        raise ValueError(f"Expected names among {', '.join(known)}; got also {', '.join(unknown)}.")
    if only:
        runs = tuple(run for run in runs if run.name in only)
    sources = {
        source.fingerprint: source  # the last name of a site that was renamed
        for run in runs
        for plan in run.plans.values()
        for source in plan.holding.sources
    }
    parts = [part for source in sorted(sources.values()) for part in _site(runs, source, delta)]
    assumed = "\n".join(f"- {line}" for line in across_runs.ASSUMPTIONS)
    return "\n\n".join([*parts, f"Assumed:\n\n{assumed}"]) + "\n"


def _site(runs: Sequence[Run], source: SiteSource, delta: float) -> list[str]:
    """Heading, tables and warnings of one site."""
    totals = across_runs.epsilon_if_all_released(runs, source.fingerprint, delta)
    parts = [f"### {source.site} (data {source.fingerprint[:8]})", _runs(runs, source)]
    header = ["protected", f"epsilon at delta {delta:g} if all are released", "against", "note"]
    parts.append(_markdown(header, [_row(total) for total in totals.values()]))
    seeds = totals["client"].not_private_seeds
    if seeds:
        parts.append(
            f"NOT PRIVATE to whoever knows their seeds: {', '.join(seeds)}. Their noise is counted "
            "as if it were secret."
        )
    if others := across_runs.other_data(runs, source):
        parts.append(
            f"Not counted: {', '.join(others)}, on other data of a site of this name. What these "
            "share with the data above loses more than is told here."
        )
    return parts


def _runs(runs: Sequence[Run], source: SiteSource) -> str:
    body = []
    for run in runs:
        plans = {c: p for c, p in run.plans.items() if source.fingerprint in p.fingerprints}
        if not plans:
            continue
        plan = max(plans.values(), key=lambda plan: plan.rounds)
        client = next(iter(plans)) if len(plans) == 1 else f"{len(plans)} clients"
        seed = "secret" if run.seed < 0 else str(run.seed)
        how = (plan.mechanism["placement"], plan.mechanism["unit"])
        rounds = f"{plan.rounds} {'charged' if run.has_ended else 'planned'}"
        body.append([run.name, run.run_id[:8], run.experiment, client, seed, *how, rounds])
    return _markdown(
        ["run", "id", "experiment", "client", "seed", "placement", "unit", "rounds"], body
    )


def _row(total: Total) -> list[str]:
    note = total.reason
    if total.unprotected and len(total.unprotected) < len(set(total.runs)):
        note += f". The others together: {epsilon_text(total.epsilon_of_others)}"
    elif not note and total.headline_epsilon != total.epsilon:
        note = (
            f"against {', '.join(total.headline_adversaries)}: "
            f"{epsilon_text(total.headline_epsilon)}"
        )
    epsilon = "none valid" if math.isinf(total.epsilon) else epsilon_text(total.epsilon)
    return [total.unit, epsilon, ", ".join(total.adversaries), note]


def _markdown(header: list[str], body: list[list[str]]) -> str:
    rows = (header, ["---"] * len(header), *body)
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows)


if __name__ == "__main__":
    app.run(main)
