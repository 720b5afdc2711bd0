"""The host's side of a round: who takes part, the charge, the draws and the keys, ahead of time."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_dp.data.sampling import draw_cohort
from fedjax_dp.federated.cohort import CohortChunk, stack_chunk
from fedjax_dp.privacy.ledger import ChargeLog
from fedjax_dp.privacy.mechanism import Mechanism
from fedjax_dp.privacy.secrets import SERVER, Purpose, Secrets
from fedjax_dp.typing import ClientConstants, ClientKeys, ClientPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """One client as the host knows it.

    Attributes:
        name: the site's name.
        unit_tiles: for each unit of privacy, the indices of its tiles in the pool.
        mechanism: what samples, clips, noises and is accounted.
        weight: public weight in the server's average.
    """

    name: str
    unit_tiles: tuple[np.ndarray, ...]
    mechanism: Mechanism
    weight: float


class ChunkInput(NamedTuple):
    """One call of `visit`, prepared.

    Attributes:
        chunk: stacked on the host.
        clients: their names, in the order of the slots.
        num_tiles: tiles drawn; un-noised, for throughput alone.
    """

    chunk: CohortChunk
    clients: tuple[str, ...]
    num_tiles: int


class RoundInput(NamedTuple):
    """A round that has been charged.

    Attributes:
        round_index: the round, from 0.
        clients: who takes part.
        left: clients whose budget this round would have exceeded.
        charged: client -> rounds charged, this one included.
        charge_head: position of the charge log after this charge.
        chunks: prepared as they are asked for.
    """

    round_index: int
    clients: tuple[str, ...]
    left: tuple[str, ...]
    charged: dict[str, int]
    charge_head: str
    chunks: Iterator[ChunkInput]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundMaker:
    """Makes the inputs of rounds; the only place that charges and derives randomness.

    Attributes:
        sites: the clients.
        secrets: their secrets.
        charges: the write-ahead log, rewound to where the run stands.
        limits: client -> rounds its budget allows; one without an entry has no limit.
        environment: see `workdir.environment_hash`.
        context: hash of data and configuration, part of every derivation.
        clients_per_chunk: slots of a chunk.
        cohort_mode: see `data.sampling.draw_cohort`.
        cohort_size: with "fixed".
        cohort_prob: with "poisson".
    """

    sites: Sequence[Site]
    secrets: Secrets
    charges: ChargeLog
    limits: Mapping[str, int]
    environment: str
    context: bytes
    clients_per_chunk: int
    cohort_mode: str = "all"
    cohort_size: int | None = None
    cohort_prob: float | None = None

    def make(self, index: int) -> RoundInput | None:
        """Charges round `index`, durably, and returns it; None once no client may go on.

        Guarantee: nothing of the round exists before its charge is on disk. The round that would
        exceed a client's budget is never run with that client.
        """
        # Who takes part is no client's secret, and a replay must find the same cohort.
        rng = self.secrets.rng(SERVER, index, Purpose.COHORT, 0, self.context)
        drawn = draw_cohort(
            rng,
            len(self.sites),
            mode=self.cohort_mode,  # type: ignore[arg-type]
            size=self.cohort_size,
            prob=self.cohort_prob,
        )
        members = [self.sites[i] for i in drawn]
        names = [site.name for site in members]
        left = self.charges.would_exceed(index, names, self.environment, self.limits)
        active = [site for site in members if site.name not in left]
        if not active and self._all_spent():
            return None
        names = [site.name for site in active]
        nonce = self.charges.charge(index, names, self.environment)
        # Clients with most work first: those of one chunk run side by side and wait for each other.
        active.sort(key=lambda site: -site.mechanism.expected_batch_size)
        return RoundInput(
            round_index=index,
            clients=tuple(names),
            left=tuple(left),
            charged=self.charges.counts(),
            charge_head=self.charges.head,
            chunks=self._chunks(index, nonce, active),
        )

    def _all_spent(self) -> bool:
        counts = self.charges.counts()
        return all(
            site.name in self.limits and counts.get(site.name, 0) >= self.limits[site.name]
            for site in self.sites
        )

    def _chunks(self, index: int, nonce: int, active: Sequence[Site]) -> Iterator[ChunkInput]:
        num_slots = max(site.mechanism.capacity for site in self.sites)
        for start in range(0, len(active), self.clients_per_chunk):
            members = active[start : start + self.clients_per_chunk]
            clients = [
                client_input(site, self.secrets, index, nonce, self.context, num_slots)
                for site in members
            ]
            empty = [None] * (self.clients_per_chunk - len(members))
            yield ChunkInput(
                chunk=stack_chunk([*clients, *empty]),
                clients=tuple(site.name for site in members),
                num_tiles=sum(int(client.plan.num_tiles.sum()) for client in clients),
            )


def client_input(
    site: Site,
    secrets: Secrets,
    round_index: int,
    nonce: int = 0,
    context: bytes = b"",
    num_slots: int | None = None,
) -> CohortChunk:
    """One slot of `stack_chunk`: the draw, the keys and the constants of `site` in one round.

    The same arguments give the same noise. A round that is run again from other parameters needs
    another nonce: the difference of two messages of equal noise carries none.

    Args:
        site: the client.
        secrets: hold the site's secret.
        round_index: the round, from 0; two rounds never share coins or noise.
        nonce: of the round's write-ahead charge.
        context: hash of data and configuration.
        num_slots: U of the plan; the site's own capacity where None.
    """
    mechanism = site.mechanism
    rng = secrets.rng(site.name, round_index, Purpose.SAMPLING, nonce, context)
    plan = mechanism.sample(rng, site.unit_tiles, num_slots)
    keys = ClientKeys(
        noise=secrets.key_data(site.name, round_index, Purpose.NOISE, nonce, context),
        augmentation=secrets.key_data(site.name, round_index, Purpose.AUGMENTATION, nonce, context),
    )
    return CohortChunk(
        keys=keys,
        client_state=(),
        constants=client_constants(mechanism, site.weight),
        plan=ClientPlan(*plan),
    )


def client_constants(mechanism: Mechanism, weight: float) -> ClientConstants:
    """The client's public numbers as its program takes them, all from its mechanism."""
    values = ClientConstants(
        weight=weight,
        l2_clip_norm=mechanism.l2_clip_norm,
        noise_stddev=mechanism.noise_stddev,
        inverse_expected_batch_size=1.0 / mechanism.expected_batch_size,
        is_active=1.0,
    )
    return ClientConstants(*(np.float32(value) for value in values))


def ahead(
    make: Callable[[int], RoundInput | None], first: int, last: int, *, depth: int = 2
) -> Generator[RoundInput, None, None]:
    """Rounds `first` .. `last - 1`; charges and chunks are made on a thread, up to `depth` ahead.

    A round that was charged ahead and then not run stays charged; running it later in the same
    environment is free. The chunks of a round must be used up before the next round is asked for.

    Args:
        make: `RoundMaker.make`.
        first: index of the first round.
        last: one above the index of the last.
        depth: rounds and chunks that may wait.
    """
    waiting: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()
    end = object()

    def put(item: object) -> None:
        while not stop.is_set():
            try:
                return waiting.put(item, timeout=0.05)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for index in range(first, last):
                made = None if stop.is_set() else make(index)
                if made is None:
                    break
                put(made)
                for chunk in made.chunks:
                    put(chunk)
                    if stop.is_set():
                        return
                put(end)
            put(None)
        except BaseException as error:
            put(error)

    def take() -> object:
        item = waiting.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def chunks() -> Iterator[ChunkInput]:
        while (item := take()) is not end:
            yield item  # type: ignore[misc]

    thread = threading.Thread(target=work, name="rounds", daemon=True)
    thread.start()
    try:
        while (made := take()) is not None:
            yield made._replace(chunks=chunks())  # type: ignore[attr-defined]
    finally:
        stop.set()
        thread.join()
