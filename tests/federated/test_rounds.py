import dataclasses
import errno
import json
import threading

import jax
import numpy as np
import pytest

from fedjax_dp.federated.rounds import RoundMaker, Site, ahead, client_constants
from fedjax_dp.privacy import ledger
from fedjax_dp.privacy.ledger import ChargeLog
from fedjax_dp.privacy.mechanism import Mechanism
from fedjax_dp.privacy.secrets import DistinctDerivations, Purpose, Secrets
from tests.oracles import assert_trees_equal, take

NAMES = ("ash", "birch", "cedar")
STEPS, TILES = 2, 2


def make_site(index, **changes):
    """Sites of unlike size, capacity and noise; their tiles do not overlap."""
    units = 4 + 2 * index
    settings = {
        "placement": "dp_sgd",
        "unit": "slide",
        "num_units": units,
        "sampling_prob": 0.5,
        "capacity": 3 + index,
        "local_steps": STEPS,
        "tiles_per_unit": TILES,
        "l2_clip_norm": 0.5 + index,
        "noise_multiplier": 1.0 + index,
    }
    tiles = tuple(100 * index + 3 * unit + np.arange(3) for unit in range(units))
    mechanism = Mechanism(**settings | changes)
    return Site(name=NAMES[index], unit_tiles=tiles, mechanism=mechanism, weight=float(units))


SITES = tuple(make_site(index) for index in range(3))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "charges.jsonl"


@pytest.fixture
def charges(path):
    with ChargeLog(path) as log:
        yield log


def make_maker(charges, *, recorder=None, **changes):
    settings = {
        "sites": SITES,
        "secrets": Secrets.from_seed(NAMES, 0, recorder=recorder),
        "charges": charges,
        "limits": {},
        "environment": "here",
        "context": b"data and configuration",
        "clients_per_chunk": 2,
    }
    return RoundMaker(**settings | changes)


def finished(made):
    """A round with its chunks made."""
    return made._replace(chunks=tuple(made.chunks))


def on_disk(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_rounds(left, right):
    assert left.clients == right.clients
    assert len(left.chunks) == len(right.chunks)
    for one, other in zip(left.chunks, right.chunks, strict=True):
        assert one.clients == other.clients
        assert_trees_equal(*(as_data(chunk.chunk) for chunk in (one, other)))


def as_data(chunk):
    return chunk._replace(keys=jax.tree.map(jax.random.key_data, chunk.keys))


# --- the charge comes first


def test_a_round_is_on_disk_before_anything_of_it_exists(charges, path):
    derived = []

    def recorder(derivation):
        derived.append(derivation)
        if derivation.purpose is not Purpose.COHORT:  # who takes part is no client's secret
            rounds = {record["round"] for record in on_disk(path)}
            assert derivation.round_index in rounds

    maker = make_maker(charges, recorder=recorder)
    for index in range(3):
        made = maker.make(index)
        assert [record["round"] for record in on_disk(path)] == list(range(index + 1))
        assert on_disk(path)[-1]["clients"] == sorted(NAMES)
        finished(made)
    assert len(derived) == 3 * (1 + 3 * 3)


def test_the_disk_has_answered_before_randomness_is_derived(charges, monkeypatch):
    events = []
    sync = ledger.os.fsync
    monkeypatch.setattr(ledger.os, "fsync", lambda fd: (sync(fd), events.append("synced")))
    maker = make_maker(charges, recorder=lambda derivation: events.append(derivation.purpose))
    finished(maker.make(0))
    assert events[:3] == [Purpose.COHORT, "synced", Purpose.SAMPLING]
    assert events.count("synced") == 1


def test_a_round_that_cannot_be_charged_is_not_made(charges, monkeypatch):
    derived = []
    maker = make_maker(charges, recorder=lambda derivation: derived.append(derivation.purpose))

    def full(_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(ledger.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        maker.make(0)
    assert derived == [Purpose.COHORT]
    assert charges.counts() == {}


# --- replays


def test_a_replay_in_the_same_environment_is_free_and_the_same_to_the_bit(path):
    with ChargeLog(path) as log:
        maker = make_maker(log)
        first = [finished(maker.make(index)) for index in range(3)]
    with ChargeLog(path) as log:
        log.rewind(first[0].charge_head)
        maker = make_maker(log)
        again = [finished(maker.make(index)) for index in (1, 2)]
        assert log.counts() == dict.fromkeys(NAMES, 3)
    for old, new in zip(first[1:], again, strict=True):
        same_rounds(old, new)
        assert old.charge_head == new.charge_head


@pytest.mark.parametrize("what", ["environment", "history", "cohort"])
def test_any_other_replay_gets_fresh_randomness_and_a_second_charge(path, what):
    with ChargeLog(path) as log:
        maker = make_maker(log)
        first = [finished(maker.make(index)) for index in range(2)]
    changes = {"environment": "elsewhere"} if what == "environment" else {}
    changes |= {"sites": SITES[:2]} if what == "cohort" else {}
    with ChargeLog(path) as log:
        log.rewind("" if what == "history" else first[0].charge_head)
        again = finished(make_maker(log, **changes).make(1))
        assert log.counts()["ash"] == 3
        assert on_disk(path)[-1]["nonce"] == 1
    old, new = (by_client(made)["ash"] for made in (first[1], again))
    for purpose in ("noise", "augmentation"):
        before, after = (np.asarray(getattr(client.keys, purpose)) for client in (old, new))
        assert (before != after).any()


def by_client(made):
    """Client -> its slot, as data."""
    return {
        name: take(as_data(chunk.chunk), slot)
        for chunk in made.chunks
        for slot, name in enumerate(chunk.clients)
    }


# --- budgets


def test_a_client_over_its_limit_is_left_out_and_the_others_go_on(charges):
    maker = make_maker(charges, limits={"ash": 1, "birch": 3, "cedar": 2})
    made = [maker.make(index) for index in range(4)]
    assert [m and m.clients for m in made] == [NAMES, NAMES[1:], NAMES[1:2], None]
    assert [m and m.left for m in made] == [(), ("ash",), ("ash", "cedar"), None]
    assert charges.counts() == {"ash": 1, "birch": 3, "cedar": 2}
    assert made[2].charged == {"ash": 1, "birch": 3, "cedar": 2}
    assert {name for chunk in made[2].chunks for name in chunk.clients} == {"birch"}


def test_a_client_without_a_limit_never_leaves(charges):
    maker = make_maker(charges, limits={"ash": 1, "cedar": 1})
    assert [maker.make(index).clients for index in range(3)][1:] == [("birch",)] * 2


def test_a_second_charge_counts_against_the_limit(path):
    limits = dict.fromkeys(NAMES, 2)
    with ChargeLog(path) as log:
        maker = make_maker(log, limits=limits)
        maker.make(0)
        maker.make(1)
    with ChargeLog(path) as log:
        assert make_maker(log, limits=limits, environment="elsewhere").make(0) is None


@pytest.mark.parametrize("resumed_after", [0, 1, 2, 3])
def test_a_replay_leaves_out_whom_the_first_charge_left_out(path, resumed_after):
    """Resumed anywhere, a run whose clients' budgets differ ends as if never stopped."""
    limits = {"ash": 1, "birch": 3, "cedar": 2}
    with ChargeLog(path) as log:
        maker = make_maker(log, limits=limits)
        first = [finished(maker.make(index)) for index in range(3)]
    with ChargeLog(path) as log:
        log.rewind(first[resumed_after - 1].charge_head if resumed_after else "")
        maker = make_maker(log, limits=limits)
        for index in range(resumed_after, 3):
            again = maker.make(index)
            assert again is not None
            same_rounds(first[index], finished(again))
        assert maker.make(3) is None
        assert log.counts() == limits


# --- cohorts


def test_a_fixed_cohort_has_its_size_and_differs_between_rounds(charges):
    maker = make_maker(charges, cohort_mode="fixed", cohort_size=2)
    cohorts = [maker.make(index).clients for index in range(12)]
    assert {len(cohort) for cohort in cohorts} == {2}
    assert len(set(cohorts)) == 3
    assert charges.counts() == {name: sum(name in cohort for cohort in cohorts) for name in NAMES}


def test_a_poisson_cohort_may_be_empty_and_is_a_round_all_the_same(charges, path):
    maker = make_maker(charges, cohort_mode="poisson", cohort_prob=0.1)
    made = [finished(maker.make(index)) for index in range(8)]
    empty = [m for m in made if not m.clients]
    assert empty
    assert all(m.chunks == () for m in empty)
    assert len(on_disk(path)) == 8


# --- what a round holds


def test_chunks_hold_every_client_once_in_one_shape(charges):
    made = finished(make_maker(charges).make(0))
    # Most work first: clients of one chunk wait for each other.
    assert [chunk.clients for chunk in made.chunks] == [("cedar", "birch"), ("ash",)]
    slots = max(site.mechanism.capacity for site in SITES)
    for chunk in made.chunks:
        assert chunk.chunk.plan.tile_index.shape == (2, STEPS, slots, TILES)
        assert chunk.chunk.constants.weight.shape == (2,)
        assert chunk.num_tiles == chunk.chunk.plan.num_tiles[: len(chunk.clients)].sum()
    assert made.chunks[1].chunk.constants.is_active.tolist() == [1.0, 0.0]


def test_each_client_gets_its_own_numbers_and_tiles(charges):
    clients = by_client(finished(make_maker(charges).make(0)))
    for index, site in enumerate(SITES):
        mine = clients[site.name]
        assert mine.constants == client_constants(site.mechanism, site.weight)
        real = mine.plan.num_units
        assert (real <= site.mechanism.capacity).all()
        for step in range(STEPS):
            for slot in range(real[step]):
                tiles = mine.plan.tile_index[step, slot, : mine.plan.num_tiles[step, slot]]
                assert (tiles // 100 == index).all()
        assert (mine.plan.num_tiles[:, slots_above(real)] == 0).all()


def slots_above(real):
    return slice(int(real.max()), None)


def test_constants_are_the_mechanisms_numbers_in_float32():
    site = SITES[2]
    constants = client_constants(site.mechanism, site.weight, index=2)
    assert all(value.dtype == np.float32 for value in constants[:-1])
    expected = (8.0, 2.5, 3.0 * 2.5, 1 / (0.5 * 8), 1.0, 0.0, 2)
    np.testing.assert_allclose(constants, expected, rtol=1e-6)


def test_without_privacy_there_is_neither_clip_nor_noise():
    none = dataclasses.replace(
        SITES[0].mechanism, placement="none", noise_multiplier=0.0, l2_clip_norm=np.inf
    )
    constants = client_constants(none, 1.0)
    assert constants.noise_stddev == 0.0
    assert np.isposinf(constants.l2_clip_norm)


def test_one_clients_randomness_does_not_depend_on_the_others(tmp_path):
    found = []
    for index, sites in enumerate((SITES, SITES[1:2], SITES[::-1])):
        with ChargeLog(tmp_path / f"{index}") as log:
            made = finished(make_maker(log, sites=sites).make(0))
        found.append(by_client(made)["birch"])
    for other in found[1:]:
        assert_trees_equal(found[0].keys, other.keys)
        np.testing.assert_array_equal(found[0].plan.num_units, other.plan.num_units)


# --- all randomness is distinct


def test_no_derivation_is_used_twice(charges):
    recorder = DistinctDerivations()  # raises where one is
    maker = make_maker(charges, recorder=recorder)
    for index in range(5):
        finished(maker.make(index))
    assert len(recorder.seen) == 5 * (1 + 3 * len(NAMES))
    purposes = {name[2] for name in recorder.seen}
    assert purposes == {
        Purpose.SAMPLING, Purpose.NOISE, Purpose.AUGMENTATION, Purpose.COHORT,
    }  # fmt: skip


def test_keys_are_distinct_down_to_the_step_and_the_tile(path):
    """Client, round, nonce, purpose, step and tile: as `client_update` folds them."""
    keys = []
    for environment in ("here", "elsewhere"):
        with ChargeLog(path) as log:
            maker = make_maker(log, environment=environment)
            for index in range(3):
                for client in by_client(finished(maker.make(index))).values():
                    keys += [client.keys.noise, client.keys.augmentation]
    keys = jax.random.wrap_key_data(np.stack(keys))

    @jax.jit
    @jax.vmap
    def folded(key):
        steps = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(STEPS))
        tiles = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(steps, np.arange(50))
        return jax.random.key_data(key), jax.random.key_data(steps), jax.random.key_data(tiles)

    data = np.concatenate([np.asarray(part).reshape(-1, 2) for part in folded(keys)])
    assert len(data) == 2 * 3 * 3 * 2 * (1 + STEPS + STEPS * 50)
    assert len(np.unique(data, axis=0)) == len(data)


@pytest.mark.parametrize("change", [{"context": b"other data"}, {"secrets": 1}])
def test_other_data_and_other_secrets_have_other_randomness(tmp_path, change):
    if "secrets" in change:
        change = {"secrets": Secrets.from_seed(NAMES, change["secrets"])}
    found = []
    for index, changes in enumerate(({}, change)):
        with ChargeLog(tmp_path / f"{index}") as log:
            found.append(by_client(finished(make_maker(log, **changes).make(0)))["cedar"])
    assert (found[0].keys.noise != found[1].keys.noise).any()
    assert (found[0].keys.augmentation != found[1].keys.augmentation).any()


# --- prefetching


def running():
    return [thread for thread in threading.enumerate() if thread.name == "rounds"]


def test_rounds_made_ahead_are_the_rounds(tmp_path):
    with ChargeLog(tmp_path / "a") as log:
        maker = make_maker(log)
        expected = [finished(maker.make(index)) for index in range(1, 4)]
    with ChargeLog(tmp_path / "b") as log:
        found = [finished(made) for made in ahead(make_maker(log).make, 1, 4)]
        assert log.counts() == dict.fromkeys(NAMES, 3)
    assert [made.round_index for made in found] == [1, 2, 3]
    for one, other in zip(found, expected, strict=True):
        same_rounds(one, other)
    assert not running()


def test_the_budgets_end_is_the_rounds_end(charges):
    maker = make_maker(charges, limits=dict.fromkeys(NAMES, 2))
    assert [finished(made).round_index for made in ahead(maker.make, 0, 9)] == [0, 1]
    assert not running()


@pytest.mark.parametrize("depth", [1, 2])
def test_only_a_few_rounds_are_charged_ahead(charges, depth):
    maker, made = make_maker(charges, clients_per_chunk=3), []
    waiting = threading.Event()

    def make(index):
        made.append(index)
        if len(made) > 1:
            waiting.set()
        return maker.make(index)

    rounds = ahead(make, 0, 100, depth=depth)
    next(rounds)
    waiting.wait(0.3)
    rounds.close()
    assert len(made) <= 1 + depth
    assert not running()


@pytest.mark.parametrize("failing", ["make", "chunks"])
def test_an_error_of_the_thread_reaches_the_caller(charges, failing):
    maker = make_maker(charges)

    def make(index):
        made = maker.make(index)
        if index < 1:
            return made
        if failing == "make":
            raise OSError("disk full")
        return made._replace(chunks=broken(made.chunks))

    def broken(chunks):
        yield next(chunks)
        raise OSError("disk full")

    seen = []

    def run():
        for made in ahead(make, 0, 5):
            seen.append(made.round_index)
            finished(made)

    with pytest.raises(OSError, match="disk full"):
        run()
    assert seen == ([0] if failing == "make" else [0, 1])
    assert not running()


def test_stopping_in_mid_round_stops_the_thread(charges):
    rounds = ahead(make_maker(charges, clients_per_chunk=1).make, 0, 100, depth=1)
    made = next(rounds)
    assert next(made.chunks).clients == ("cedar",)
    assert running()
    rounds.close()
    assert not running()
