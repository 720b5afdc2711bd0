"""Secure aggregation, simulated: masks that hide every message and open the sum alone.

The protocol is that of Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving
Machine Learning" (CCS 2017), figure 4, for an honest-but-curious server. A message is an integer
vector plus a mask of the client's own and one mask per peer; those of a pair cancel in the sum.
Clients hold Shamir shares of one another's secrets, with which the server removes the own masks of
those who delivered and the pair masks of those who dropped out.

What is real is the arithmetic and what the clients refuse. What is not simulated:

- key agreement: pair seeds are given (see `agree`), where a deployment runs Diffie-Hellman;
- separate machines and encrypted shares: all secrets lie in this one process;
- signatures and the consistency check of the list of contributors. A server that shows unlike
  lists to unlike clients still cannot open one client's message, but may open a sum of fewer than
  K - `max_dropouts`. Hence "honest but curious": it follows the protocol, and looks.

Masks are pseudo-random, not one-time pads: all holds as far as SHAKE-256 is a pseudo-random
function.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, NoReturn

import numpy as np

from fedjax_dp.privacy.fixed_point import WORDS, WordBits, check_dtype, check_word_bits
from fedjax_dp.privacy.secret_sharing import PRIME, Share, reconstruct, split

SEED_BYTES = 32
_DOMAIN = b"fedjax_dp secure aggregation v1\n"
_BLOCKWORDS = 1 << 16


class AbortedRoundError(RuntimeError):
    """Too few clients are left: the round is over and nothing of it was, or will be, opened."""


class RefusedError(RuntimeError):
    """An honest client does not do what it is asked, as that could open a message."""


def agree(first: bytes, second: bytes) -> bytes:
    """The seed of a pair from both ends' contributions, in either order: stands in for DH.

    A contribution must be fresh for every round, 32 bytes, and of ONE pair: a client that meets
    the same contribution in two pairs could compute the masks between two others.
    """
    if len(first) != SEED_BYTES or len(second) != SEED_BYTES:
        raise ValueError(f"Expected {SEED_BYTES} bytes of each, got {len(first)}, {len(second)}.")
    return _shake(b"agree", min(first, second) + max(first, second), 0, SEED_BYTES)


class Answer(NamedTuple):
    """What one client sends when it is told whose messages arrived; never both for one peer."""

    self_shares: Mapping[str, Share]  # of the own masks of those whose messages arrived
    pair_shares: Mapping[str, Share]  # of the envelope keys of those who dropped out


@dataclasses.dataclass(repr=False)
class _Party:
    """What one client knows."""

    self_seed: bytes  # b_u
    pair_seeds: dict[str, bytes]  # s_uv, by peer, in the order of the clients
    self_shares: dict[str, Share] = dataclasses.field(default_factory=dict)  # held, by owner
    pair_shares: dict[str, Share] = dataclasses.field(default_factory=dict)
    has_masked: bool = False
    answered: frozenset[str] | None = None


class SecureRound:
    """One round of secure aggregation: masks once, opens once, and then it is over.

    Guarantees, with K clients, t the threshold and d = `max_dropouts`:
        Before the answers all messages together are jointly uniform to the server. After them it
        knows the sum of the contributors' vectors, and any proper subset of their messages is still
        jointly uniform. A server with c < t clients on its side learns the sum of the other
        contributors instead; with c >= t nothing is hidden.

        A client answers ONE list of contributors, with shares of the own mask of those on it and
        of the pair masks of those not on it. With c < 2t - K nobody can collect both of one client,
        so a message that arrives after its sender was declared a dropout stays hidden.

        A server that shows everybody the same list never opens a sum of fewer than K - d messages,
        hence never one of a single message.

    From its seed, by SHAKE-256 and labels, a client u derives the seed b_u of its own mask, a key
    k_u, and the coefficients with which it shares both. Its pair seeds s_uv lie with the server, in
    an envelope encrypted under k_u. The mask of u is
    `PRG(b_u) + sum_{v after u} PRG(s_uv) - sum_{v before u} PRG(s_uv) mod 2**word_bits`.

    Args:
        clients: distinct names, 2 or more, in an order that all of them know.
        client_seed: name -> 32 bytes that only this client knows; called once a client.
        pair_seed: (u, v) -> 32 bytes that only these two know; called once a pair, u before v.
        num_words: length of every message.
        word_bits: 32 or 64.
        max_dropouts: how many may be missing; one more aborts the round.
        threshold: how many clients open a secret together, K/2 < threshold <= K - max_dropouts;
            None takes the most, which withstands the most colluders.

    Seeds must be fresh for every round and every attempt at one: derive them from the round and the
    nonce of its charge. Two messages under one mask give away their difference.

    Raises:
        ValueError: for arguments without a secure round, or a seed given to two.

    Example:
        >>> session = SecureRound(
        ...     ["a", "b"], client_seed=lambda u: u.encode() * 32, num_words=1,
        ...     pair_seed=lambda u, v: agree(u.encode() * 32, v.encode() * 32),
        ... )  # seeds that everybody knows: an example only
        >>> words = np.array([21], np.uint32)
        >>> total = session.masked("a", words) + session.masked("b", words)
        >>> (total - session.unmask(["a", "b"])).tolist()
        [42]
    """

    def __init__(
        self,
        clients: Iterable[str],
        *,
        client_seed: Callable[[str], bytes],
        pair_seed: Callable[[str, str], bytes],
        num_words: int,
        word_bits: WordBits = 32,
        max_dropouts: int = 0,
        threshold: int | None = None,
    ) -> None:
        self._clients = tuple(clients)
        check_word_bits(word_bits)
        if num_words < 1:
            raise ValueError(f"Expected num_words >= 1, got {num_words=}.")
        self._num_words = num_words
        self._dtype = WORDS[word_bits][0]
        self._max_dropouts = max_dropouts
        self._threshold = _check_threshold(self._clients, max_dropouts, threshold)
        self._over = ""
        seeds = {client: client_seed(client) for client in self._clients}
        pairs = {
            (u, v): pair_seed(u, v)
            for index, u in enumerate(self._clients)
            for v in self._clients[index + 1 :]
        }
        _check_seeds([*seeds.items(), *pairs.items()])
        self._parties: dict[str, _Party] = {
            u: _Party(
                _shake(b"self seed", seeds[u], 0, SEED_BYTES),
                {v: pairs.get((u, v)) or pairs[v, u] for v in self._clients if v != u},
            )
            for u in self._clients
        }
        self._envelopes: dict[str, bytes] = {}
        for client in self._clients:
            self._share_secrets(client, seeds[client])

    @property
    def threshold(self) -> int:
        """How many clients open a secret together."""
        return self._threshold

    def mask(self, client: str) -> np.ndarray:
        """The words [num_words] that this client adds to its message, modulo 2**word_bits.

        Given once a client: a second message under the same mask would reveal the difference.

        Raises:
            RefusedError: the mask was given before, or the round is over.
            ValueError: an unknown client.
        """
        self._check_open()
        party = self._parties[self._known([client])[0]]
        if party.has_masked:
            raise RefusedError(
                f"The mask of {client!r} was used in this round. Begin a new SecureRound with "
                "fresh seeds for a second message."
            )
        party.has_masked = True
        total = np.zeros(self._num_words, self._dtype)
        _add_stream(total, b"self mask", party.self_seed)
        for peer, seed in party.pair_seeds.items():
            _add_stream(total, b"pair mask", seed, negative=self._sign_is_negative(client, peer))
        return total

    def masked(self, client: str, words: np.ndarray) -> np.ndarray:
        """What this client sends: `words + mask(client) mod 2**word_bits`; see `mask`.

        Args:
            client: the sender.
            words: [num_words] of the round's unsigned type, as `FixedPoint.encode` returns.
        """
        check_dtype(words, self._dtype)
        if words.shape != (self._num_words,):
            raise ValueError(f"Expected words of shape {(self._num_words,)}, got {words.shape}.")
        message = self.mask(client)
        message += words
        return message

    def answer(self, holder: str, contributors: Iterable[str]) -> Answer:
        """What an honest client reveals when it is told whose messages arrived.

        The same list again gets the same answer; any other list is refused, because it would ask
        for the other secret of somebody.

        Args:
            holder: the client that is asked; its own message must be on the list.
            contributors: those whose messages arrived, in any order.

        Raises:
            AbortedRoundError: the list misses more than `max_dropouts`; the round is over.
            RefusedError: another list was answered, `holder` is not on it, or the round is over.
            ValueError: a name that is unknown, twice on the list, or has sent nothing.
        """
        self._check_open()
        listed = self._check_contributors(contributors)
        party = self._parties[self._known([holder])[0]]
        if holder not in listed:
            raise RefusedError(f"{holder!r} is not on the list of contributors; ask those on it.")
        if party.answered not in (None, frozenset(listed)):
            raise RefusedError(
                f"{holder!r} answered for another list of contributors. For a client on one list "
                "and not on the other both secrets would be revealed, and its message with them."
            )
        party.answered = frozenset(listed)
        dropped = [client for client in self._clients if client not in listed]
        return Answer(
            self_shares={client: party.self_shares[client] for client in listed},
            pair_shares={client: party.pair_shares[client] for client in dropped},
        )

    def unmask(
        self, contributors: Iterable[str], *, responders: Iterable[str] | None = None
    ) -> np.ndarray:
        """What the server subtracts from the modular sum of the contributors' messages.

        Computed from the clients' answers alone: own masks of the contributors, and their pair
        masks with those who dropped out. Afterwards the round is over and its secrets are gone.

        Args:
            contributors: those whose messages arrived and were summed, in any order.
            responders: those of them that still answer, `threshold` or more; None means all.

        Returns:
            Words [num_words]; `sum - unmask(...) mod 2**word_bits` is the sum of the vectors.

        Raises:
            AbortedRoundError: more than `max_dropouts` are missing, or fewer than `threshold`
                answer. Nothing was opened, and nothing can be any more.
            RefusedError: see `answer`.
            ValueError: a name that is unknown, given twice, or has sent nothing.
        """
        self._check_open()
        listed = self._check_contributors(contributors)
        asked = listed if responders is None else self._known(responders)
        if not set(asked) <= set(listed):
            raise ValueError(f"Expected responders among the contributors {listed}, got {asked}.")
        if len(asked) < self._threshold:
            self._abort(f"{len(asked)} clients answer, and {self._threshold} are needed")
        answers = [self.answer(holder, listed) for holder in asked]
        total = np.zeros(self._num_words, self._dtype)
        for client in listed:
            seed = self._recover([answer.self_shares[client] for answer in answers])
            _add_stream(total, b"self mask", seed)
        for client in self._clients:
            if client in listed:
                continue
            key = self._recover([answer.pair_shares[client] for answer in answers])
            for peer, seed in self._open_envelope(client, key).items():
                if peer in listed:
                    negative = self._sign_is_negative(peer, client)
                    _add_stream(total, b"pair mask", seed, negative=negative)
        self._end("was opened")
        return total

    def __repr__(self) -> str:
        return f"SecureRound(clients={self._clients}, threshold={self._threshold})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("A SecureRound holds masks that are used once; it is never pickled.")

    def _share_secrets(self, owner: str, client_seed: bytes) -> None:
        """The owner seals its pair seeds, and gives each client a share of b and of the key."""
        party = self._parties[owner]
        key = _shake(b"envelope key", client_seed, 0, SEED_BYTES)
        self._envelopes[owner] = _seal(key, b"".join(party.pair_seeds.values()))
        for label, secret in ((b"self shares", party.self_seed), (b"pair shares", key)):
            # 640 bits modulo a prime of 521: uniform up to 2**-119.
            coefficients = [
                int.from_bytes(_shake(label, client_seed, degree, 80), "little") % PRIME
                for degree in range(1, self._threshold)
            ]
            shares = split(int.from_bytes(secret, "little"), coefficients, len(self._clients))
            for holder, share in zip(self._clients, shares, strict=True):
                held = self._parties[holder]
                (held.self_shares if label == b"self shares" else held.pair_shares)[owner] = share

    def _recover(self, shares: Iterable[Share]) -> bytes:
        secret = reconstruct(shares, self._threshold)
        # Shares of unlike polynomials would give a number of 521 bits.
        if secret.bit_length() > 8 * SEED_BYTES:
            raise ValueError("The shares are not those of one secret: an answer was damaged.")
        return secret.to_bytes(SEED_BYTES, "little")

    def _open_envelope(self, owner: str, key: bytes) -> dict[str, bytes]:
        seeds = _seal(key, self._envelopes[owner])
        peers = [client for client in self._clients if client != owner]
        return {
            peer: seeds[SEED_BYTES * index : SEED_BYTES * (index + 1)]
            for index, peer in enumerate(peers)
        }

    def _sign_is_negative(self, client: str, peer: str) -> bool:
        """Whether `client` subtracts the mask it shares with `peer`."""
        return self._clients.index(peer) < self._clients.index(client)

    def _check_contributors(self, contributors: Iterable[str]) -> list[str]:
        listed = self._known(contributors)
        missing = len(self._clients) - len(listed)
        if missing > self._max_dropouts:
            self._abort(f"{missing} clients are missing, more than {self._max_dropouts}")
        silent = [client for client in listed if not self._parties[client].has_masked]
        if silent:
            raise ValueError(f"Expected contributors that masked a message, {silent} did not.")
        return listed

    def _known(self, names: Iterable[str]) -> list[str]:
        names = list(names)
        unknown = [name for name in names if name not in self._parties]
        if unknown or len(set(names)) != len(names):
            raise ValueError(f"Expected distinct names among {self._clients}, got {names}.")
        return names

    def _check_open(self) -> None:
        if self._over:
            raise RefusedError(f"This round {self._over}. Begin a new one with fresh seeds.")

    def _abort(self, reason: str) -> NoReturn:
        self._end("was aborted")
        raise AbortedRoundError(
            f"The round is aborted, and nothing of it opened: {reason}. Begin a new one with fresh "
            "seeds; raise max_dropouts only together with the noise of each share."
        )

    def _end(self, how: str) -> None:
        """Names stay known; seeds, shares and envelopes are gone."""
        self._over = how
        self._parties = {client: _Party(b"", {}) for client in self._clients}
        self._envelopes = {}


def _shake(label: bytes, seed: bytes, index: int, size: int) -> bytes:
    """SHAKE-256 of the length-prefixed label and seed, and of the block's number."""
    head = bytes([len(label)]) + label + bytes([len(seed)]) + seed + index.to_bytes(8, "little")
    return hashlib.shake_256(_DOMAIN + head).digest(size)


def _add_stream(total: np.ndarray, label: bytes, seed: bytes, *, negative: bool = False) -> None:
    """Adds or subtracts the words of `seed`, little-endian, block by block and modulo 2**bits."""
    for index, start in enumerate(range(0, total.size, _BLOCKWORDS)):
        block = total[start : start + _BLOCKWORDS]
        stream = np.frombuffer(
            _shake(label, seed, index, block.nbytes), total.dtype.newbyteorder("<")
        )
        if negative:
            block -= stream
        else:
            block += stream


def _seal(key: bytes, text: bytes) -> bytes:
    """A one-time pad from `key`; its own inverse."""
    pad = _shake(b"envelope", key, 0, len(text))
    return bytes(a ^ b for a, b in zip(text, pad, strict=True))


def _check_threshold(clients: Sequence[str], max_dropouts: int, threshold: int | None) -> int:
    count = len(clients)
    if count < 2 or len(set(clients)) != count:
        raise ValueError(
            f"Expected 2 or more distinct clients, got {list(clients)}: the sum of one is its "
            "message."
        )
    if max_dropouts < 0 or 2 * (count - max_dropouts) <= count:
        raise ValueError(
            f"Expected 0 <= max_dropouts < {count} / 2, got {max_dropouts=}: more than half of the "
            f"clients must be left to open a secret. Lower it, or gather more clients than {count}."
        )
    if threshold is None:
        return count - max_dropouts
    if not count < 2 * threshold <= 2 * (count - max_dropouts):
        raise ValueError(
            f"Expected {count} / 2 < threshold <= {count - max_dropouts}, got {threshold=}: with "
            "less the clients told one list and those told another could open a message between "
            "them; with more the allowed dropouts could not be made up for."
        )
    return threshold


def _check_seeds(seeds: Iterable[tuple[object, bytes]]) -> None:
    owners: dict[bytes, object] = {}
    for owner, seed in seeds:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"Expected a seed of {SEED_BYTES} bytes for {owner}.")
        if seed in owners:
            raise ValueError(f"{owner} and {owners[seed]} have the same seed; derive one for each.")
        owners[seed] = owner
