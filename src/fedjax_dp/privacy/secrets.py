"""Secret randomness: one 256-bit secret per client, and every seed derived from it by name.

A seed is the keyed BLAKE2b hash of (client, round, purpose, nonce, context), so resuming,
reordering or leaving a client out can never give two events the same randomness or change anyone's.
"""

import enum
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

SERVER = "\x00server"
"""Owner of the server's secret; no site's name can be this."""

SECRET_BYTES = 32
_PERSON = b"fedjax_dp secret"  # 16 bytes: BLAKE2b's domain
_MAGIC = b"fedjax_dp secrets v1\n"


class Purpose(enum.Enum):
    """What a seed is for; two purposes never share randomness."""

    SAMPLING = "sampling"
    NOISE = "noise"
    AUGMENTATION = "augmentation"
    MASK = "mask"
    INTEGER_NOISE = "integer noise"
    COHORT = "cohort"
    DROPOUT = "dropout"
    SERVER_NOISE = "server noise"


SERVER_PURPOSES = (Purpose.COHORT, Purpose.DROPOUT, Purpose.SERVER_NOISE)


class Derivation(NamedTuple):
    """One derived seed, as a recorder sees it."""

    client: str
    round_index: int
    purpose: Purpose
    nonce: int
    context: bytes
    kind: str
    digest: bytes


class DistinctDerivations:
    """A recorder for tests that refuses a second use of the same (client, round, purpose, nonce).

    Example:
        >>> secrets = Secrets.from_seed(["a"], 0, recorder=DistinctDerivations())
        >>> _ = secrets.derive("a", 0, Purpose.NOISE)
    """

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int, Purpose, int], Derivation] = {}
        self._digests: set[bytes] = set()

    def __call__(self, derivation: Derivation) -> None:
        """Notes `derivation`; raises AssertionError where its name or its value was seen."""
        name = derivation[:4]
        if name in self.seen or derivation.digest in self._digests:
            raise AssertionError(f"Randomness of {name} was derived twice.")
        self.seen[name] = derivation
        self._digests.add(derivation.digest)


class Secrets:
    """The secrets of all clients and of the server; never printed, never pickled.

    Guarantees:
        Fields are length-prefixed, so unlike fields never hash alike. Seeds of unlike fields are
        independent to anyone without the secret, as far as BLAKE2b is a pseudo-random function.
        What is drawn FROM a seed is weaker: a threefry key holds 64 of the 256 bits, and NumPy's
        Philox is keyed by 128 bits but is no cryptographic generator. The statement says so.

    Attributes:
        is_private: False where the secrets follow from an integer seed: then anyone who knows the
            seed can subtract the noise, and no guarantee holds.
    """

    def __init__(
        self,
        secrets: Mapping[str, bytes],
        *,
        is_private: bool,
        recorder: Callable[[Derivation], None] | None = None,
    ) -> None:
        for owner, secret in secrets.items():
            if len(secret) != SECRET_BYTES:
                raise ValueError(f"Expected {SECRET_BYTES} secret bytes for {owner!r}.")
        if SERVER not in secrets:
            raise ValueError("Expected a secret of the server beside the clients'.")
        self._secrets = dict(secrets)
        self._recorder = recorder
        self.is_private = is_private

    @classmethod
    def generate(
        cls, clients: Iterable[str], *, recorder: Callable[[Derivation], None] | None = None
    ) -> "Secrets":
        """Fresh secrets from the operating system."""
        owners = [*_check_names(clients), SERVER]
        return cls(
            {owner: os.urandom(SECRET_BYTES) for owner in owners},
            is_private=True,
            recorder=recorder,
        )

    @classmethod
    def from_seed(
        cls,
        clients: Iterable[str],
        seed: int,
        *,
        recorder: Callable[[Derivation], None] | None = None,
    ) -> "Secrets":
        """Secrets that follow from `seed` >= 0 and each name alone: reproducible, NOT private."""
        if seed < 0:
            raise ValueError(
                f"Expected seed >= 0, got {seed=}. Use Secrets.generate for secret randomness."
            )
        owners = [*_check_names(clients), SERVER]
        return cls(
            {
                owner: _hash(b"", [b"seed", _integer(seed), owner.encode()], SECRET_BYTES)
                for owner in owners
            },
            is_private=False,
            recorder=recorder,
        )

    @property
    def clients(self) -> tuple[str, ...]:
        """Names of the clients that own a secret."""
        return tuple(owner for owner in self._secrets if owner != SERVER)

    def derive(
        self,
        client: str,
        round_index: int,
        purpose: Purpose,
        nonce: int = 0,
        context: bytes = b"",
    ) -> bytes:
        """The 32 bytes that belong to (client, round, purpose, nonce, context).

        Args:
            client: the site's name, or `SERVER` for its own purposes.
            round_index: the round, >= 0.
            purpose: what it is for; `SERVER_PURPOSES` are the server's, all others the clients'.
            nonce: of the round's write-ahead charge, >= 0; see `ledger.ChargeLog.charge`.
            context: hash of the data and the configuration.

        Raises:
            ValueError: an unknown client, a negative number or a purpose that is not the client's.
        """
        return self._derive(client, round_index, purpose, nonce, context, kind="bytes")

    def rng(
        self,
        client: str,
        round_index: int,
        purpose: Purpose,
        nonce: int = 0,
        context: bytes = b"",
    ) -> np.random.Generator:
        """A host generator: Philox keyed by 128 derived bits. Arguments as for `derive`."""
        digest = self._derive(client, round_index, purpose, nonce, context, kind="philox")
        key = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
        return np.random.Generator(np.random.Philox(key=key))

    def key_data(
        self,
        client: str,
        round_index: int,
        purpose: Purpose,
        nonce: int = 0,
        context: bytes = b"",
    ) -> np.ndarray:
        """uint32 [2]: data of a threefry key, 64 derived bits. Arguments as for `derive`.

        Wrap it with `jax.random.wrap_key_data`, never `jax.random.key(int)`, which keeps 32 bits.
        """
        digest = self._derive(client, round_index, purpose, nonce, context, kind="threefry")
        return np.frombuffer(digest[:8], dtype="<u4").astype(np.uint32)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the secrets durably into a new file that only its owner may read.

        Args:
            path: must not exist; secrets are never overwritten.

        Raises:
            FileExistsError: `path` exists.
        """
        path = Path(path)
        if path.exists():
            raise FileExistsError(f"Secrets exist at {path}; load them, or destroy them first.")
        body = _MAGIC + bytes([self.is_private]) + len(self.clients).to_bytes(4, "little")
        body += self._secrets[SERVER]
        for client in self.clients:
            body += _name_hash(client) + self._secrets[client]
        body += hashlib.blake2b(body, digest_size=16).digest()
        # Killed here, a partial file must not pass for the secrets: write beside, then rename.
        partial = path.with_name(path.name + ".partial")
        partial.unlink(missing_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, path)
        _sync_directory(path.parent)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        clients: Iterable[str],
        *,
        recorder: Callable[[Derivation], None] | None = None,
    ) -> "Secrets":
        """Reads what `save` wrote, for the same clients in the same order.

        Raises:
            PermissionError: others than the owner may read or write the file.
            ValueError: the file is damaged or belongs to other clients.
        """
        path = Path(path)
        clients = _check_names(clients)
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise PermissionError(
                    f"Expected mode 0600 of {path}, got {mode:04o}: others may have read the "
                    "secrets. Start a new run in a new workdir."
                )
            body = file.read()
        head = len(_MAGIC) + 5
        size = head + SECRET_BYTES + 2 * SECRET_BYTES * len(clients) + 16
        if len(body) != size or not body.startswith(_MAGIC):
            raise ValueError(
                f"Expected {size} bytes of secrets for {len(clients)} clients in {path}, got "
                f"{len(body)}. The file is damaged or of another run."
            )
        if hashlib.blake2b(body[:-16], digest_size=16).digest() != body[-16:]:
            raise ValueError(f"The checksum of the secrets in {path} fails: the file is damaged.")
        secrets = {}
        for index, client in enumerate(clients):
            start = head + SECRET_BYTES * (1 + 2 * index)
            if body[start : start + SECRET_BYTES] != _name_hash(client):
                raise ValueError(f"The secrets in {path} belong to other clients than {client!r}.")
            secrets[client] = body[start + SECRET_BYTES : start + 2 * SECRET_BYTES]
        secrets[SERVER] = body[head : head + SECRET_BYTES]
        return cls(secrets, is_private=bool(body[len(_MAGIC)]), recorder=recorder)

    def destroy(self, path: str | os.PathLike[str] | None = None) -> None:
        """Forgets the secrets, and overwrites and removes their file where there is one.

        A journalling file system or a flash disk may keep an old copy; no program can promise more.
        """
        self._secrets = {}
        if path is None or not Path(path).exists():
            return
        path = Path(path)
        with path.open("r+b") as file:
            file.write(bytes(os.fstat(file.fileno()).st_size))
            file.flush()
            os.fsync(file.fileno())
        path.unlink()
        _sync_directory(path.parent)

    def __repr__(self) -> str:
        return f"Secrets(clients={self.clients}, is_private={self.is_private})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("Secrets are saved by Secrets.save alone, never pickled.")

    def _derive(
        self,
        client: str,
        round_index: int,
        purpose: Purpose,
        nonce: int,
        context: bytes,
        *,
        kind: str,
    ) -> bytes:
        if client not in self._secrets:
            raise ValueError(f"No secret of {client=}; known are {self.clients}.")
        if not isinstance(purpose, Purpose):
            raise ValueError(f"Expected a Purpose, got {purpose=}.")
        if (client == SERVER) != (purpose in SERVER_PURPOSES):
            raise ValueError(f"{purpose} is not a purpose of {client!r}.")
        fields = [
            kind.encode(),
            client.encode(),
            _integer(round_index),
            purpose.value.encode(),
            _integer(nonce),
            bytes(context),
        ]
        digest = _hash(self._secrets[client], fields, SECRET_BYTES)
        if self._recorder is not None:
            self._recorder(
                Derivation(client, round_index, purpose, nonce, bytes(context), kind, digest)
            )
        return digest


def _hash(key: bytes, fields: Iterable[bytes], size: int) -> bytes:
    """Keyed BLAKE2b of `fields`, each preceded by its length as 8 bytes."""
    state = hashlib.blake2b(key=key, digest_size=size, person=_PERSON)
    for field in fields:
        state.update(len(field).to_bytes(8, "little"))
        state.update(field)
    return state.digest()


def _integer(value: int) -> bytes:
    if isinstance(value, bool) or int(value) != value or value < 0:
        raise ValueError(f"Expected an integer >= 0 as round, nonce or seed, got {value!r}.")
    return str(int(value)).encode()


def _name_hash(client: str) -> bytes:
    return _hash(b"", [b"name", client.encode()], SECRET_BYTES)


def _check_names(clients: Iterable[str]) -> list[str]:
    names = list(clients)
    if len(set(names)) != len(names) or SERVER in names:
        raise ValueError(f"Expected distinct names of clients, got {names}.")
    return names


def _sync_directory(path: Path) -> None:
    """Makes a rename or an unlink in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
