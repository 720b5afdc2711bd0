"""Privacy rules of a round, each for itself; `tests/mutants.py` breaks them, and these see it."""

import numpy as np
import pytest

from fedjax_dp.federated.rounds import RoundMaker, Site
from fedjax_dp.privacy.ledger import ChargeLog
from fedjax_dp.privacy.mechanism import Mechanism
from fedjax_dp.privacy.secrets import DistinctDerivations, Purpose, Secrets

NAMES = ("ash", "birch", "cedar")
WORDS = 16
CLIP, Z = 0.5, 2.0


def site(name, **changes):
    settings = {
        "placement": "dp_sgd", "unit": "tile", "num_units": 6, "sampling_prob": 0.5, "capacity": 6,
        "local_steps": 1, "l2_clip_norm": CLIP, "noise_multiplier": Z,
    }  # fmt: skip
    mechanism = Mechanism(**settings | changes)
    tiles = tuple(np.array([unit]) for unit in range(mechanism.num_units))
    return Site(name=name, unit_tiles=tiles, mechanism=mechanism, weight=1.0)


def shared_sites(**changes):
    return tuple(site(name, placement="distributed", num_shares=3, **changes) for name in NAMES)


@pytest.fixture
def make_maker(tmp_path):
    opened = []

    def make(sites, **changes):
        opened.append(ChargeLog(tmp_path / f"{len(opened)}.jsonl"))
        settings = {
            "sites": sites,
            "secrets": Secrets.from_seed(NAMES, 0),
            "charges": opened[-1],
            "limits": {},
            "environment": "here",
            "context": b"data and configuration",
            "clients_per_chunk": 1,
            "num_words": WORDS,
        }
        return RoundMaker(**settings | changes)

    yield make
    for log in opened:
        log.close()


def clients_of(made):
    """Client -> its slot."""
    return {chunk.clients[0]: chunk.chunk for chunk in made.chunks}


# --- accounting


def test_a_client_that_draws_nothing_is_charged(make_maker):
    """That nothing was drawn is itself a fact about the coins."""
    maker = make_maker([site("ash", sampling_prob=0.1)])
    drawn = [int(clients_of(maker.make(index))["ash"].plan.num_units[0, 0]) for index in range(8)]
    assert 0 in drawn
    assert maker.charges.counts() == {"ash": 8}


def test_the_divisor_of_central_is_the_expected_number(make_maker):
    """Whoever was drawn: a divisor that followed the draw would not be public."""
    sites = [
        site(name, placement="central", cohort_prob=0.5, relative_weight=weight)
        for name, weight in zip(NAMES, (1.0, 0.5, 0.25), strict=True)
    ]
    maker = make_maker(sites)
    rounds = [maker.make(index) for index in range(12)]
    assert len({tuple(clients_of(made)) for made in rounds}) > 3
    for made in rounds:
        release = made.release()
        assert release.divisor == pytest.approx(0.5 * 1.75)
        assert release.noise_stddev == pytest.approx(Z * CLIP)
        assert release.count_divisor == pytest.approx(1.5)


# --- secure aggregation


@pytest.mark.parametrize("noise", ["gaussian", "discrete_gaussian"])
def test_masks_and_noise_of_shared_rounds_are_derived_once(make_maker, noise):
    sites = shared_sites(**({"noise": noise, "dimension": WORDS} if "_" in noise else {}))
    recorder = DistinctDerivations()  # raises where something is derived twice
    maker = make_maker(sites, secrets=Secrets.from_seed(NAMES, 0, recorder=recorder))
    for index in range(3):
        clients_of(maker.make(index))
    masks = [name for name in recorder.seen if name[2] is Purpose.MASK]
    assert len(masks) == 3 * len(NAMES)


def test_masks_of_two_rounds_differ_in_every_word(make_maker):
    """Under one mask twice, the difference of two messages lies open."""
    maker = make_maker(shared_sites())
    rounds = [clients_of(maker.make(index)) for index in range(2)]
    for name in NAMES:
        first, second = (np.asarray(clients[name].keys.mask) for clients in rounds)
        assert (first != second).all()


def test_shares_are_split_again_when_a_site_has_left(make_maker):
    """With a third of the sites gone, each share grows, and their sum still holds z C."""
    maker = make_maker(shared_sites(), limits={"cedar": 1})
    for clients in (clients_of(maker.make(0)), clients_of(maker.make(1))):
        stddevs = [float(chunk.constants.noise_stddev[0]) for chunk in clients.values()]
        assert sum(stddev**2 for stddev in stddevs) == pytest.approx((Z * CLIP) ** 2)
    assert set(clients) == {"ash", "birch"}
