"""Rounds whose noise is shared or the server's: what is charged, drawn, masked, lost and opened."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_dp.federated.aggregators import noised_sum, secure_sum
from fedjax_dp.federated.algorithms.opened_sum import opened_sum
from fedjax_dp.federated.client import client_update
from fedjax_dp.federated.cohort import client_mesh
from fedjax_dp.federated.rounds import RoundMaker, Site
from fedjax_dp.federated.share import masked_share
from fedjax_dp.privacy.fixed_point import fixed_point
from fedjax_dp.privacy.ledger import ChargeLog
from fedjax_dp.privacy.mechanism import Mechanism
from fedjax_dp.privacy.secrets import SERVER, DistinctDerivations, Purpose, Secrets
from fedjax_dp.privacy.secure_aggregation import AbortedRoundError
from tests.laws import assert_std, assert_uncorrelated
from tests.oracles import assert_trees_equal, flat, make_pool, take

NAMES = ("ash", "birch", "cedar", "elm", "fir", "hazel")
K, D, Z, CLIP, WORDS = len(NAMES), 2, 1.5, 0.5, 20_000
LEVELS = 2**10


def make_sites(**changes):
    """Sites of unlike size and probability that share the noise of one sum."""
    sites = []
    for index, name in enumerate(NAMES):
        units = 4 + 2 * index
        settings = {
            "placement": "distributed", "unit": "slide", "num_units": units,
            "sampling_prob": 0.2 + 0.1 * index, "capacity": units, "local_steps": 1,
            "l2_clip_norm": CLIP, "noise_multiplier": Z, "num_shares": K, "max_dropouts": D,
        }  # fmt: skip
        if changes.get("placement") == "central":
            settings |= {"num_shares": 1, "max_dropouts": 0, "cohort_prob": 0.4}
            settings |= {"relative_weight": (1 + index) / K}
        tiles = tuple(np.array([unit]) for unit in range(units))
        mechanism = Mechanism(**settings | changes)
        site = Site(
            name=name, unit_tiles=tiles, mechanism=mechanism, weight=float(units), index=index
        )
        sites.append(site)
    return tuple(sites)


SHARED = make_sites()
CENTRAL = make_sites(placement="central")
DISCRETE = make_sites(noise="discrete_gaussian", dimension=WORDS, levels=LEVELS, sampling_prob=0.2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "charges.jsonl"


@pytest.fixture
def charges(path):
    with ChargeLog(path) as log:
        yield log


def make_maker(charges, sites=SHARED, *, recorder=None, **changes):
    is_central = sites[0].mechanism.placement == "central"
    settings = {
        "sites": sites,
        "secrets": Secrets.from_seed([s.name for s in sites], 0, recorder=recorder),
        "charges": charges,
        "limits": {},
        "environment": "here",
        "context": b"data and configuration",
        "clients_per_chunk": 1,
        "num_words": 0 if is_central else WORDS,
    }
    return RoundMaker(**settings | changes)


def by_client(made):
    """Client -> its slot, on the host; uses the chunks up."""
    return {
        name: take(chunk.chunk, slot)
        for chunk in made.chunks
        for slot, name in enumerate(chunk.clients)
    }


def noise_of(client):
    return jax.random.key_data(client.keys.noise)


def find(maker, wanted, start=0):
    """The first round from `start` for which `wanted(made)`."""
    for index in range(start, start + 300):
        made = maker.make(index)
        if wanted(made):
            return made
    raise AssertionError("no such round")


# --- distributed: masks


@pytest.mark.parametrize("lost", [0, 1, D])
def test_masks_cancel_but_for_what_is_taken_away(charges, lost):
    """Whoever is lost, and each mask is a client's own, fills its word, and is used once."""
    maker = make_maker(charges, dropout_prob=0.2)
    made = find(maker, lambda made: len(made.dropped) == lost)
    clients = by_client(made)
    assert set(clients) == set(NAMES) - set(made.dropped)
    assert made.clients == NAMES  # charged all the same
    total = sum((client.keys.mask for client in clients.values()), np.zeros(WORDS, np.uint32))
    np.testing.assert_array_equal(total - made.release().unmask, 0)
    masks = [client.keys.mask for client in clients.values()]
    for one, other in itertools.combinations(masks, 2):
        assert (one == other).mean() < 1e-3
    words = np.stack(masks).astype(np.float64) / 2**32
    assert abs(words.mean() - 0.5) < 5 / math.sqrt(12 * words.size)


def test_masks_are_new_in_every_round(charges):
    maker = make_maker(charges)
    first, second = (by_client(maker.make(index)) for index in range(2))
    for name in NAMES:
        assert (first[name].keys.mask == second[name].keys.mask).mean() < 1e-3


def test_a_replay_has_the_same_masks_and_losses_and_another_nonce_has_others(path):
    found = []
    for environment in ("here", "here", "elsewhere"):
        with ChargeLog(path) as log:
            maker = make_maker(log, environment=environment, dropout_prob=0.2)
            rounds = [maker.make(index) for index in range(8)]
            assert len(log.counts()) == K
            assert set(log.counts().values()) == {16 if environment == "elsewhere" else 8}
            found.append(([made.dropped for made in rounds], [by_client(m) for m in rounds]))
    assert found[0][0] == found[1][0]
    masks = [[c.keys.mask for c in clients[0].values()] for _, clients in found[:2]]
    assert_trees_equal(*masks)
    assert found[0][0] != found[2][0]
    compared = 0
    for first, other in zip(found[0][1], found[2][1], strict=True):
        for name in set(first) & set(other):
            assert (first[name].keys.mask != other[name].keys.mask).mean() > 0.99
            assert (noise_of(first[name]) != noise_of(other[name])).any()
            compared += 1
    assert compared


# --- distributed: who is lost


def test_more_dropouts_than_allowed_open_nothing_and_the_next_round_goes_on(charges):
    maker = make_maker(charges, dropout_prob=0.5)
    made = find(maker, lambda made: len(made.dropped) > D and len(made.dropped) < K)
    before = made.round_index
    assert charges.counts() == dict.fromkeys(NAMES, before + 1)
    assert made.clients == NAMES
    assert list(made.chunks) == []  # no message is even summed
    with pytest.raises(AbortedRoundError, match=rf"{len(made.dropped)} clients are missing"):
        made.release()
    with pytest.raises(Exception, match="was aborted"):
        made.release()  # never opened later either
    after = find(maker, lambda made: len(made.dropped) <= D, start=before + 1)
    assert len(by_client(after)) == K - len(after.dropped)
    after.release()


def test_all_may_be_lost(charges):
    made = find(make_maker(charges, dropout_prob=0.9), lambda made: len(made.dropped) == K)
    assert list(made.chunks) == []
    with pytest.raises(AbortedRoundError, match="6 clients are missing"):
        made.release()


def test_clients_are_lost_with_the_probability(charges):
    maker = make_maker(charges, dropout_prob=0.3, num_words=1)
    lost = sum(len(maker.make(index).dropped) for index in range(200))
    total = 200 * K
    assert abs(lost / total - 0.3) < 5 * math.sqrt(0.3 * 0.7 / total)


def test_the_divisor_is_of_those_who_contribute(charges):
    """The public expectation of their batches: neither of those lost, nor of the draw."""
    maker = make_maker(charges, dropout_prob=0.2)
    for lost in (0, 1, D):
        made = find(maker, lambda made, lost=lost: len(made.dropped) == lost, start=20 * lost)
        clients = by_client(made)
        present = [site for site in SHARED if site.name not in made.dropped]
        release = made.release()
        expected = sum(site.mechanism.expected_batch_size for site in present)
        assert release.divisor == release.count_divisor == np.float32(expected)
        assert release.l2_clip_norm == np.float32(CLIP)
        assert release.noise_stddev == 0.0  # the noise is the clients'
        drawn = sum(int(client.plan.num_units.sum()) for client in clients.values())
        assert drawn != pytest.approx(expected, abs=1e-3)


# --- distributed: who has left


def test_shares_are_split_anew_among_those_who_are_left(charges):
    maker = make_maker(charges, limits={"elm": 1})
    first, second = (by_client(made) for made in (maker.make(0), maker.make(1)))
    assert set(second) == set(NAMES) - {"elm"}
    for name, client in first.items():
        mechanism = SHARED[NAMES.index(name)].mechanism
        assert client.constants.noise_stddev == np.float32(mechanism.share_stddev(K))
        assert client.constants.noise_stddev == np.float32(Z * CLIP / math.sqrt(K - D))
    for client in second.values():
        assert client.constants.noise_stddev == np.float32(Z * CLIP / math.sqrt(K - 1 - D))


def test_who_is_lost_leaves_the_shares_of_the_others(charges):
    """They had drawn their noise before anybody was missed."""
    made = find(make_maker(charges, dropout_prob=0.2), lambda made: len(made.dropped) == D)
    for client in by_client(made).values():
        assert client.constants.noise_stddev == np.float32(Z * CLIP / math.sqrt(K - D))


def test_too_few_left_to_share_end_the_run(charges):
    """2 d + 1 = 5 sites must be there; with 4 nothing is charged any more."""
    maker = make_maker(charges, limits={"ash": 1, "birch": 2})
    assert [made and len(made.clients) for made in map(maker.make, range(4))] == [6, 5, None, None]
    charges.rewind("")
    assert maker.make(0) is not None  # a replay stands
    assert charges.counts() == {"ash": 1, "birch": 2} | dict.fromkeys(NAMES[2:], 2)


@pytest.mark.parametrize("resumed_after", [0, 1, 2])
def test_a_replay_finds_who_shared(path, resumed_after):
    limits = {"ash": 1}
    with ChargeLog(path) as log:
        rounds = [make_maker(log, limits=limits).make(0)]
        maker = make_maker(log, limits=limits, dropout_prob=0.1)
        rounds += [maker.make(index) for index in (1, 2)]
        first = [(made.clients, made.left, made.charge_head) for made in rounds]
    with ChargeLog(path) as log:
        log.rewind(first[resumed_after - 1][2] if resumed_after else "")
        maker = make_maker(log, limits=limits, dropout_prob=0.1)
        again = [maker.make(index) for index in range(resumed_after, 3)]
        assert [(made.clients, made.left, made.charge_head) for made in again] == first[
            resumed_after:
        ]
        assert log.counts() == {"ash": 1} | dict.fromkeys(NAMES[1:], 3)


# --- the law of shares, end to end: RoundMaker, client, aggregator, opening

PARAMS = {"left": jnp.zeros(WORDS // 2), "right": jnp.zeros(WORDS // 2)}
CODE = fixed_point(60.0, K)


def no_loss(params, *_):
    return 0.0 * params["left"][0]


@functools.cache
def programs(levels=None):
    step = CODE.step if levels is None else 1 / levels
    share = masked_share(no_loss, step=step, levels=levels)
    made = opened_sum(share, optax.sgd(1.0), secure_sum(PARAMS, step), mesh=client_mesh(1))
    return made._replace(visit=jax.jit(made.visit), finish=jax.jit(made.finish))


def opened_noise(made, levels=None):
    """What a round without data opens, as the sum it is."""
    run = programs(levels)
    state = run.init(PARAMS)
    acc = run.begin(state)
    for chunk in made.chunks:
        acc, _, _ = run.visit(acc, state, chunk.chunk, make_pool())
    release = made.release()
    after = run.finish(state, acc, release)
    return flat(after.params) * float(release.divisor)


def lost_and_left(made, lost, left):
    return len(made.dropped) == lost and len(made.left) == left


@pytest.mark.parametrize("path_of_noise", ["gaussian", "discrete"])
@pytest.mark.parametrize(("lost", "left"), [(0, 0), (1, 0), (D, 0), (0, 1), (D, 1)])
def test_the_opened_sum_holds_the_stated_noise(charges, lost, left, path_of_noise):
    """z C sqrt(h / (K - d)) of h contributors among the K that are left: z C at the least."""
    sites, levels = (SHARED, None) if path_of_noise == "gaussian" else (DISCRETE, LEVELS)
    maker = make_maker(
        charges, sites, limits={"fir": 0} if left else {}, dropout_prob=0.25 if lost else 0.0
    )
    made = find(maker, lambda made: lost_and_left(made, lost, left))
    sharing = K - left
    sum_noise = opened_noise(made, levels)
    expected = Z * CLIP * math.sqrt((sharing - lost) / (sharing - D))
    assert_std(sum_noise, expected)
    if lost == D:
        assert expected == pytest.approx(Z * CLIP)
    for wrong in (0.9, 1.1):
        with pytest.raises(AssertionError):
            assert_std(sum_noise, wrong * expected)


def test_shares_of_clients_and_rounds_are_independent(charges):
    maker = make_maker(charges)
    share = jax.jit(masked_share(no_loss, step=CODE.step))
    found = []
    for index in range(2):
        for client in list(by_client(maker.make(index)).values())[:3]:
            words, _, _ = share(PARAMS, *client, make_pool())
            found.append(CODE.decode(np.asarray(words) - client.keys.mask) * CLIP)
    for one in found:
        assert_std(one, Z * CLIP / math.sqrt(K - D))
        assert_uncorrelated(one[: WORDS // 2], one[WORDS // 2 :])
    for one, other in itertools.combinations(found, 2):
        assert_uncorrelated(one, other)
    with pytest.raises(AssertionError):
        assert_uncorrelated(found[0], found[0])


def test_integer_shares_of_clients_and_rounds_are_independent(charges):
    maker = make_maker(charges, DISCRETE, limits={"ash": 1})
    found = [
        client.keys.integer_noise
        for index in range(2)
        for client in list(by_client(maker.make(index)).values())[-3:]
    ]
    for index, one in enumerate(found):
        assert one.dtype == np.int32
        sharing = K if index < 3 else K - 1
        stddev = math.sqrt(DISCRETE[0].mechanism.share_variance(sharing))
        assert stddev == pytest.approx(Z * LEVELS / math.sqrt(sharing - D), rel=1e-5)
        assert_std(one, stddev)
    for one, other in itertools.combinations(found, 2):
        assert_uncorrelated(one, other)


# --- central: all are charged, and who is drawn is a secret


def test_all_are_charged_whoever_is_drawn(charges):
    maker = make_maker(charges, CENTRAL)
    sizes = set()
    for index in range(12):
        made = maker.make(index)
        assert made.clients == NAMES
        assert charges.counts() == dict.fromkeys(NAMES, index + 1)
        sizes.add(len(by_client(made)))
    assert len(sizes) > 2


def test_an_empty_cohort_is_a_round_and_is_charged(charges):
    maker = make_maker(charges, make_sites(placement="central", cohort_prob=0.1))
    made = find(maker, lambda made: not list(made.chunks))
    assert made.clients == NAMES
    assert charges.counts() == dict.fromkeys(NAMES, made.round_index + 1)
    assert made.release().noise_stddev == np.float32(Z * CLIP)


def test_each_client_is_drawn_by_its_own_coin(charges):
    maker, rounds = make_maker(charges, CENTRAL), 150
    drawn = np.array(
        [
            [name in clients for name in NAMES]
            for clients in map(by_client, map(maker.make, range(rounds)))
        ]
    )
    assert (np.abs(drawn.mean(0) - 0.4) < 5 * math.sqrt(0.4 * 0.6 / rounds)).all()
    assert abs(drawn.mean() - 0.4) < 5 * math.sqrt(0.4 * 0.6 / drawn.size)
    sizes = drawn.sum(1)
    assert len(set(sizes)) > 3  # no fixed size


def test_clients_are_drawn_with_the_probability_that_is_accounted(charges):
    """The mechanism's, whatever it is; it is the one that the row's event amplifies by."""
    probs, rounds = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0), 150
    sites = tuple(
        dataclasses.replace(site, mechanism=dataclasses.replace(site.mechanism, cohort_prob=p))
        for site, p in zip(CENTRAL, probs, strict=True)
    )
    maker = make_maker(charges, sites)
    cohorts = [by_client(maker.make(index)) for index in range(rounds)]
    drawn = np.array([[name in cohort for name in NAMES] for cohort in cohorts])
    for site, p, share in zip(sites, probs, drawn.mean(0), strict=True):
        event = site.mechanism.headline.event
        assert getattr(event, "sampling_probability", 1.0) == p
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / rounds)


@pytest.mark.parametrize(
    "given",
    [
        {"cohort_mode": "poisson", "cohort_prob": 0.1},
        {"cohort_mode": "poisson", "cohort_prob": 0.4},  # nothing may say it a second time
        {"cohort_mode": "fixed", "cohort_size": 2},
    ],
)
def test_a_cohort_beside_the_accounted_one_is_refused(charges, given):
    with pytest.raises(ValueError, match=r"cohort_prob of their mechanisms, 0\.4") as refused:
        make_maker(charges, CENTRAL, **given)
    assert all(f"{name}={value!r}" in str(refused.value) for name, value in given.items())
    assert charges.counts() == {}


def test_the_divisor_does_not_depend_on_the_draw(charges):
    maker = make_maker(charges, CENTRAL)
    weight = sum(site.mechanism.relative_weight for site in CENTRAL)
    cohorts, releases = [], []
    for index in range(6):
        made = maker.make(index)
        cohorts.append(tuple(by_client(made)))
        releases.append(made.release())
    assert len(set(cohorts)) > 2
    for release in releases:
        assert release.divisor == np.float32(0.4 * weight)
        assert release.count_divisor == np.float32(0.4 * K)
        assert release.noise_stddev == np.float32(Z * CLIP)
        assert release.l2_clip_norm == np.float32(CLIP)
    keys = {tuple(release.noise_key) for release in releases}
    assert len(keys) == 6


def test_the_divisor_is_of_those_who_have_budget(charges):
    maker = make_maker(charges, CENTRAL, limits={"hazel": 1})
    first, second = maker.make(0), maker.make(1)
    assert (second.clients, second.left) == (NAMES[:-1], ("hazel",))
    weights = [site.mechanism.relative_weight for site in CENTRAL]
    assert first.release().divisor == np.float32(0.4 * sum(weights))
    assert second.release().divisor == np.float32(0.4 * sum(weights[:-1]))
    assert all("hazel" not in by_client(maker.make(index)) for index in range(2, 12))


def test_clients_carry_the_mechanisms_weight_and_no_noise(charges):
    always = make_sites(placement="central", cohort_prob=1.0)
    clients = by_client(make_maker(charges, always).make(0))
    assert set(clients) == set(NAMES)
    for name, client in clients.items():
        expected = CENTRAL[NAMES.index(name)].mechanism.relative_weight
        assert client.constants.weight == np.float32(expected)
        assert client.constants.noise_stddev == 0.0
        assert client.keys.mask == ()


def central_round(path, environment, rounds=6):
    with ChargeLog(path) as log:
        maker = make_maker(log, CENTRAL, environment=environment)
        made = [maker.make(index) for index in range(rounds)]
        counts = log.counts()
        cohorts = [tuple(by_client(m)) for m in made]
    return cohorts, [tuple(m.release().noise_key) for m in made], counts


def test_a_free_replay_is_the_same_and_another_nonce_has_another_cohort_and_other_noise(path):
    """Else the server could be made to open two sums of one cohort, or two of one noise."""
    first = central_round(path, "here")
    assert central_round(path, "here") == first
    cohorts, keys, counts = central_round(path, "elsewhere")
    assert counts == dict.fromkeys(NAMES, 12)
    assert cohorts != first[0]
    assert not set(keys) & set(first[1])


def test_the_noise_of_a_round_comes_with_its_release(charges):
    """End to end without a client: the std over the public divisor, from the round's own key."""
    sites = tuple(
        dataclasses.replace(
            site, mechanism=dataclasses.replace(site.mechanism, count_noise_stddev=4.0)
        )
        for site in CENTRAL
    )
    maker = make_maker(charges, sites)
    update = client_update(no_loss, optax.sgd(1.0), placement="central")
    run = opened_sum(update, optax.sgd(1.0), noised_sum(), mesh=client_mesh(1))
    state = run.init(PARAMS)
    found = []
    for index in range(2):
        release = maker.make(index).release()
        assert release.count_noise_stddev == np.float32(4.0)
        key = jax.random.wrap_key_data(release.noise_key)
        after = run.finish(state, run.begin(state), release._replace(noise_key=key))
        found.append(flat(after.params) * float(release.divisor))
    multiplier = sites[0].mechanism.sum_noise_multiplier
    assert multiplier > Z * 1.01
    for one in found:
        assert_std(one, multiplier * CLIP)
    assert_uncorrelated(*found)


# --- derivations


@pytest.mark.parametrize(
    ("sites", "purposes", "each"),
    [
        (SHARED, {Purpose.MASK, Purpose.DROPOUT}, 4),
        (DISCRETE, {Purpose.MASK, Purpose.DROPOUT, Purpose.INTEGER_NOISE}, 5),
        (CENTRAL, {Purpose.SERVER_NOISE}, 3),
    ],
    ids=["distributed", "discrete", "central"],
)
def test_no_derivation_is_used_twice(charges, sites, purposes, each):
    recorder = DistinctDerivations()  # raises where one is
    changes = {"num_words": 10, "dropout_prob": 0.0} if len(purposes) > 1 else {}
    maker = make_maker(charges, sites, recorder=recorder, **changes)
    taken = 0
    for index in range(4):
        made = maker.make(index)
        taken += len(by_client(made))
        made.release()
    common = {Purpose.SAMPLING, Purpose.NOISE, Purpose.AUGMENTATION, Purpose.COHORT}
    assert {name[2] for name in recorder.seen} == common | purposes
    assert len(recorder.seen) == 4 * 2 + each * taken
    server = {name[2] for name in recorder.seen if name[0] == SERVER}
    assert server == {Purpose.COHORT, (purposes & {Purpose.DROPOUT, Purpose.SERVER_NOISE}).pop()}


@pytest.mark.parametrize("sites", [SHARED, CENTRAL], ids=["distributed", "central"])
def test_nothing_secret_is_derived_before_the_charge(charges, path, sites):
    seen = []

    def recorder(derivation):
        charged = len(path.read_text().splitlines())
        seen.append((derivation.purpose, charged))

    by_client(make_maker(charges, sites, recorder=recorder).make(0))
    before = {purpose for purpose, charged in seen if not charged}
    # Of "central" the cohort too is drawn after its charge, for it amplifies.
    assert before == ({Purpose.COHORT} if sites is SHARED else set())
    assert len(seen) > 3
