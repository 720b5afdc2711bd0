"""The host's side of a round: who takes part, the charge, the draws and the keys, ahead of time."""

import dataclasses
import hashlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_dp.data.sampling import draw_cohort
from fedjax_dp.federated.cohort import AnyChunk, CohortChunk, stack_chunk
from fedjax_dp.federated.packing import Packing, pack
from fedjax_dp.privacy import discrete_gaussian
from fedjax_dp.privacy.ledger import ChargeLog
from fedjax_dp.privacy.mechanism import Mechanism
from fedjax_dp.privacy.secrets import SERVER, Purpose, Secrets
from fedjax_dp.privacy.secure_aggregation import SecureRound, agree
from fedjax_dp.typing import ClientConstants, ClientKeys, ClientPlan, ServerRelease


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """One client as the host knows it.

    Attributes:
        name: the site's name.
        unit_tiles: for each unit of privacy, the indices of its tiles in the pool.
        mechanism: what samples, clips, noises and is accounted.
        weight: public weight in the server's average.
        index: its place among the clients of the run.
    """

    name: str
    unit_tiles: tuple[np.ndarray, ...]
    mechanism: Mechanism
    weight: float
    index: int = 0

    @property
    def num_slots(self) -> int:
        """The most units that a step of this site can draw."""
        if self.mechanism.relation == "add_or_remove":
            return len(self.unit_tiles)
        return self.mechanism.capacity


class ChunkInput(NamedTuple):
    """One call of `visit`, prepared.

    Attributes:
        chunk: stacked on the host, with its tiles where they are packed.
        clients: their names, in the order of the slots.
        num_tiles: tiles drawn; un-noised, for throughput alone.
    """

    chunk: AnyChunk
    clients: tuple[str, ...]
    num_tiles: int


class RoundInput(NamedTuple):
    """A round that has been charged.

    Attributes:
        round_index: the round, from 0.
        clients: who was charged. Of "central" all that have budget: who was drawn stays secret.
        left: clients whose budget this round would have exceeded.
        charged: client -> rounds charged, this one included.
        charge_head: position of the charge log after this charge.
        chunks: prepared as they are asked for.
        release: what the server opens the sum with; to be called when the chunks are used up.
            Raises `AbortedRoundError` where more clients dropped out than may: then nothing is
            opened, and the round stays charged.
        dropped: clients that took part and whose message never came.
    """

    round_index: int
    clients: tuple[str, ...]
    left: tuple[str, ...]
    charged: dict[str, int]
    charge_head: str
    chunks: Iterator[ChunkInput]
    release: Callable[[], ServerRelease] = ServerRelease
    dropped: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundMaker:
    """Makes the inputs of rounds; the only place that charges and derives randomness.

    Whom "central" draws is accounted for: the probability is that of each client's mechanism, and
    there is no other. A cohort of another placement is public, amplifies nothing, and is given.

    Attributes:
        sites: the clients.
        secrets: their secrets.
        charges: the write-ahead log, rewound to where the run stands.
        limits: client -> rounds its budget allows; one without an entry has no limit.
        environment: see `workdir.environment_hash`.
        context: hash of data and configuration, part of every derivation.
        clients_per_chunk: slots of a chunk.
        cohort_mode: see `data.sampling.draw_cohort`; left at "all" for "central".
        cohort_size: with "fixed".
        cohort_prob: with "poisson"; not of "central".
        num_words: length of a message under secure aggregation.
        dropout_prob: with which a client is lost, in the simulation of "distributed".
        packing: how the tiles of a chunk are packed; None where the devices have all tiles.

    Raises:
        ValueError: a cohort is given for "central".
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
    num_words: int = 0
    dropout_prob: float = 0.0
    packing: Packing | None = None

    def __post_init__(self) -> None:
        given = self.cohort_mode, self.cohort_size, self.cohort_prob
        if self._is_central and given != ("all", None, None):
            probs = sorted({site.mechanism.cohort_prob for site in self.sites})
            raise ValueError(
                "Expected no cohort beside the accounted one for placement central, got "
                f"cohort_mode={self.cohort_mode!r}, cohort_size={self.cohort_size}, "
                f"cohort_prob={self.cohort_prob}. Clients are drawn with the cohort_prob of their "
                f"mechanisms, {', '.join(map(str, probs))}: change it there, where it is accounted."
            )

    @property
    def _is_central(self) -> bool:
        return any(site.mechanism.placement == "central" for site in self.sites)

    def make(self, index: int) -> RoundInput | None:
        """Charges round `index`, durably, and returns it; None once no client may go on.

        Guarantee: nothing of the round exists before its charge is on disk. The round that would
        exceed a client's budget is never run with that client.
        """
        placement = self.sites[0].mechanism.placement
        # Where sampling of clients amplifies, all that may be drawn are charged, and the coins are
        # thrown after the charge, anew for every nonce.
        members = self.sites if placement == "central" else self._cohort(index, nonce=0)
        names = [site.name for site in members]
        left = self.charges.would_exceed(index, names, self.environment, self.limits)
        active = [site for site in members if site.name not in left]
        if not active and (placement == "central" or self._all_spent()):
            return None
        if placement == "distributed" and len(active) < members[0].mechanism.min_sharing:
            return None  # too few are left to share the noise
        names = [site.name for site in active]
        nonce = self.charges.charge(index, names, self.environment)
        made = RoundInput(
            round_index=index,
            clients=tuple(names),
            left=tuple(left),
            charged=self.charges.counts(),
            charge_head=self.charges.head,
            chunks=iter(()),
        )
        if placement == "distributed":
            return self._shared(made, nonce, active)
        if placement == "central":
            drawn = {site.name for site in self._cohort(index, nonce)}
            release = self._central_release(index, nonce, active)
            active = [site for site in active if site.name in drawn]
            made = made._replace(release=lambda: release)
        return made._replace(chunks=self._chunks(index, nonce, active))

    def _cohort(self, index: int, nonce: int) -> list[Site]:
        # With nonce 0 a replay finds the same cohort: who takes part is then no client's secret.
        rng = self.secrets.rng(SERVER, index, Purpose.COHORT, nonce, self.context)
        if self._is_central:
            probs = [site.mechanism.cohort_prob for site in self.sites]
            coins = rng.random(len(probs)) < np.array(probs)
            return [site for site, is_drawn in zip(self.sites, coins, strict=True) if is_drawn]
        drawn = draw_cohort(
            rng,
            len(self.sites),
            mode=self.cohort_mode,  # type: ignore[arg-type]
            size=self.cohort_size,
            prob=self.cohort_prob,
        )
        return [self.sites[i] for i in drawn]

    def _central_release(self, index: int, nonce: int, active: Sequence[Site]) -> ServerRelease:
        """The trusted server's noise, and the public divisor: expected, not drawn, weights."""
        mechanism = active[0].mechanism
        expected = sum(s.mechanism.cohort_prob * s.mechanism.relative_weight for s in active)
        key = self.secrets.key_data(SERVER, index, Purpose.SERVER_NOISE, nonce, self.context)
        return ServerRelease(
            divisor=np.float32(expected),
            l2_clip_norm=np.float32(mechanism.l2_clip_norm),
            noise_key=key,
            noise_stddev=np.float32(mechanism.server_noise_stddev),
            count_divisor=np.float32(sum(s.mechanism.cohort_prob for s in active)),
            count_noise_stddev=np.float32(mechanism.count_noise_stddev or 0.0),
        )

    def _shared(self, made: RoundInput, nonce: int, active: Sequence[Site]) -> RoundInput:
        """A round under secure aggregation: fresh masks, shares split anew, and who drops out."""
        index, mechanism = made.round_index, active[0].mechanism

        seeds = {
            site.name: self.secrets.derive(site.name, index, Purpose.MASK, nonce, self.context)
            for site in active
        }

        def seed(client: str, peer: str = "") -> bytes:
            return hashlib.blake2b(peer.encode(), key=seeds[client], digest_size=32).digest()

        session = SecureRound(
            [site.name for site in active],
            client_seed=seed,
            pair_seed=lambda u, v: agree(seed(u, v), seed(v, u)),
            num_words=self.num_words,
            max_dropouts=mechanism.max_dropouts,
        )
        rng = self.secrets.rng(SERVER, index, Purpose.DROPOUT, nonce, self.context)
        is_lost = rng.random(len(active)) < self.dropout_prob
        dropped = tuple(s.name for s, lost in zip(active, is_lost, strict=True) if lost)
        present = [site for site in active if site.name not in dropped]

        def release() -> ServerRelease:
            expected = sum(site.mechanism.expected_batch_size for site in present)
            return ServerRelease(
                divisor=np.float32(expected),
                l2_clip_norm=np.float32(mechanism.l2_clip_norm),
                count_divisor=np.float32(expected),
                unmask=session.unmask([site.name for site in present]),
            )

        if len(dropped) > mechanism.max_dropouts:
            return made._replace(release=release, dropped=dropped)  # no message is even summed
        chunks = self._chunks(index, nonce, present, session, num_sharing=len(active))
        return made._replace(chunks=chunks, release=release, dropped=dropped)

    def _all_spent(self) -> bool:
        counts = self.charges.counts()
        return all(
            site.name in self.limits and counts.get(site.name, 0) >= self.limits[site.name]
            for site in self.sites
        )

    def _chunks(
        self,
        index: int,
        nonce: int,
        active: Sequence[Site],
        session: SecureRound | None = None,
        num_sharing: int | None = None,
    ) -> Iterator[ChunkInput]:
        num_slots = max(site.num_slots for site in self.sites)
        # Clients with most work first: those of one chunk run side by side and wait for each other.
        active = sorted(active, key=lambda site: -site.mechanism.expected_batch_size)
        for start in range(0, max(len(active), 1), self.clients_per_chunk):
            members = active[start : start + self.clients_per_chunk]
            clients = [
                client_input(
                    site,
                    self.secrets,
                    index,
                    nonce,
                    self.context,
                    num_slots,
                    mask=() if session is None else session.mask(site.name),
                    num_sharing=num_sharing,
                )
                for site in members
            ]
            if not clients:
                return
            empty = [None] * (self.clients_per_chunk - len(members))
            yield ChunkInput(
                chunk=pack(stack_chunk([*clients, *empty]), self.packing),
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
    *,
    mask: np.ndarray | tuple[()] = (),
    num_sharing: int | None = None,
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
        num_slots: U of the plan; the site's own where None.
        mask: uint32 [M], under secure aggregation.
        num_sharing: clients that share the noise of this round; as at the start where None.
    """
    mechanism = site.mechanism
    rng = secrets.rng(site.name, round_index, Purpose.SAMPLING, nonce, context)
    plan = mechanism.sample(rng, site.unit_tiles, num_slots)
    keys = ClientKeys(
        noise=secrets.key_data(site.name, round_index, Purpose.NOISE, nonce, context),
        augmentation=secrets.key_data(site.name, round_index, Purpose.AUGMENTATION, nonce, context),
        mask=mask,
    )
    if mechanism.noise == "discrete_gaussian":
        variance = mechanism.share_variance(num_sharing or mechanism.num_shares)
        rng = secrets.rng(site.name, round_index, Purpose.INTEGER_NOISE, nonce, context)
        # Reduced modulo 2**32 like everything that is summed: no draw is too large for a word.
        drawn = discrete_gaussian.sample(rng, variance, np.shape(mask))
        keys = keys._replace(integer_noise=drawn.astype(np.uint32).view(np.int32))
    return CohortChunk(
        keys=keys,
        client_state=(),
        constants=client_constants(mechanism, site.weight, site.index, num_sharing),
        plan=ClientPlan(*plan),
    )


def client_constants(
    mechanism: Mechanism, weight: float, index: int = 0, num_sharing: int | None = None
) -> ClientConstants:
    """The client's public numbers as its program takes them, all from its mechanism.

    Args:
        mechanism: the client's.
        weight: in the server's average; of "central" the mechanism's own is used.
        index: the client's place among the clients of the run.
        num_sharing: clients that share the noise of this round; as at the start where None.
    """
    sharing = num_sharing or mechanism.num_shares
    is_shared = mechanism.placement == "distributed"
    values = ClientConstants(
        weight=mechanism.relative_weight if mechanism.placement == "central" else weight,
        l2_clip_norm=mechanism.l2_clip_norm,
        noise_stddev=mechanism.share_stddev(sharing) if is_shared else mechanism.noise_stddev,
        inverse_expected_batch_size=1.0 / mechanism.expected_batch_size,
        is_active=1.0,
        count_noise_stddev=mechanism.count_share_stddev(sharing),
    )
    floats = ClientConstants(*(np.float32(value) for value in values))
    return floats._replace(site=np.int32(index))


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
