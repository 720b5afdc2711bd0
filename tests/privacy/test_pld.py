"""Our composition, and how epsilon is read off it, against dp-accounting and against more digits.

dp-accounting is the oracle of what is composed: the same base, self-composed and asked for epsilon.
Both transform in float64, and its error of some n 1e-16 in delta is larger than ours; who of the
two is right is decided by the same transform in 80 bits, without any allowance.
"""

import math
import time
import warnings

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import pld_pmf
from scipy import fft, special

from fedjax_dp.privacy import accounting, calibration, events, pld
from fedjax_dp.privacy.events import MixtureDpEvent
from tests.privacy.dp_events import DELTA, EVENTS, gaussian, group, poisson, truncated

HAS_MORE_DIGITS = np.finfo(np.longdouble).eps < 1e-18
RELATIONS = ("zero_out", "replace_one")


def log_uniform(rng, low, high):
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def random_case(rng, most_steps):
    """Event, steps, relation."""
    q, z = log_uniform(rng, 1e-3, 0.99), log_uniform(rng, 0.5, 8)
    n = int(rng.integers(20, 2000))
    event = [
        poisson(q, z),
        truncated(n, q, min(n, math.ceil(n * q + 6 * math.sqrt(n * q))), z),
        MixtureDpEvent((poisson(q, z), gaussian(z)), (0.99, 0.01)),
        dp_event.ComposedDpEvent((poisson(q, z), gaussian(3 * z), poisson(q / 2, 2 * z))),
    ][rng.integers(4)]
    return event, int(log_uniform(rng, 1, most_steps)), RELATIONS[rng.integers(2)]


def library(parts, relation, grid):
    """dp-accounting's composition, on the grid that `pld.composed` takes."""
    grid = max([grid, *(pld._finest(event, relation, pld._MAX_CELLS) for event, _ in parts)])
    total = None
    for event, times in parts:
        more = pld._base_pld(event, relation, grid).self_compose(times)
        total = more if total is None else total.compose(more)
    return total


def both(event, steps, relation, grid=None):
    """Our composition and dp-accounting's."""
    parts = events.elementary(event, steps)
    grid = pld.suited_grid(parts, relation) if grid is None else grid
    return pld.composed(parts, relation, grid), library(parts, relation, grid)


@pytest.mark.parametrize("seed", range(24))
def test_composition_is_the_library_s(seed):
    """Never lower by more than 1e-9, nor higher by more than a millionth."""
    event, steps, relation = random_case(np.random.default_rng(seed), 300)
    ours, theirs = both(event, steps, relation)
    pmfs = (theirs._pmf_remove,) if theirs._symmetric else (theirs._pmf_remove, theirs._pmf_add)
    for losses, pmf in zip(ours, pmfs, strict=True):
        expected = pmf.get_epsilon_for_delta(1e-5)
        assert losses.epsilon(1e-5) == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert losses.probs.min() >= 0
    for delta in (1e-3, 1e-5, 1e-6):
        found = max(losses.epsilon(delta) for losses in ours)
        expected = theirs.get_epsilon_for_delta(delta)
        # The library's rounding depends on its transform: NumPy 2.5 moved epsilon by 6e-11 of it.
        assert expected * (1 - 1e-9) - 1e-9 <= found <= expected * (1 + 1e-6) + 1e-12
        at = max(losses.delta(found) for losses in ours)
        assert at == pytest.approx(theirs.get_delta_for_epsilon(found), rel=1e-6)
        if found:
            assert at == pytest.approx(delta, rel=1e-9)


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize(("event", "steps"), [(poisson(0.02, 0.8), 3000), (poisson(0.2, 5), 9999)])
def test_many_steps_are_the_library_s_up_to_its_rounding(event, steps, relation):
    ours, theirs = both(event, steps, relation)
    for delta in (1e-3, 1e-5, 1e-8):
        found = max(losses.epsilon(delta) for losses in ours)
        assert theirs.get_delta_for_epsilon(found) == pytest.approx(delta, abs=steps * 2**-52)


def exact_delta(pmfs, times, window, epsilon):
    """Delta of the pmfs, each so many times: by plain powers in 80 bits, nothing charged on top.

    `window` is ours, which is widened here.
    """
    margin = len(window.probs)
    lowest, size = window.lowest - margin, fft.next_fast_len(3 * margin, real=True)
    spectrum, finite = np.ones(size // 2 + 1, np.clongdouble), 0.0
    for pmf, n in zip(pmfs, times, strict=True):
        probs = pmf._probs.astype(np.longdouble)
        # What rounding has taken off the sum.
        probs *= max(1, (1 - np.longdouble(pmf._infinity_mass)) / probs.sum())
        finite += n * math.log1p(-pmf._infinity_mass)
        lowest -= n * pmf._lower_loss
        probs = np.pad(probs, (0, -len(probs) % size)).reshape(-1, size).sum(0)
        transform, power = fft.rfft(probs), np.ones(1, np.clongdouble)
        while n:
            power = power * transform if n % 2 else power
            transform, n = transform * transform, n // 2
        spectrum = spectrum * power
    probs = np.roll(fft.irfft(spectrum, size), -(lowest % size))
    losses = window.grid * (window.lowest - margin + np.arange(size))
    paid = np.maximum(-np.expm1((epsilon - losses).astype(np.longdouble)), 0)
    return float(paid @ probs) - math.expm1(finite)


def excess_over_exact(event, steps, relation):
    """What delta is stated to be minus what it is, over several epsilons and both directions."""
    parts = events.elementary(event, steps)
    grid = pld.suited_grid(parts, relation)
    bases = [pld._base_pld(part, relation, grid) for part, _ in parts]
    for losses, side in zip(
        pld.composed(parts, relation, grid), ("_pmf_remove", "_pmf_add"), strict=False
    ):
        pmfs = [getattr(base, side).to_dense_pmf() for base in bases]
        for delta in (1e-2, 1e-4, 1e-8, 1e-12):
            epsilon = losses.epsilon(delta)
            if 0 < epsilon < math.inf:
                truth = exact_delta(pmfs, [times for _, times in parts], losses, epsilon)
                yield losses.delta(epsilon) - truth


@pytest.mark.skipif(not HAS_MORE_DIGITS, reason="long double is double here")
@pytest.mark.parametrize("seed", range(12))
def test_delta_is_never_below_what_more_digits_say(seed):
    event, steps, relation = random_case(np.random.default_rng(seed + 100), 20_000)
    for excess in excess_over_exact(event, steps, relation):
        charged = (4 + math.sqrt(steps)) * 2**-52  # for rounding: half of it must be left
        assert charged / 2 <= excess < 1e-14 + 100 * charged


@pytest.mark.skipif(not HAS_MORE_DIGITS, reason="long double is double here")
def test_more_digits_tell_a_plain_power_from_ours(monkeypatch):
    """Negative control: what dp-accounting does errs by more than we charge for."""

    def plainly(step, size):
        tails = step.tails
        below, above = -tails[: step.centre], tails[step.centre :]
        middle = math.exp(step.log_mass) - below[-1:].sum() - above[0]
        probs = np.concatenate([np.diff(below, prepend=0.0), [middle], -np.diff(above)])
        cell = (np.arange(len(probs)) - step.centre) % size
        logs = np.log(fft.rfft(np.bincount(cell, probs, size)))
        return np.stack([logs.real, logs.imag])

    monkeypatch.setattr(pld, "_log_transform", plainly)
    pld.composed.cache_clear()
    found = [
        excess
        for z in (1.0, 2.0, 4.0)
        for excess in excess_over_exact(poisson(0.05, z), 10_000, "zero_out")
    ]
    pld.composed.cache_clear()
    assert min(found) < 0


def random_losses(rng):
    size = int(rng.integers(1, 400))
    probs = rng.dirichlet(np.full(size, 0.3)) * rng.uniform(0.5, 1)
    probs[rng.random(size) < 0.2] = 0
    grid = log_uniform(rng, 1e-4, 30)
    infinity = float(rng.choice([0.0, 1e-9, 1e-3])) * (1 - probs.sum())
    return pld.Losses(grid, int(rng.integers(-2 * size, size)), probs, infinity)


def test_epsilon_is_read_off_as_the_library_does():
    rng = np.random.default_rng(0)
    finite, infinite = 0, 0
    for _ in range(600):
        losses = random_losses(rng)
        top = (losses.lowest + len(losses.probs) - 1) * losses.grid
        if losses.lowest * losses.grid < -700:  # there it overflows
            continue
        theirs = pld_pmf.DensePLDPmf(
            losses.grid, losses.lowest, losses.probs, losses.infinity, True
        )
        for delta in 10.0 ** rng.uniform(-10, -0.5, 4):
            found, expected = losses.epsilon(delta), theirs.get_epsilon_for_delta(delta)
            if math.isinf(expected):
                infinite += 1
                assert math.isinf(found)
                continue
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-9) or expected > 700
            assert found <= max(0, top)
            rounding = 1e-15 * (1 + found)  # of epsilon itself
            assert losses.delta(found) <= delta * (1 + 1e-9) + rounding
            if found > 0:
                finite += 1
                assert losses.delta(found - 1e-6 * (1 + found)) > delta * (1 - 1e-9) - rounding
                assert losses.delta(found) == pytest.approx(
                    theirs.get_delta_for_epsilon(found), rel=1e-9, abs=rounding
                )
    assert finite > 500
    assert infinite > 100


def test_losses_too_large_for_an_exponential_are_read_off():
    """U - exp(epsilon - l) p = delta, of one loss l beyond what exp() can take."""
    losses = pld.Losses(10.0, -500, np.append(np.zeros(1000), 0.25), 0.01)
    assert losses.epsilon(0.2) == pytest.approx(5000 + math.log(0.06 / 0.25), abs=1e-9)
    assert losses.epsilon(0.26) == losses.epsilon(0.5) == 0.0
    assert losses.epsilon(0.009) == math.inf
    assert losses.delta(-1e9) == pytest.approx(0.26)
    # What is charged as infinite is all of delta: nothing that has a probability may be exceeded.
    losses = pld.Losses(0.5, 3, np.array([0.5, 0.25, 0.0]), 0.25)
    assert losses.epsilon(0.25) == pytest.approx(2.0)
    assert losses.epsilon(0.25 - 1e-9) == math.inf
    nothing = pld.Losses(0.1, -5, np.full(5, 0.2), 0.0)
    assert nothing.epsilon(1e-9) == nothing.delta(0.0) == 0.0


def test_a_convolution_of_few_cells_is_the_binomial():
    """Two losses, of -1 and 3 cells."""
    base = pld._step(pld_pmf.SparsePLDPmf({-1: 0.7, 3: 0.3 - 1e-6}, 0.5, 1e-6, True))
    for n in (1, 2, 3, 40):
        losses = pld._convolved([base], [n])
        k = np.arange(n + 1)
        probs = special.comb(n, k) * 0.7 ** (n - k) * (0.3 - 1e-6) ** k
        found = dict(zip(losses.lowest + np.arange(len(losses.probs)), losses.probs, strict=True))
        for number, prob in zip(4 * k - n, probs, strict=True):
            assert found.get(number, 0.0) == pytest.approx(prob, rel=1e-9, abs=2e-15)
        assert losses.infinity == pytest.approx(-math.expm1(n * math.log1p(-1e-6)), rel=1e-9)
        assert losses.probs.sum() + losses.infinity == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_epsilon_does_not_depend_on_what_was_asked_before(event):
    """In sequence, after a resume, or from the statement alone: to the last bit."""

    def forget():
        for cached in (accounting._epsilon, pld.composed, pld._small_base):
            cached.cache_clear()

    forget()
    in_sequence = [accounting.epsilon(event, rounds, DELTA) for rounds in range(1, 9)]
    for rounds in (8, 3, 5):
        forget()
        assert accounting.epsilon(event, rounds, DELTA) == in_sequence[rounds - 1]
    assert in_sequence == sorted(in_sequence)


def counted(monkeypatch, module, name):
    calls, real = [], getattr(module, name)

    def call(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(module, name, call)
    return calls


def test_what_is_alike_is_composed_once(monkeypatch):
    accounting._epsilon.cache_clear()
    calls = counted(monkeypatch, accounting, "_composed")
    values = {accounting.epsilon(truncated(90, 0.1, 30, 1.5), 7, DELTA) for _ in range(100)}
    assert len(values) == len(calls) == 1
    accounting.epsilon(truncated(90, 0.1, 30, 1.5), 7, DELTA / 2)
    accounting.epsilon(truncated(90, 0.1, 30, 1.5), 7, DELTA, "replace_one")
    accounting.epsilon(truncated(90, 0.1, 30, 1.5), 7, DELTA, grid=1e-2)
    accounting.epsilon(truncated(90, 0.1, 30, 1.5), 8, DELTA)
    accounting.epsilon(truncated(90, 0.1, 30, 1.6), 7, DELTA)
    assert len(calls) == 6


def test_an_event_that_holds_a_list_is_accounted_too():
    parts = (poisson(0.1, 1.5), gaussian(4.0))
    found = [accounting.epsilon(dp_event.ComposedDpEvent(kind(parts)), 3, DELTA)
             for kind in (list, tuple)]  # fmt: skip
    assert found[0] == found[1] > 0


def test_many_unlike_clients_keep_their_bases(monkeypatch):
    """More than a cache of 32 held: from the second round on no distribution is built anew."""
    calls = counted(monkeypatch, pld, "_base_pld")
    unlike = [poisson(0.05, 4.0 + k / 100) for k in range(100)]
    for rounds in (1, 2, 3):
        for event in unlike:
            accounting.epsilon(event, rounds, DELTA, grid=5e-3)
        assert len(calls) == 100


def test_the_bases_that_are_kept_are_bounded_in_memory():
    def bytes_of(event, relation, grid):
        return sum(step.tails.nbytes for step in pld._base(event, relation, grid))

    assert pld._small_base.cache_info().maxsize * 1e6 < 2**30
    worst = truncated(5_000_000, 1e-5, 100, 0.6)
    kept = pld._small_base.cache_info().currsize, pld._large_base.cache_info().currsize
    assert bytes_of(worst, "zero_out", accounting.grid_for(worst) * (1 + 1e-9)) < 1e6
    assert pld._large_base.cache_info().currsize == kept[1]
    assert bytes_of(poisson(0.011, 1.0), "zero_out", 1e-5) < 10e6
    assert pld._large_base.cache_info().currsize == min(kept[1] + 1, 8)


TINY = (0.1, 1e-2, 2e-3, 1e-3, 1e-4, 1e-6, 1e-9, 1e-100, 1e-160, 1e-250, 5e-324)


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize(
    "make",
    [
        gaussian,
        lambda z: poisson(0.05, z),
        lambda z: truncated(100, 0.1, 14, z),
        lambda z: MixtureDpEvent((poisson(0.1, z), gaussian(z)), (0.9, 0.1)),
    ],
    ids=["gaussian", "poisson", "truncated", "mixture"],
)
def test_next_to_no_noise_is_an_upper_bound_and_no_error(make, relation):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rounds in (1, 100):
            values = [accounting.epsilon(make(z), rounds, DELTA, relation) for z in TINY]
            assert values == sorted(values)
            assert values[-1] == math.inf
            assert 80 < values[0] < math.inf
            for z in TINY:
                assert accounting.delta_for(make(z), rounds, 1.0, relation) <= 1
                accounting.rdp_epsilon(make(z), rounds, DELTA, relation)
        assert calibration.max_rounds(make(1e-6), 8.0, DELTA, relation) == 0


def test_next_to_no_noise_on_a_patient_of_several_tiles():
    assert accounting.epsilon(group(3, 0.1, 1e-6), 1, DELTA) == math.inf
    assert accounting.epsilon(group(3, 0.1, 1e-200), 1, DELTA) == math.inf


def test_rounds_are_found_by_few_compositions(monkeypatch):
    """Without being told where to look."""
    accounting._epsilon.cache_clear()
    event = truncated(300, 0.1, 60, 2.0)
    budget = accounting.epsilon(event, 137, DELTA)
    calls = counted(monkeypatch, accounting, "_composed")
    assert calibration.max_rounds(event, budget, DELTA) == 137
    fine = [call for call in calls if call[-1] is None]
    assert len(fine) <= 12


def test_asking_again_takes_no_time():
    """Ten thousand clients in a round."""
    clients = [truncated(100, 0.1, 30, 1.5) for _ in range(10_000)]
    accounting.epsilon(clients[0], 9, DELTA)
    start = time.process_time()
    for client in clients:
        accounting.epsilon(client, 9, DELTA)
    assert time.process_time() - start < 1.0
