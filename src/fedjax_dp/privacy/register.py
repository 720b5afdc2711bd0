"""Which runs touched which data: one file for all runs of a folder, written ahead of their rounds.

This file remembers; what the runs cost together is told by `across_runs.py`.
"""

import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedjax_dp.privacy import journal, run_records
from fedjax_dp.privacy.run_records import Plan, Run

_POLL_SECONDS = 0.02


class Register:
    """Append-only file of all runs on the same data, shared by the processes that run them.

    Guarantees:
        `open_run` returns only after the plan is on disk (fsync). So a run that calls it before its
        first charge counts with all its rounds, be it killed or its workdir deleted, until
        `close_run` says how many were charged. A line torn by a kill was never returned, so nothing
        of its run was charged: it is cut off. Each call holds the file's lock while it reads and
        writes, and no longer, so runs may go side by side.

    The file holds fingerprints of private data (see `data.sources`): it stays with who holds them.

    Example:
        >>> register = Register("runs/privacy_register.jsonl")
        >>> register.open_run(Run(run_id=run_id, name="a", seed=-1, experiment="feddp",
        ...     tile="128 px", plans={"uhcw": Plan(holding, mechanism.descriptor(), 200)}))
        >>> ...  # charge and run rounds
        >>> register.close_run(run_id, charges.counts())
    """

    def __init__(self, path: str | os.PathLike[str], *, patience: float = 60.0) -> None:
        """Names the file, which the first `open_run` creates; `patience`: seconds for its lock."""
        self.path = Path(path)
        self.patience = patience

    def open_run(self, run: Run) -> None:
        """Writes down what a run is about to do, before anything of it is charged.

        To be called at every start: a run that goes on is known, and the file changes only where
        more rounds than planned may now be charged.

        Raises:
            ValueError: the run is no valid one, is known with another name, data or mechanism, or
                the file is damaged.
            RuntimeError: another process holds the lock for longer than `patience`.
        """
        self._add(run.to_json())

    def close_run(self, run_id: str, charged: Mapping[str, int]) -> None:
        """Replaces the planned rounds of a run that has ended by those charged.

        Args:
            run_id: of the run.
            charged: client -> rounds as `ChargeLog.counts` has them, which nothing may lower; a
                client that is not there was charged none.

        Raises:
            FileNotFoundError: there is no register.
            ValueError: an unknown run or client, or fewer rounds than at an earlier end.
            RuntimeError: another process holds the lock for longer than `patience`.
        """
        self._check_exists()
        self._add(run_records.end_record(run_id, charged))

    def runs(self, fingerprint: str | None = None) -> tuple[Run, ...]:
        """The runs that train on the data of `fingerprint`, or all; oldest first.

        Raises:
            FileNotFoundError: there is no register.
            ValueError: the file is damaged.
            RuntimeError: another process holds the lock for longer than `patience`.
        """
        self._check_exists()
        with self.path.open("rb", buffering=0) as file:
            self._lock(file, fcntl.LOCK_SH)
            known = self._known(journal.read_lines(file, cut=False))
        return tuple(
            run
            for run in known.values()
            if fingerprint is None
            or any(fingerprint in plan.fingerprints for plan in run.plans.values())
        )

    def _add(self, record: dict[str, Any]) -> None:
        """Appends a record, unless it says nothing new."""
        record = json.loads(json.dumps(record, allow_nan=False))  # as it reads back
        with self.path.open("a+b", buffering=0) as file:
            is_locked = self._lock(file, fcntl.LOCK_EX)
            journal.sync_new(file)
            lines = journal.read_lines(file, cut=is_locked)
            if not is_locked and file.tell() != sum(len(line) + 1 for line in lines):
                raise RuntimeError(
                    f"The last line of {self.path} has no end, and its file system knows no locks: "
                    "another run may be writing it. Try again; if none is, delete that line."
                )
            known = self._known(lines)
            if run_records.with_record(known, record) != known:
                journal.append(file, record)

    def _known(self, lines: list[bytes]) -> dict[str, Run]:
        known: dict[str, Run] = {}
        for number, line in enumerate(lines, start=1):
            try:
                known = run_records.with_record(known, json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"Line {number} of {self.path} is not of a register of runs ({error}). What "
                    "was released is unknown: restore the file from a copy, or use the version of "
                    "this program that wrote it. Do not go on without it."
                ) from error
        return known

    def _check_exists(self) -> None:
        if not self.path.exists():
            raise FileNotFoundError(
                f"There is no register of runs at {self.path}. It lies beside the workdirs of the "
                "runs. If it was there, restore it: it alone knows what was released."
            )

    def _lock(self, file: Any, kind: int) -> bool:
        """Waits for the lock; False where the file system knows none."""
        deadline = time.monotonic() + self.patience
        while True:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise RuntimeError(
                        f"Another process has held {self.path} for {self.patience:g} s. Wait for "
                        "it or stop it."
                    ) from None
                time.sleep(_POLL_SECONDS)
            except OSError:
                return False


__all__ = ["Plan", "Register", "Run"]
