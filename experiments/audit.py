"""What an attacker measures against what the accountant states, and every rule broken on purpose.

    python -m experiments.audit --workdir=runs/audit

Runs each placement with and without a canary through the real client update (`audit_cases.py`,
`audit_worlds.py`) and bounds epsilon from below (`privacy/audit.py`). The bound must not exceed the
stated epsilon; and where nothing is sampled it must reach 0.8 of it, or the audit proves nothing.
Then every mutant of `tests/mutants.py`, beside the unmutated pass of the same tests. Writes
`audit.json` and `audit.md`; exits with 1 where a bound fails or a mutant survives. Ten minutes on
two cores.
"""

import concurrent.futures
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from absl import app, flags

from experiments import audit_mutants
from experiments.audit_report import tables, with_tables
from tests import mutants

# Other experiments have flags of these names too; one process of tests imports several.
_WORKDIR = flags.DEFINE_string(
    "workdir", "runs/audit", "Folder of the report.", allow_override=True
)
_TRIALS = flags.DEFINE_integer("trials", 20_000, "Of each world; fewer lack the power.")
_CASES = flags.DEFINE_list("cases", [], "Cases of the audit; empty = all.")
_SEED = flags.DEFINE_integer(
    "seed", 0, "Of the audit's own randomness, which protects nobody.", allow_override=True
)
_MUTANTS = flags.DEFINE_boolean("mutants", True, "Whether to run the mutants too.")
_WORKERS = flags.DEFINE_integer("workers", 2, "Processes of mutants at a time.")
_DOCS = flags.DEFINE_string("docs", "", "File that gets the tables between its audit markers.")

LEVEL = 0.05
"""Probability that any bound of one report is too high by chance."""

POWER_FLOOR = 0.8


def main(argv: list[str]) -> int:
    """Runs the audit; returns the exit code."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
    mutants.apply_from_environment()
    # The library, and jax with it, is loaded after the rule is broken.
    from fedjax_dp.reporting.log import write_json, write_text
    from fedjax_dp.reporting.progress import busy

    start, folder = time.perf_counter(), pathlib.Path(_WORKDIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    docs = pathlib.Path(_DOCS.value) if _DOCS.value else None
    if docs is not None:
        with_tables(docs.read_text("utf-8"), "")  # a file without markers is told now, not later
    names = list(mutants.MUTANTS) if _MUTANTS.value else []
    with concurrent.futures.ThreadPoolExecutor(_WORKERS.value) as pool:
        nodes = [n for name in names for n in audit_mutants.tests_of(mutants.MUTANTS[name])]
        baseline = pool.submit(audit_mutants.run_tests, nodes) if nodes else None
        found = audit(_CASES.value, _TRIALS.value, _SEED.value, folder / "calibration")
        caught: list[dict[str, Any]] = []
        if baseline is not None:
            with busy("The named tests, unmutated"):
                passed = baseline.result()
            if passed.broken or passed.trouble:
                print(f"Unmutated tests fail: {passed.broken or passed.trouble}", file=sys.stderr)
                return 1
            print(f"unmutated: {len(passed.passed)} tests pass")
            caught = run_mutants(pool, names, passed.passed, folder)
    seconds = time.perf_counter() - start
    text = tables(found, caught, LEVEL)
    report = {"level": LEVEL, "cases": found, "mutants": caught, "seconds": seconds}
    write_json(folder / "audit.json", report)
    write_text(folder / "audit.md", text)
    if docs is not None:
        write_text(docs, with_tables(docs.read_text("utf-8"), text))
    wrong = [
        f"{c['case']}: {c['verdict']}" for c in found if c["verdict"] not in ("holds", "grows")
    ]
    wrong += [f"mutant {m['mutant']}: {m['survived']}" for m in caught if m["survived"]]
    for line in wrong:
        print(f"FAILED {line}", file=sys.stderr)
    print(f"{len(found)} cases, {len(caught)} mutants, {seconds:.0f} s: {folder / 'audit.md'}")
    return 1 if wrong else 0


def audit(
    names: Iterable[str], trials: int, seed: int, cache_dir: str | os.PathLike[str] | None = None
) -> list[dict[str, Any]]:
    """Audits the named cases (all where none is named), one after the other.

    Args:
        names: of cases.
        trials: of each world.
        seed: of the trials' secrets.
        cache_dir: where calibrations are kept.

    Returns:
        What was found of each case; "verdict" is "holds", "grows" (no guarantee, and the bound
        grows with the canary), "broken" (the bound exceeds the theory) or "no power".

    Raises:
        ValueError: a case that is not there.
    """
    from experiments.audit_cases import DELTA, make_cases
    from experiments.audit_worlds import observe
    from fedjax_dp.privacy import audit as bounds
    from fedjax_dp.reporting.progress import busy

    with busy("Calibrating"):
        cases = {case.name: case for case in make_cases(cache_dir)}
    level = LEVEL / len(cases)  # Bonferroni
    if unknown := sorted(set(names) - set(cases)):
        raise ValueError(f"Expected --cases among {list(cases)}, got {unknown}.")
    found: list[dict[str, Any]] = []
    for name in list(names) or cases:
        case, seen = cases[name], {"in": [], "out": []}  # type: ignore[var-annotated]
        bound = bounds.any_law if case.is_sampled else bounds.gaussian
        # Before anything is run.
        at = bounds.threshold(case.law, trials, DELTA, level, bound)
        with busy(f"{name}: {trials} trials of each world"):
            for world, statistics in observe(case, trials, seed):
                seen[world].append(statistics)
        inside, outside = (np.concatenate(seen[world]) for world in ("in", "out"))
        epsilon, rates = bounds.epsilon_bound(
            inside, outside, at, delta=DELTA, level=level, bound=bound
        )
        result = {
            "case": name,
            "placement": case.mechanism.placement,
            "noise": case.mechanism.noise,
            "adversary": case.guarantee.adversary,
            "unit": case.guarantee.unit,
            "sampling_prob": case.mechanism.sampling_prob,
            "noise_multiplier": case.mechanism.noise_multiplier,
            "releases": case.releases,
            "canary_over_clip": case.size,
            "theory": case.theory,
            "floor": 0.0 if case.is_sampled else POWER_FLOOR * case.theory,
            "bound": epsilon,
            "bound_for": "any law" if case.is_sampled else "normal laws",
            "threshold": at,
            "true_positive_at_least": rates.true_positive,
            "false_positive_at_most": rates.false_positive,
            "trials": len(inside),
        }
        before = found[-1]["bound"] if found and math.isinf(found[-1]["theory"]) else 0.0
        result["verdict"] = verdict(result, before)
        found.append(result)
        print(f"{name}: theory {case.theory:.2f}, bound {epsilon:.2f}: {result['verdict']}")
    return found


def verdict(result: Mapping[str, Any], before: float) -> str:
    """What a bound means beside its theory; `before` is that of a smaller canary."""
    if math.isinf(result["theory"]):
        return "grows" if result["bound"] > before else "does not grow"
    if result["bound"] > result["theory"]:
        return "broken"
    is_enough = result["bound"] > 0 and result["bound"] >= result["floor"]
    return "holds" if is_enough else "no power"


def run_mutants(
    pool: concurrent.futures.Executor,
    names: Iterable[str],
    baseline: Mapping[str, bool],
    folder: pathlib.Path,
) -> list[dict[str, Any]]:
    """Every mutant through its tests and its cases of the audit; "survived" says why, or ""."""
    from fedjax_dp.reporting.progress import busy

    def one(name: str) -> dict[str, Any]:
        mutant = mutants.MUTANTS[name]
        result: dict[str, Any] = {
            "mutant": name, "description": mutant.description, "caught_by": mutant.caught_by,
            "said": {}, "survived": "",
        }  # fmt: skip
        if nodes := audit_mutants.tests_of(mutant):
            seen = audit_mutants.run_tests(nodes, name)
            result["said"] |= {n: m.splitlines()[0] for n, m in seen.broken.items()}
            result["survived"] = audit_mutants.judge(name, baseline, seen)
        if cases := audit_mutants.cases_of(mutant):
            bounds = mutated_audit(name, cases, folder)
            result["said"] |= {f"{audit_mutants.AUDIT}{c}": text for c, text in bounds.items()}
            missed = [c for c in cases if not bounds.get(c, "").startswith("broken")]
            if missed and not result["survived"]:
                result["survived"] = f"the audit of {missed} does not see it: {bounds}"
        return result

    waiting = {pool.submit(one, name): name for name in names}
    finished: dict[str, dict[str, Any]] = {}
    while waiting:
        left = ", ".join(list(waiting.values())[: _WORKERS.value])
        with busy(f"{len(finished)} mutants done; now {left}"):
            done, _ = concurrent.futures.wait(
                waiting, return_when=concurrent.futures.FIRST_COMPLETED
            )
        for future in done:
            name, result = waiting.pop(future), future.result()
            finished[name] = result
            survived = result["survived"]
            print(f"mutant {name}: {f'SURVIVED, {survived}' if survived else 'caught'}")
    return [finished[name] for name in names]


def mutated_audit(name: str, cases: Iterable[str], folder: pathlib.Path) -> dict[str, str]:
    """Case -> verdict and bound of the audit of the mutated library, in a process of its own."""
    inside = folder / "mutants" / name
    inside.mkdir(parents=True, exist_ok=True)
    report = inside / "audit.json"
    report.unlink(missing_ok=True)
    done = audit_mutants.run_process(
        ["-m", "experiments.audit", f"--workdir={inside}", f"--cases={','.join(cases)}",
         f"--trials={_TRIALS.value}", f"--seed={_SEED.value}", "--nomutants"],
        name,
    )  # fmt: skip
    if not report.exists():
        return {"error": done.stdout[-500:]}
    return {
        case["case"]: f"{case['verdict']}: bound {case['bound']:.2f} of {case['theory']:.2f}"
        for case in json.loads(report.read_text("utf-8"))["cases"]
    }


if __name__ == "__main__":
    app.run(main)
