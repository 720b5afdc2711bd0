"""What is known of runs: their plans and ends, and which records contradict each other."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedjax_dp.data.sources import Holding, SiteSource


class Plan(NamedTuple):
    """What one client of a run is about to do.

    Attributes:
        holding: the data that the client trains on.
        mechanism: descriptor of its mechanism.
        rounds: the most rounds that may yet be charged to it, those already charged included.
    """

    holding: Holding
    mechanism: Mapping[str, Any]
    rounds: int

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Of the sites whose data, or some of them, the client trains on."""
        return tuple(source.fingerprint for source in self.holding.sources)

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable description; `from_json` restores it."""
        sources = [source._asdict() for source in self.holding.sources]
        holding = self.holding._asdict() | {"sources": sources}
        return {"holding": holding, "mechanism": dict(self.mechanism), "rounds": self.rounds}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Plan":
        """Restores what `to_json` described; a ValueError where it is something else."""
        _check_keys(value, cls._fields)
        holding = value["holding"]
        _check_keys(holding, Holding._fields)
        sources = tuple(SiteSource(**source) for source in holding["sources"])
        if not sources or not all(isinstance(text, str) for some in sources for text in some):
            raise ValueError(f"Expected one source or more, of strings, got {holding['sources']}.")
        if not all(isinstance(holding[name], bool) for name in ("is_whole", "is_patient")):
            raise ValueError(f"Expected is_whole and is_patient true or false, got {holding}.")
        if not isinstance(value["mechanism"], dict) or "placement" not in value["mechanism"]:
            raise ValueError(f"Expected the descriptor of a mechanism, got {value['mechanism']!r}.")
        held = Holding(sources, holding["is_whole"], holding["is_patient"])
        return cls(held, value["mechanism"], _rounds(value["rounds"]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run, as far as it is known.

    Attributes:
        run_id: 32 hexadecimal digits, drawn when the run began.
        name: of its workdir, without the folders above.
        seed: -1 where its randomness was secret; else the seed that anyone can repeat it with.
        experiment: name of the experiment.
        tile: what a tile is, such as "128 px".
        plans: client -> what it does; where the run has ended, `rounds` is what was charged.
        charged: client -> rounds charged at the last end; fewer there cannot be.
        has_ended: whether nothing more is to be charged.
    """

    run_id: str
    name: str
    seed: int
    experiment: str
    tile: str
    plans: Mapping[str, Plan]
    charged: Mapping[str, int] = dataclasses.field(default_factory=dict)
    has_ended: bool = False

    def to_json(self) -> dict[str, Any]:
        """The record that opens the run; `from_json` restores it."""
        plans = {client: plan.to_json() for client, plan in self.plans.items()}
        constant = {name: getattr(self, name) for name in ("run_id", *_CONSTANT)}
        return {"kind": "open", **constant, "plans": plans}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Run":
        """Restores what `to_json` described; a ValueError where it is something else."""
        _check_keys(value, ("kind", "run_id", *_CONSTANT, "plans"))
        run_id, name, seed = value["run_id"], value["name"], value["seed"]
        if not all(isinstance(value[key], str) for key in ("run_id", "name", "experiment", "tile")):
            raise ValueError(f"Expected run_id, name, experiment and tile as strings, got {value}.")
        if not re.fullmatch("[0-9a-f]{32}", run_id):
            raise ValueError(f"Expected a run_id of 32 hexadecimal digits, got {run_id!r}.")
        if not name or re.search(r"[/\\]", name):
            raise ValueError(f"Expected a folder's name without those above it, got {name=}.")
        if type(seed) is not int or seed < -1:
            raise ValueError(f"Expected a seed >= -1, got {seed=}.")
        if not value["plans"]:
            raise ValueError(f"Expected at least one client of run {name!r}, got none.")
        plans = {client: Plan.from_json(plan) for client, plan in value["plans"].items()}
        constant = {key: value[key] for key in _CONSTANT}
        return cls(run_id=run_id, plans=plans, **constant)

    def resumed(self, now: "Run") -> "Run":
        """The run after it started again as `now`: it is the same, and its plans can only grow.

        Raises:
            ValueError: it has another name, seed, client, source or mechanism than before.
        """
        mine, theirs = now._identity(), self._identity()
        differing = sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k))
        if differing:
            raise ValueError(
                f"Run {self.run_id} of workdir {self.name!r} was registered with another "
                f"{', '.join(differing)}. Go on with what was registered, or register a run "
                "of its own, with another run_id."
            )
        plans = {
            client: plan._replace(rounds=max(plan.rounds, now.plans[client].rounds))
            for client, plan in self.plans.items()
        }
        return dataclasses.replace(
            self, plans=plans, has_ended=self.has_ended and plans == self.plans
        )

    def closed(self, charged: Mapping[str, int]) -> "Run":
        """The run after it ended with `charged` rounds; a client that is not there has none.

        Raises:
            ValueError: an unknown client, or fewer rounds than at an earlier end.
        """
        unknown = sorted(set(charged) - set(self.plans))
        if unknown:
            raise ValueError(
                f"Expected rounds of the clients of run {self.name!r}, got also {unknown}."
            )
        counts = {client: _rounds(charged.get(client, 0)) for client in self.plans}
        fewer = sorted(client for client, n in self.charged.items() if counts[client] < n)
        if fewer:
            raise ValueError(
                f"Expected at least the rounds that run {self.name!r} ended with before, "
                f"{dict(self.charged)}, got {counts}: charges of {fewer} were lost."
            )
        plans = {client: p._replace(rounds=counts[client]) for client, p in self.plans.items()}
        return dataclasses.replace(self, plans=plans, charged=counts, has_ended=True)

    def _identity(self) -> dict[str, Any]:
        """Everything but the numbers of rounds, by name."""
        found = {name: getattr(self, name) for name in _CONSTANT}
        for client, plan in self.plans.items():
            found |= {f"data of {client}": plan.holding, f"mechanism of {client}": plan.mechanism}
        return found


_CONSTANT = ("name", "seed", "experiment", "tile")


def with_record(known: Mapping[str, Run], record: Mapping[str, Any]) -> dict[str, Run]:
    """What is known after one more record; see `Run.to_json` and `end_record`.

    Args:
        known: run_id -> run.
        record: of JSON types.

    Raises:
        ValueError: it is no record, or contradicts what is known.
    """
    if record["kind"] == "open":
        run = Run.from_json(record)
        before = known.get(run.run_id)
        return {**known, run.run_id: run if before is None else before.resumed(run)}
    if record["kind"] != "close":
        raise ValueError(f"Expected a record of kind open or close, got {record['kind']!r}.")
    _check_keys(record, ("kind", "run_id", "charged"))
    run_id = record["run_id"]
    if run_id not in known:
        raise ValueError(f"Expected a run that was opened, got {run_id=}.")
    return {**known, run_id: known[run_id].closed(record["charged"])}


def end_record(run_id: str, charged: Mapping[str, int]) -> dict[str, Any]:
    """The record that ends a run with `charged`: client -> rounds."""
    return {"kind": "close", "run_id": run_id, "charged": dict(charged)}


def _rounds(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"Expected a number of rounds >= 0, got {value!r}.")
    return value


def _check_keys(value: Mapping[str, Any], expected: tuple[str, ...]) -> None:
    if set(value) != set(expected):
        raise ValueError(f"Expected the fields {sorted(expected)}, got {sorted(value)}.")
