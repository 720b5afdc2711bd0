"""The mutants of `tests/mutants.py`, each in a process of its own beside the unmutated pass."""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tests.mutants import MUTANTS, VARIABLE, Mutant

ROOT = pathlib.Path(__file__).resolve().parents[1]
AUDIT = "audit:"
TIMEOUT_SECONDS = 600

# An error of the mutant's own (a TypeError, an import) would prove nothing about the test.
_CONTRACT = re.compile(r"^(AssertionError|assert |Failed: DID NOT RAISE|AssertionError:)")


class Outcome(NamedTuple):
    """What the tests said.

    Attributes:
        passed: test -> whether all of its parameters passed.
        broken: test -> the message of a contract that did not hold.
        trouble: what went wrong otherwise; "" where nothing did.
    """

    passed: dict[str, bool]
    broken: dict[str, str]
    trouble: str


def tests_of(mutant: Mutant) -> tuple[str, ...]:
    """The node ids of the tests that must see it."""
    return tuple(name for name in mutant.caught_by if not name.startswith(AUDIT))


def cases_of(mutant: Mutant) -> tuple[str, ...]:
    """The cases of the audit that must see it."""
    return tuple(name.removeprefix(AUDIT) for name in mutant.caught_by if name.startswith(AUDIT))


def run_tests(nodes: Iterable[str], mutant: str = "") -> Outcome:
    """Runs the named tests in one process, with the library mutated where a mutant is named.

    Args:
        nodes: pytest node ids.
        mutant: name in `MUTANTS`; "" = the library as it is.
    """
    nodes = sorted(set(nodes))
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        done = run_process(
            ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *nodes], mutant
        )
        if done.returncode not in (0, 1) or not report.exists():
            return Outcome({}, {}, f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}")
        return read_report(report, nodes)


def run_process(arguments: Iterable[str], mutant: str = "") -> subprocess.CompletedProcess[str]:
    """Runs Python from the root of the repository, mutated or not."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    if mutant:
        environment[VARIABLE] = mutant
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


def read_report(path: pathlib.Path, nodes: Iterable[str]) -> Outcome:
    """What a JUnit file says of `nodes`; a name without parameters means all of them."""
    found: dict[str, list[str | None]] = {node: [] for node in nodes}
    trouble = []
    for case in ElementTree.parse(path).iter("testcase"):
        name, where = case.get("name", ""), case.get("classname", "").replace(".", "/")
        message: str | None = None
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                message = child.get("message", "").strip() or child.tag
                if child.tag != "failure" or not _CONTRACT.match(message):
                    trouble.append(f"{name}: {child.tag}: {message.splitlines()[0]}")
        for node, messages in found.items():
            file, test = node.split("::")
            if file.removesuffix(".py") == where and name in (
                test,
                f"{test}[" + name[len(test) + 1 :],
            ):
                messages.append(message)
    missing = [node for node, messages in found.items() if not messages]
    if missing:
        trouble.append(f"not run: {missing}")
    return Outcome(
        passed={node: all(m is None for m in messages) for node, messages in found.items()},
        broken={
            node: next(message for message in messages if message is not None)
            for node, messages in found.items()
            if any(message is not None for message in messages)
        },
        trouble="; ".join(trouble),
    )


def judge(name: str, baseline: Mapping[str, bool], seen: Outcome) -> str:
    """Why the tests did NOT catch the mutant; "" where every named one did, and only by it.

    Args:
        name: of the mutant.
        baseline: node id -> whether it passes unmutated.
        seen: what the tests said of the mutant.
    """
    if seen.trouble:
        return seen.trouble
    for node in tests_of(MUTANTS[name]):
        if not baseline.get(node, False):
            return f"{node} does not pass without the mutant"
        if node not in seen.broken:
            return f"{node} passes with the mutant"
    return ""
