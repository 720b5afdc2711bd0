import itertools
import os
import pickle
import stat

import numpy as np
import pytest

from fedjax_dp.privacy.secrets import (
    SERVER,
    SERVER_PURPOSES,
    DistinctDerivations,
    Purpose,
    Secrets,
)

CLIENTS = ["A", "B", "AB"]
OF_CLIENTS = [purpose for purpose in Purpose if purpose not in SERVER_PURPOSES]


def test_every_name_derives_its_own_seed():
    recorder = DistinctDerivations()
    secrets = Secrets.from_seed(CLIENTS, 0, recorder=recorder)
    for client, index, purpose, nonce in itertools.product(
        CLIENTS, range(12), OF_CLIENTS, range(3)
    ):
        secrets.derive(client, index, purpose, nonce)
    for index in range(12):
        for purpose in SERVER_PURPOSES:
            secrets.derive(SERVER, index, purpose)
    of_server = 12 * len(SERVER_PURPOSES)
    assert len(recorder.seen) == 3 * 12 * len(OF_CLIENTS) * 3 + of_server


def test_the_recorder_sees_a_second_use():
    secrets = Secrets.from_seed(CLIENTS, 0, recorder=DistinctDerivations())
    secrets.key_data("A", 3, Purpose.NOISE)
    secrets.key_data("A", 4, Purpose.NOISE)
    with pytest.raises(AssertionError, match="twice"):
        secrets.rng("A", 3, Purpose.NOISE)


def test_fields_cannot_be_shifted_into_one_another():
    secrets = Secrets.from_seed(CLIENTS, 0)
    contexts = [b"", b"1", b"11", bytes(8)]
    digests = {
        secrets.derive("A", index, Purpose.NOISE, nonce, context)
        for index, nonce, context in itertools.product((1, 11, 111), (1, 11, 111), contexts)
    }
    assert len(digests) == 9 * len(contexts)


def test_kinds_of_use_share_no_bits():
    secrets = Secrets.from_seed(CLIENTS, 0)
    raw = secrets.derive("A", 0, Purpose.NOISE)[:8]
    assert secrets.key_data("A", 0, Purpose.NOISE).tobytes() != raw


def test_a_seed_reproduces_and_says_it_is_not_private():
    first, again, other = (Secrets.from_seed(CLIENTS, seed) for seed in (7, 7, 8))
    assert not first.is_private
    assert first.derive("A", 0, Purpose.NOISE) == again.derive("A", 0, Purpose.NOISE)
    assert first.derive("A", 0, Purpose.NOISE) != other.derive("A", 0, Purpose.NOISE)
    with pytest.raises(ValueError, match="seed"):
        Secrets.from_seed(CLIENTS, -1)


def test_seeds_beyond_32_bits_differ():
    small, large = (Secrets.from_seed(["A"], seed) for seed in (5, 2**32 + 5))
    assert small.derive("A", 0, Purpose.NOISE) != large.derive("A", 0, Purpose.NOISE)


def test_a_client_that_leaves_moves_nobody():
    all_of_them, fewer = Secrets.from_seed(CLIENTS, 0), Secrets.from_seed(["AB", "A"], 0)
    for client in ("A", "AB"):
        expected = all_of_them.rng(client, 2, Purpose.SAMPLING).random(4)
        np.testing.assert_array_equal(fewer.rng(client, 2, Purpose.SAMPLING).random(4), expected)


def test_generated_secrets_are_private_and_differ():
    first, second = Secrets.generate(CLIENTS), Secrets.generate(CLIENTS)
    assert first.is_private
    digests = {s.derive(c, 0, Purpose.NOISE) for s in (first, second) for c in CLIENTS}
    assert len(digests) == 6


def test_key_data_is_two_words_of_32_bits():
    data = np.stack(
        [Secrets.from_seed(["A"], 0).key_data("A", i, Purpose.NOISE) for i in range(200)]
    )
    assert data.dtype == np.uint32
    assert data.shape == (200, 2)
    bits = np.unpackbits(data.view(np.uint8))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(bits.size)


@pytest.mark.parametrize(
    ("client", "index", "purpose", "nonce", "message"),
    [
        ("C", 0, Purpose.NOISE, 0, "No secret"),
        ("A", -1, Purpose.NOISE, 0, "integer"),
        ("A", 0, Purpose.NOISE, -1, "integer"),
        ("A", 0.5, Purpose.NOISE, 0, "integer"),
        ("A", 0, Purpose.COHORT, 0, "purpose"),
        (SERVER, 0, Purpose.NOISE, 0, "purpose"),
        ("A", 0, "noise", 0, "Purpose"),
    ],
)
def test_bad_names_are_refused(client, index, purpose, nonce, message):
    with pytest.raises(ValueError, match=message):
        Secrets.from_seed(CLIENTS, 0).derive(client, index, purpose, nonce)


def test_save_and_load_keep_every_secret(tmp_path):
    path = tmp_path / "secrets"
    secrets = Secrets.generate(CLIENTS)
    previous = os.umask(0)
    try:
        secrets.save(path)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["secrets"]
    loaded = Secrets.load(path, CLIENTS)
    assert loaded.is_private
    for client in CLIENTS:
        assert loaded.derive(client, 1, Purpose.NOISE) == secrets.derive(client, 1, Purpose.NOISE)
    assert loaded.derive(SERVER, 1, Purpose.COHORT) == secrets.derive(SERVER, 1, Purpose.COHORT)


def test_secrets_are_never_overwritten(tmp_path):
    path = tmp_path / "secrets"
    Secrets.generate(CLIENTS).save(path)
    with pytest.raises(FileExistsError):
        Secrets.generate(CLIENTS).save(path)


def test_a_save_that_was_killed_leaves_no_secrets_behind(tmp_path):
    (tmp_path / "secrets.partial").write_bytes(b"half")
    Secrets.from_seed(CLIENTS, 0).save(tmp_path / "secrets")
    assert not Secrets.load(tmp_path / "secrets", CLIENTS).is_private


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_readable_secrets_are_refused(tmp_path, mode):
    path = tmp_path / "secrets"
    Secrets.generate(CLIENTS).save(path)
    path.chmod(mode)
    with pytest.raises(PermissionError, match="0600"):
        Secrets.load(path, CLIENTS)


def test_damaged_or_foreign_secrets_are_refused(tmp_path):
    path = tmp_path / "secrets"
    Secrets.generate(CLIENTS).save(path)
    body = path.read_bytes()
    with pytest.raises(ValueError, match="other clients"):
        Secrets.load(path, ["B", "A", "AB"])
    with pytest.raises(ValueError, match="bytes of secrets"):
        Secrets.load(path, ["A", "B"])
    path.write_bytes(body[:-1])
    with pytest.raises(ValueError, match="bytes of secrets"):
        Secrets.load(path, CLIENTS)
    path.write_bytes(body[:60] + bytes([body[60] ^ 1]) + body[61:])
    with pytest.raises(ValueError, match="checksum"):
        Secrets.load(path, CLIENTS)


def test_destroy_overwrites_removes_and_forgets(tmp_path):
    path, witness = tmp_path / "secrets", tmp_path / "witness"
    secrets = Secrets.generate(CLIENTS)
    secrets.save(path)
    os.link(path, witness)  # a second name of the same bytes shows that they were overwritten
    secrets.destroy(path)
    assert not path.exists()
    assert not any(witness.read_bytes())
    with pytest.raises(ValueError, match="No secret"):
        secrets.derive("A", 0, Purpose.NOISE)


def test_secrets_are_neither_printed_nor_pickled():
    secrets = Secrets({"A": b"s" * 32, SERVER: b"t" * 32}, is_private=True)
    assert "ssss" not in repr(secrets)
    with pytest.raises(TypeError, match="never pickled"):
        pickle.dumps(secrets)
