"""What has been charged: the count of rounds per client, and the log written ahead of a release.

This file counts; what a count is worth in epsilon is the mechanism's matter.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedjax_dp.privacy import journal


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Immutable count of charged rounds per client, bound to the clients' mechanisms.

    It is saved in the checkpoint beside the parameters it belongs to. The authoritative totals,
    which also count rounds that a crash undid after they were released, are `ChargeLog.counts`.

    Attributes:
        fingerprints: (client, fingerprint of its mechanism) for every client.
        charged: rounds charged, in the order of `fingerprints`.
    """

    fingerprints: tuple[tuple[str, str], ...]
    charged: tuple[int, ...]

    @classmethod
    def start(cls, fingerprints: Mapping[str, str]) -> "Ledger":
        """A ledger without charges for `fingerprints`: client -> mechanism fingerprint."""
        return cls(tuple(fingerprints.items()), (0,) * len(fingerprints))

    @property
    def counts(self) -> dict[str, int]:
        """Client -> rounds charged."""
        return {
            client: count
            for (client, _), count in zip(self.fingerprints, self.charged, strict=True)
        }

    def charge(self, clients: Iterable[str]) -> "Ledger":
        """The ledger after one more round of `clients`; an empty draw is charged like any other."""
        members = _check_clients(clients)
        unknown = members - set(self.counts)
        if unknown:
            raise ValueError(f"Expected clients of this ledger, got {sorted(unknown)}.")
        charged = tuple(n + (client in members) for client, n in self.counts.items())
        return dataclasses.replace(self, charged=charged)

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable description; `from_json` restores it."""
        return {"fingerprints": dict(self.fingerprints), "charged": self.counts}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Ledger":
        """Restores what `to_json` wrote."""
        fingerprints, charged = value["fingerprints"], value["charged"]
        if set(fingerprints) != set(charged):
            raise ValueError(f"Clients of the ledger disagree: {value}.")
        return cls(
            tuple(fingerprints.items()), tuple(int(charged[client]) for client in fingerprints)
        )

    def restore(self, value: Mapping[str, Any]) -> "Ledger":
        """The saved ledger `value`, if it is one of this ledger's mechanisms.

        Raises:
            ValueError: the saved ledger counts rounds of another mechanism or other clients.
        """
        saved = Ledger.from_json(value)
        mine, theirs = dict(self.fingerprints), dict(saved.fingerprints)
        if mine != theirs:
            differing = sorted(c for c in mine | theirs if mine.get(c) != theirs.get(c))
            raise ValueError(
                f"The saved ledger counts rounds of another mechanism for {differing}. Use the "
                "configuration of that run, or start in a new workdir."
            )
        # Order is this run's.
        return dataclasses.replace(self, charged=tuple(saved.counts[client] for client in mine))


class ChargeLog:
    """Append-only file of charges, each durable before anything of its round is released.

    Guarantees:
        `charge` returns only after the line is on disk (fsync). A line torn by a kill was never
        returned, so nothing of its round was released: opening the file cuts it off. A round is
        free a second time only where nothing that its messages depend on has changed: same clients,
        same environment, and same history before it (`head`). Otherwise it gets a nonce that this
        round never had, hence fresh noise, and a second charge.

    The caller saves `head` in each checkpoint and calls `rewind` after restoring one. Without that
    a replayed round is charged again, which is safe, and not free.

    Example:
        >>> log = ChargeLog(path)
        >>> log.rewind(checkpoint.head)
        >>> nonce = log.charge(7, ["A", "B"], environment)  # then run and release round 7
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens or creates the log; refuses a second process (RuntimeError) and a damaged file."""
        self.path = Path(path)
        is_new = not self.path.exists()
        self._file = self.path.open("a+b", buffering=0)
        try:
            self._lock()
            if is_new:
                journal.sync_new(self._file)
            # Rounds x clients names would fill the memory of a long run over a large population.
            self._cohorts: dict[tuple[str, ...], list[str]] = {}
            self._rounds: dict[int, list[dict[str, Any]]] = {}
            self._digests: set[str] = set()
            self._totals: dict[str, int] = {}
            for record in self._read():
                self._keep(record)
        except BaseException:
            self._file.close()
            raise
        self._head = ""

    @property
    def head(self) -> str:
        """Digest of the charges that led to the present state; "" before the first."""
        return self._head

    def rewind(self, head: str) -> None:
        """Declares the state restored to the checkpoint that saved `head`."""
        if head and head not in self._digests:
            raise ValueError(
                f"The checkpoint's {head=} is of no charge in {self.path}: checkpoint and charges "
                "belong to different runs."
            )
        self._head = head

    def charge(self, round_index: int, clients: Iterable[str], environment: str) -> int:
        """Charges a round, durably, and returns the nonce its randomness must be derived with.

        Args:
            round_index: the round, >= 0.
            clients: who takes part, distinct names; also those whose draw will be empty.
            environment: hash of all else that the messages' bytes depend on: versions, device,
                execution plan.

        Returns:
            0 for a first charge; the charge's own nonce for a replay of the same round, clients,
            environment and history, free; else the next unused nonce of that round.

        Raises:
            ValueError: a negative round or repeated names.
        """
        if round_index < 0:
            raise ValueError(f"Expected round_index >= 0, got {round_index=}.")
        members = sorted(_check_clients(clients))
        record = self._find(round_index, members, environment)
        if record is None:
            taken = [r["nonce"] for r in self._rounds.get(round_index, ())]
            record = {
                "round": round_index,
                "nonce": 1 + max(taken, default=-1),
                "environment": environment,
                "clients": members,
                "parent": self._head,
            }
            journal.append(self._file, record)
            self._keep(record)
        self._head = _digest(record)
        return int(record["nonce"])

    def counts(self) -> dict[str, int]:
        """Client -> rounds charged: the authoritative totals."""
        return dict(self._totals)

    def would_exceed(
        self,
        round_index: int,
        clients: Iterable[str],
        environment: str,
        limits: Mapping[str, int],
    ) -> tuple[str, ...]:
        """Clients that charging this round would take above their limit; a free replay takes none.

        Args:
            round_index: as for `charge`.
            clients: as for `charge`.
            environment: as for `charge`.
            limits: client -> rounds its budget allows; a client without a limit has none.
        """
        members = sorted(_check_clients(clients))
        totals = self._totals
        left = tuple(c for c in members if c in limits and totals.get(c, 0) + 1 > limits[c])
        # A replay finds the totals of the whole first attempt, in which more clients may have gone
        # since: the round's own charge tells who took part. Whoever it lacks must be spent now too.
        replays = [
            record
            for record in self._rounds.get(round_index, ())
            if (record["environment"], record["parent"]) == (environment, self._head)
            and set(members) - set(left) <= set(record["clients"]) <= set(members)
        ]
        taken = max((record["clients"] for record in replays), key=len, default=None)
        return left if taken is None else tuple(c for c in left if c not in taken)

    def close(self) -> None:
        """Releases the file and its lock."""
        self._file.close()

    def __enter__(self) -> "ChargeLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find(
        self, round_index: int, members: list[str], environment: str
    ) -> dict[str, Any] | None:
        for record in self._rounds.get(round_index, ()):
            key = (record["clients"], record["environment"], record["parent"])
            if key == (members, environment, self._head):
                return record
        return None

    def _keep(self, record: dict[str, Any]) -> None:
        """Adds a record that is on disk to what is known."""
        clients = record["clients"]
        record["clients"] = self._cohorts.setdefault(tuple(clients), clients)
        self._rounds.setdefault(record["round"], []).append(record)
        self._digests.add(_digest(record))
        for client in clients:
            self._totals[client] = self._totals.get(client, 0) + 1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"Another process charges rounds to {self.path}. Wait for it or stop it."
            ) from None
        except OSError:  # a file system without locks: go on as any program would
            pass

    def _read(self) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(journal.read_lines(self._file, cut=True), start=1):
            try:
                record = json.loads(line)
                _check_record(record)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"Line {number} of {self.path} is no charge ({error}). What was charged is "
                    "unknown: restore the file from a copy, and do not go on without it."
                ) from error
            yield record


def _check_record(record: dict[str, Any]) -> None:
    valid = (
        isinstance(record["round"], int)
        and isinstance(record["nonce"], int)
        and isinstance(record["environment"], str)
        and isinstance(record["parent"], str)
        and all(isinstance(client, str) for client in record["clients"])
    )
    if not valid:
        raise ValueError(f"unexpected types in {record}")


def _digest(record: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()


def _check_clients(clients: Iterable[str]) -> set[str]:
    names = list(clients)
    if len(set(names)) != len(names):
        raise ValueError(f"Expected distinct clients, got {names}.")
    return set(names)
