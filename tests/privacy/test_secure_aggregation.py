import collections
import hashlib
import itertools
import pickle

import numpy as np
import pytest
from scipy import stats

from fedjax_dp.privacy import secure_aggregation
from fedjax_dp.privacy.fixed_point import fixed_point
from fedjax_dp.privacy.secret_sharing import PRIME, reconstruct, split
from fedjax_dp.privacy.secure_aggregation import (
    SEED_BYTES,
    AbortedRoundError,
    RefusedError,
    SecureRound,
    agree,
)

NAMES = ["Aachen", "Basel", "Cork", "Delft", "Essen", "Faro"]
DTYPES = {32: np.uint32, 64: np.uint64}
MOST_DROPOUTS = {2: 0, 3: 1, 6: 2}
LEVEL = 1e-6  # probability that one assertion about sound randomness fails; the seeds are fixed


def derived(*names):
    return hashlib.blake2b(repr(names).encode(), digest_size=SEED_BYTES).digest()


def begin(num_clients, *, nonce=0, num_words=5, max_dropouts=0, **options):
    return SecureRound(
        NAMES[:num_clients],
        client_seed=lambda u: derived(nonce, u),
        pair_seed=lambda u, v: agree(derived(nonce, u, v), derived(nonce, v, u)),
        num_words=num_words,
        max_dropouts=max_dropouts,
        **options,
    )


def random_words(num_clients, num_words, word_bits, seed=0):
    rng = np.random.default_rng(seed)
    high = np.iinfo(DTYPES[word_bits]).max
    return {
        name: rng.integers(0, high, num_words, DTYPES[word_bits], endpoint=True)
        for name in NAMES[:num_clients]
    }


def modular_sum(messages):
    stacked = np.stack(list(messages))
    return np.sum(stacked, axis=0, dtype=stacked.dtype)


def stream(label, seed, num_words, word_bits=32):
    """The words of a seed, written a second time: blocks of 65536 words, each of its own hash."""
    data = b""
    for block in range(-(-num_words // 65536)):
        head = b"fedjax_dp secure aggregation v1\n"
        head += bytes([len(label)]) + label + bytes([len(seed)]) + seed
        size = min(65536, num_words - 65536 * block) * word_bits // 8
        data += hashlib.shake_256(head + block.to_bytes(8, "little")).digest(size)
    return np.frombuffer(data, f"<u{word_bits // 8}").astype(DTYPES[word_bits])


def self_seed(client, nonce=0):
    return stream(b"self seed", derived(nonce, client), SEED_BYTES // 4).tobytes()


def assert_uniform(words):
    """Chi-square of every byte of the words, each at its share of the level."""
    width = words.dtype.itemsize
    places = words.view(np.uint8).reshape(-1, width) + 256 * np.arange(width)
    counts = np.bincount(places.ravel(), minlength=256 * width).reshape(width, 256)
    p_value = stats.chisquare(counts, axis=1).pvalue.min()
    assert p_value > LEVEL / width, f"bytes are not uniform, {p_value=}"


def assert_jointly_uniform(messages):
    """Every combination of the messages with coefficients -1, 0, 1 is uniform.

    And so are the pairs of their highest four bits, which no sum of the two shows.
    """
    for signs in itertools.product((0, 1, -1), repeat=len(messages)):
        if next((s for s in signs if s), -1) == 1:  # one of each pair of opposites
            signed = zip(signs, messages, strict=True)
            assert_uniform(modular_sum(m if s == 1 else np.negative(m) for s, m in signed if s))
    for left, right in itertools.combinations(messages, 2):
        shift = 8 * left.dtype.itemsize - 4
        cells = ((left >> shift) * 16 + (right >> shift)).astype(np.int64)
        p_value = stats.chisquare(np.bincount(cells, minlength=256)).pvalue
        assert p_value > LEVEL, f"pairs are not uniform, {p_value=}"


# The sum.


@pytest.mark.parametrize("word_bits", [32, 64])
@pytest.mark.parametrize("num_clients", [2, 3, 6])
def test_what_is_unmasked_is_exactly_the_sum(num_clients, word_bits):
    words = random_words(num_clients, 5, word_bits)
    most = MOST_DROPOUTS[num_clients]
    opened = 0
    for allowed in range(most + 1):
        for num_dropped in range(allowed + 1):
            for dropped in itertools.combinations(words, num_dropped):
                session = begin(num_clients, word_bits=word_bits, max_dropouts=allowed)
                # Those who drop out have masked a message too; it is lost on the way.
                messages = {name: session.masked(name, words[name]) for name in words}
                there = [name for name in words if name not in dropped]
                total = modular_sum(messages[name] for name in there) - session.unmask(there)
                np.testing.assert_array_equal(total, modular_sum(words[n] for n in there))
                assert total.dtype == DTYPES[word_bits]
                opened += 1
    assert opened == {2: 1, 3: 1 + 4, 6: 1 + 7 + 22}[num_clients]


def test_the_order_of_the_contributors_does_not_matter():
    words = random_words(6, 5, 32)
    session = begin(6, max_dropouts=1)
    messages = {name: session.masked(name, words[name]) for name in NAMES}
    there = ["Faro", "Basel", "Essen", "Aachen", "Delft"]
    total = modular_sum(messages[name] for name in there) - session.unmask(there)
    np.testing.assert_array_equal(total, modular_sum(words[name] for name in there))


def test_every_threshold_opens_with_just_so_many_answers():
    words = random_words(6, 5, 32)
    there = NAMES[1:5]
    expected = modular_sum(words[name] for name in there)
    for threshold, responders in ((4, there), (4, there[::-1]), (None, None)):
        session = begin(6, max_dropouts=2, threshold=threshold)
        total = modular_sum([session.masked(name, words[name]) for name in there])
        total -= session.unmask(there, responders=responders)
        np.testing.assert_array_equal(total, expected)
    session = begin(6, max_dropouts=1, threshold=4)  # five messages, and one of them falls silent
    total = modular_sum([session.masked(name, words[name]) for name in NAMES[:5]])
    total -= session.unmask(NAMES[:5], responders=NAMES[1:5])
    np.testing.assert_array_equal(total, modular_sum(words[name] for name in NAMES[:5]))


@pytest.mark.parametrize("word_bits", [32, 64])
def test_a_mask_is_its_formula(word_bits):
    num_words = 65536 + 3  # more than a block
    session = begin(3, num_words=num_words, word_bits=word_bits)
    pair = {
        (u, v): stream(
            b"pair mask", agree(derived(0, u, v), derived(0, v, u)), num_words, word_bits
        )
        for u, v in itertools.combinations(NAMES[:3], 2)
    }
    first, middle, last = NAMES[:3]
    own = stream(b"self mask", self_seed(middle), num_words, word_bits)
    expected = own + pair[middle, last] - pair[first, middle]
    np.testing.assert_array_equal(session.mask(middle), expected)


def test_what_the_server_subtracts_comes_from_shares_alone():
    words = random_words(3, 5, 32)
    session = begin(3, max_dropouts=1)
    there = NAMES[:2]
    total = modular_sum([session.masked(name, words[name]) for name in there])
    for party in session._parties.values():
        party.self_seed = b"gone"
        party.pair_seeds.clear()
    total -= session.unmask(there)
    np.testing.assert_array_equal(total, modular_sum(words[name] for name in there))


def test_a_share_of_another_secret_is_seen():
    session = begin(3)
    for name in NAMES[:3]:
        session.mask(name)
    party = session._parties["Basel"]
    party.self_shares["Cork"] = party.pair_shares["Cork"]
    with pytest.raises(ValueError, match="damaged"):
        session.unmask(NAMES[:3])


def test_an_envelope_is_sealed_until_its_key_is_known():
    pads = set()
    for nonce in range(2):
        session = begin(3, nonce=nonce)
        for owner in NAMES[:3]:
            sealed, peers = session._envelopes[owner], [n for n in NAMES[:3] if n != owner]
            for index, peer in enumerate(peers):
                plain = agree(derived(nonce, owner, peer), derived(nonce, peer, owner))
                part = sealed[SEED_BYTES * index : SEED_BYTES * (index + 1)]
                pads.add(int.from_bytes(part, "little") ^ int.from_bytes(plain, "little"))
    assert len(pads) == 2 * 3 * 2  # no pad twice
    assert min(pads).bit_length() > 200  # of 256


# What a server sees.


@pytest.mark.parametrize(
    ("num_clients", "word_bits"), [(2, 32), (2, 64), (3, 32), (3, 64), (6, 32)]
)
@pytest.mark.parametrize("plain", [0, 2**31 - 1])
def test_messages_are_jointly_uniform_whatever_they_say(num_clients, word_bits, plain):
    session = begin(num_clients, num_words=4096, word_bits=word_bits)
    words = np.full(4096, plain, DTYPES[word_bits])
    messages = [session.masked(name, words) for name in NAMES[:num_clients]]
    assert_jointly_uniform(messages)  # before the answers, all of them


@pytest.mark.parametrize("num_clients", [2, 3, 6])
def test_after_the_opening_any_proper_subset_is_still_uniform(num_clients):
    """The server knows the own masks by then; the masks of the pairs remain."""
    names = NAMES[:num_clients]
    session = begin(num_clients, num_words=4096)
    words = np.full(4096, 7, np.uint32)
    seen = [
        session.masked(name, words) - stream(b"self mask", self_seed(name), 4096) for name in names
    ]
    for size in range(1, num_clients):
        for subset in itertools.combinations(seen, size):
            assert_uniform(modular_sum(subset))
    assert_jointly_uniform(seen[1:])
    np.testing.assert_array_equal(modular_sum(seen), np.full(4096, 7 * num_clients))
    with pytest.raises(AssertionError):  # the full set opens: the test has power
        assert_jointly_uniform(seen)


def test_the_joint_test_sees_what_single_messages_hide():
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 2**32, 4096, np.uint32)
    assert_uniform(mask)
    for other in (mask, np.negative(mask), mask * np.uint32(3)):
        assert_uniform(other)
        with pytest.raises(AssertionError):
            assert_jointly_uniform([mask, other])


def test_a_mask_is_fresh_each_round():
    plain = [np.full(4096, value, np.uint32) for value in (3, 10)]
    first, second = (
        begin(3, num_words=4096, nonce=nonce).masked("Basel", words)
        for nonce, words in enumerate(plain)
    )
    assert_uniform(second - first)
    reused, again = (begin(3, num_words=4096).masked("Basel", words) for words in plain)
    np.testing.assert_array_equal(again - reused, np.full(4096, 7))
    with pytest.raises(AssertionError):  # one mask for two messages gives away their difference
        assert_uniform(again - reused)


def test_a_round_masks_one_message_of_a_client():
    session = begin(3)
    session.mask("Basel")
    for call in (session.mask, lambda name: session.masked(name, np.zeros(5, np.uint32))):
        with pytest.raises(RefusedError, match="was used"):
            call("Basel")


def test_a_round_opens_once():
    session = begin(3)
    for name in NAMES[:3]:
        session.mask(name)
    session.unmask(NAMES[:3])
    assert_over(session, "was opened")


def assert_over(session, how):
    for call in (
        lambda: session.mask(NAMES[0]),
        lambda: session.answer(NAMES[0], NAMES[:3]),
        lambda: session.unmask(NAMES[:3]),
    ):
        with pytest.raises(RefusedError, match=how):
            call()
    for party in session._parties.values():
        assert not party.self_seed
        assert not party.pair_seeds
        assert not party.self_shares
        assert not party.pair_shares
    assert not session._envelopes


# Dropouts.


@pytest.mark.parametrize("num_clients", [2, 3, 6])
def test_one_dropout_too_many_aborts_for_good(num_clients):
    most = MOST_DROPOUTS[num_clients]
    for allowed in range(most + 1):
        there = NAMES[: num_clients - allowed - 1]
        for ask in (SecureRound.unmask, lambda session, names: session.answer(names[0], names)):
            session = begin(num_clients, max_dropouts=allowed)
            for name in NAMES[:num_clients]:
                session.mask(name)
            with pytest.raises(AbortedRoundError, match="missing"):
                ask(session, there)
            assert_over(session, "was aborted")


def test_too_few_answers_abort_for_good():
    session = begin(6, max_dropouts=1, threshold=4)
    for name in NAMES:
        session.mask(name)
    with pytest.raises(AbortedRoundError, match="4 are needed"):
        session.unmask(NAMES, responders=NAMES[:3])
    assert_over(session, "was aborted")


def test_nobody_answers_two_lists():
    session = begin(6, max_dropouts=2)
    for name in NAMES:
        session.mask(name)
    first = session.answer("Basel", NAMES[:5])
    assert set(first.self_shares) == set(NAMES[:5])
    assert set(first.pair_shares) == {"Faro"}
    assert session.answer("Basel", NAMES[4::-1]) == first  # the same question, the same answer
    for names in (NAMES, NAMES[:4], NAMES[1:]):
        with pytest.raises(RefusedError, match="both secrets"):
            session.answer("Basel", names)
    with pytest.raises(RefusedError, match="not on the list"):
        session.answer("Faro", NAMES[:5])
    with pytest.raises(RefusedError, match="both secrets"):
        session.unmask(NAMES)


def test_no_answer_holds_both_secrets_of_a_client():
    for dropped in itertools.combinations(NAMES, 2):
        session = begin(6, max_dropouts=2)
        for name in NAMES:
            session.mask(name)
        there = [name for name in NAMES if name not in dropped]
        answer = session.answer(there[0], there)
        assert set(answer.self_shares) == set(there)
        assert set(answer.pair_shares) == set(dropped)


def test_a_false_dropout_does_not_open_the_late_message():
    session = begin(3, num_words=4096, max_dropouts=1)
    late, *others = NAMES[:3]
    plain = np.full(4096, 7, np.uint32)
    message = session.masked(late, plain)
    for name in others:
        session.mask(name)
    answers = [session.answer(name, others) for name in others]
    key = reconstruct([answer.pair_shares[late] for answer in answers], session.threshold)
    seeds = session._open_envelope(late, key.to_bytes(SEED_BYTES, "little"))
    for name in others:  # the server strips all masks it has learned; `late` is the first name
        message -= stream(b"pair mask", seeds[name], 4096)
    assert_uniform(message)
    for name in others:
        with pytest.raises(RefusedError, match="both secrets"):
            session.answer(name, NAMES[:3])
    share = session.answer(late, NAMES[:3]).self_shares[late]  # only it was not asked yet
    with pytest.raises(ValueError, match="say nothing"):
        reconstruct([share], session.threshold)
    # With pair masks alone, which is what double masking is for, the message would lie open.
    opened = message - stream(b"self mask", self_seed(late), 4096)
    np.testing.assert_array_equal(opened, plain)
    with pytest.raises(AssertionError):
        assert_uniform(opened)


def two_lists(session):
    """Shares of both secrets of the last client from clients that were told unlike lists."""
    for name in NAMES:
        session.mask(name)
    told_all = [session.answer(name, NAMES) for name in NAMES[3:]]
    told_less = [session.answer(name, NAMES[:5]) for name in NAMES[:3]]
    return (
        [answer.self_shares["Faro"] for answer in told_all],
        [answer.pair_shares["Faro"] for answer in told_less],
    )


def test_no_two_lists_open_both_secrets_of_a_client(monkeypatch):
    session = begin(6, max_dropouts=2, threshold=4)
    for shares in two_lists(session):
        with pytest.raises(ValueError, match="say nothing"):
            reconstruct(shares, session.threshold)
    # A threshold of half the clients, which is refused, would give the server both.
    monkeypatch.setattr(secure_aggregation, "_check_threshold", lambda *_: 3)
    own, key = (reconstruct(shares, 3) for shares in two_lists(begin(6, max_dropouts=2)))
    assert own.to_bytes(SEED_BYTES, "little") == self_seed("Faro")
    assert max(own.bit_length(), key.bit_length()) <= 8 * SEED_BYTES


# Shares.


def test_fewer_shares_than_the_threshold_say_nothing():
    """Over all polynomials of a small field, two of four shares with threshold three."""
    prime, num_shares = 7, 4

    def distribution(secret, points):
        return collections.Counter(
            tuple(split(secret, coefficients, num_shares, prime)[p].value for p in points)
            for coefficients in itertools.product(range(prime), repeat=2)
        )

    for points in itertools.combinations(range(num_shares), 2):
        for secret in range(prime):
            found = distribution(secret, points)
            assert len(found) == prime**2
            assert set(found.values()) == {1}
    three = [distribution(secret, (0, 1, 2)) for secret in range(prime)]
    assert all(not a & b for a, b in itertools.combinations(three, 2))  # three say everything


def test_any_shares_of_the_threshold_give_the_secret():
    rng = np.random.default_rng(0)
    secret, *coefficients = (int.from_bytes(rng.bytes(65), "little") % PRIME for _ in range(4))
    shares = split(secret, coefficients, 7)
    for chosen in itertools.permutations(shares, 4):
        assert reconstruct(chosen, 4) == secret
    assert reconstruct(shares, 4) == secret
    assert reconstruct(shares, 3) != secret
    for few in (shares[:3], [shares[0]] * 4):
        with pytest.raises(ValueError, match="Ask more"):
            reconstruct(few, 4)


def test_every_sharing_has_its_own_polynomial():
    """With a threshold of two the line's slope is its one coefficient."""
    slopes, secrets = set(), set()
    for nonce in range(4):
        session = begin(3, nonce=nonce, max_dropouts=1)
        holders = [session._parties[name] for name in NAMES[:2]]
        for kind, owner in itertools.product(("self_shares", "pair_shares"), NAMES[:3]):
            one, two = (getattr(holder, kind)[owner].value for holder in holders)
            slopes.add((two - one) % PRIME)
            secrets.add((2 * one - two) % PRIME)
    assert len(slopes) == len(secrets) == 4 * 2 * 3
    assert min(slopes).bit_length() > 500  # of 521; one in 2**16 draws of 24 would be shorter


@pytest.mark.parametrize(
    ("secret", "num_shares", "prime"), [(7, 4, 7), (-1, 4, 7), (1, 7, 7), (1, 2, 7)]
)
def test_sharing_refuses_what_no_field_holds(secret, num_shares, prime):
    with pytest.raises(ValueError, match="num_shares"):
        split(secret, [1, 2], num_shares, prime)


def test_a_pair_agrees_in_either_order():
    a, b, c = (derived(name) for name in "abc")
    assert agree(a, b) == agree(b, a)
    assert len({agree(a, b), agree(a, c), agree(b, c), a, b, c}) == 6
    with pytest.raises(ValueError, match="32 bytes"):
        agree(a, b"short")


# What is refused.


@pytest.mark.parametrize(
    ("names", "options", "match"),
    [
        (["A"], {}, "2 or more"),
        ([], {}, "2 or more"),
        (["A", "B", "A"], {}, "distinct"),
        (["A", "B"], {"max_dropouts": 1}, "max_dropouts < 2 / 2"),
        (NAMES, {"max_dropouts": 3}, "more than half"),
        (NAMES, {"max_dropouts": -1}, "max_dropouts=-1"),
        (NAMES, {"max_dropouts": 1, "threshold": 3}, "threshold=3"),
        (NAMES, {"max_dropouts": 1, "threshold": 6}, "made up for"),
        (NAMES, {"word_bits": 16}, "word_bits=16"),
        (NAMES, {"num_words": 0}, "num_words=0"),
        (NAMES, {"client_seed": lambda u: bytes(32)}, "same seed"),
        (NAMES, {"pair_seed": lambda u, v: derived(u)}, "same seed"),
        (NAMES, {"client_seed": lambda u: b"short"}, "32 bytes"),
    ],
)
def test_rounds_that_protect_nobody_are_refused(names, options, match):
    options = {
        "client_seed": lambda u: derived(u),
        "pair_seed": lambda u, v: derived(u, v),
        "num_words": 5,
        **options,
    }
    with pytest.raises(ValueError, match=match):
        SecureRound(names, **options)


def test_a_wrong_argument_does_not_end_the_round():
    words = random_words(3, 5, 32)
    session = begin(3, max_dropouts=1)
    with pytest.raises(ValueError, match="Gouda"):
        session.mask("Gouda")
    with pytest.raises(ValueError, match="uint64"):
        session.masked("Basel", np.zeros(5, np.uint64))
    with pytest.raises(ValueError, match="shape"):
        session.masked("Basel", np.zeros(4, np.uint32))
    messages = [session.masked(name, words[name]) for name in NAMES[:2]]
    for names, match in (
        (["Aachen", "Gouda"], "Gouda"),
        (["Aachen", "Aachen"], "distinct"),
        (NAMES[:3], "Cork.* did not"),
    ):
        with pytest.raises(ValueError, match=match):
            session.unmask(names)
        with pytest.raises(ValueError, match=match):
            session.answer("Aachen", names)
    with pytest.raises(ValueError, match="among the contributors"):
        session.unmask(NAMES[:2], responders=["Aachen", "Cork"])
    total = modular_sum(messages) - session.unmask(NAMES[:2])
    np.testing.assert_array_equal(total, words["Aachen"] + words["Basel"])


def test_a_round_is_neither_printed_nor_pickled():
    session = begin(3)
    assert repr(session) == "SecureRound(clients=('Aachen', 'Basel', 'Cork'), threshold=3)"
    assert "0x" in repr(session._parties["Basel"])  # the default: no field is shown
    with pytest.raises(TypeError, match="never pickled"):
        pickle.dumps(session)


def test_a_round_of_encoded_vectors():
    """The whole way: noised shares to words, masked, one dropout, the sum, back to numbers."""
    fixed = fixed_point(5.0, 6)
    rng = np.random.default_rng(0)
    values = {name: rng.uniform(-5, 5, 100).astype(np.float32) for name in NAMES}
    session = begin(6, num_words=100, max_dropouts=2)
    messages = {n: session.masked(n, fixed.encode(values[n])) for n in NAMES if n != "Cork"}
    opened = fixed.decode(modular_sum(messages.values()) - session.unmask(messages))
    exact = sum(values[name].astype(np.float64) for name in messages)
    assert np.abs(opened - exact).max() <= len(messages) * fixed.step / 2
