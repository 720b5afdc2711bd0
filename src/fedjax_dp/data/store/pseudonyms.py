"""Keyed pseudonyms of slides and patients: names that tell nobody who.

The key is drawn once by the operating system and stays in the store's private folder. Without it a
pseudonym cannot be computed from a name, not even by trying all names.
"""

import csv
import hashlib
import io
import os
import pathlib
import secrets
from collections.abc import Iterable, Sequence

from fedjax_dp.data.store.layout import PRIVATE, StoreError, write_text

_KEY = "pseudonyms.key"


class Pseudonyms:
    """The pseudonyms of one store."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def of_store(cls, folder: pathlib.Path) -> "Pseudonyms":
        """Those of a store; its key is drawn where there is none.

        Raises:
            StoreError: the key is damaged.
        """
        private = private_folder(folder)
        path = private / _KEY
        if not path.exists():
            write_text(path, secrets.token_hex(32) + "\n", 0o600)
        try:
            key = bytes.fromhex(path.read_text(encoding="ascii").strip())
        except ValueError as error:
            raise StoreError(f"Expected a key in hex, got {path}: {error}.") from error
        if len(key) != 32:
            raise StoreError(f"Expected a key of 32 bytes, got {path} with {len(key)}.")
        return cls(key)

    def of_slide(self, name: str) -> str:
        """Pseudonym of a slide, 16 hex digits."""
        return self._of("slide", name)

    def of_patient(self, name: str) -> str:
        """Pseudonym of a patient, 16 hex digits; empty where the name is."""
        return self._of("patient", name) if name else ""

    def _of(self, kind: str, name: str) -> str:
        digest = hashlib.blake2b(key=self._key, digest_size=8, person=kind.encode())
        digest.update(name.encode())
        return digest.hexdigest()


def private_folder(folder: pathlib.Path) -> pathlib.Path:
    """The part of a store that only its owner may read; made where absent."""
    private = folder / PRIVATE
    private.mkdir(parents=True, exist_ok=True)
    os.chmod(private, 0o700)
    return private


def write_private_table(
    path: pathlib.Path, header: Sequence[str], rows: Iterable[Sequence[object]]
) -> None:
    """Writes a CSV that only the owner may read, whole or not at all."""
    write_text(path, table_text(header, rows), 0o600)


def table_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """CSV text with a header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
