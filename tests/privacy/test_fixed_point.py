"""Sums of words are sums of numbers: nothing overflows unseen, and a device encodes the same."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_dp.privacy.fixed_point import FixedPoint, fixed_point

DTYPES = {32: np.uint32, 64: np.uint64}


def modular_sum(messages):
    stacked = np.stack(list(messages))
    return np.sum(stacked, axis=0, dtype=stacked.dtype)


@pytest.mark.parametrize("word_bits", [32, 64])
@pytest.mark.parametrize("max_abs", [1.0, 0.3, 1e-6, 12345.678])
@pytest.mark.parametrize("num_clients", [1, 2, 6, 1000])
def test_the_finest_step_that_cannot_overflow(max_abs, num_clients, word_bits):
    fixed = fixed_point(max_abs, num_clients, word_bits)
    limit = 2 ** (word_bits - 1) - 1
    assert num_clients * fixed.max_word <= limit
    assert num_clients * round(2 * max_abs / fixed.step) > limit
    assert fixed.max_word >= 2 ** (word_bits - 2) / num_clients - 1
    with pytest.raises(ValueError, match="exceed the"):
        FixedPoint(
            step=fixed.step / 2, max_abs=max_abs, num_clients=num_clients, word_bits=word_bits
        )


@pytest.mark.parametrize("word_bits", [32, 64])
def test_representable_values_survive_and_others_move_by_half_a_step(word_bits):
    fixed = fixed_point(3.0, 6, word_bits)
    rng = np.random.default_rng(0)
    largest = min(fixed.max_word, 2**53)
    steps = np.append(rng.integers(-largest, largest, 1000), [largest, -largest, 0, 1, -1])
    values = steps * fixed.step
    np.testing.assert_array_equal(fixed.decode(fixed.encode(values)), values)
    values = rng.uniform(-3, 3, (20, 50)).astype(np.float32)
    decoded = fixed.decode(fixed.encode(values))
    error = np.abs(decoded - values).max()
    assert error <= fixed.step / 2
    if word_bits == 32:
        assert error > 0.4 * fixed.step
    assert decoded.shape == values.shape
    assert fixed.decode(fixed.encode(values), np.float32).dtype == np.float32


def test_halves_go_to_the_even_step_and_negative_words_to_two_s_complement():
    fixed = FixedPoint(step=0.25, max_abs=4.0, num_clients=2)
    halves = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5]) * 0.25
    expected = [0, 2, 2, 0, 2**32 - 2, 2**32 - 2]
    assert fixed.encode(halves).tolist() == expected
    assert fixed.encode(halves).dtype == np.uint32


def test_a_device_encodes_the_same_words():
    fixed = fixed_point(4.0, 6)
    rng = np.random.default_rng(0)
    halves = (np.arange(-50, 50) + 0.5) * fixed.step
    values = np.concatenate([rng.normal(0, 1, 1000).clip(-4, 4), halves, [4, -4, 1e-30]])
    values = values.astype(np.float32)

    @jax.jit
    def encode(x):
        return jnp.round(x / fixed.step).astype(jnp.int32).view(jnp.uint32)

    np.testing.assert_array_equal(encode(values), fixed.encode(values))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, np.nextafter(3.0, 4), -3.5])
def test_what_does_not_fit_is_an_error_that_shows_no_value(value):
    fixed = fixed_point(3.0, 6)
    fixed.encode(np.array([3.0, -3.0]))
    with pytest.raises(OverflowError, match=r"^1 of 2 values .* max_abs=3\.0"):
        fixed.encode(np.array([1.0, value]))


@pytest.mark.parametrize("word_bits", [32, 64])
@pytest.mark.parametrize("num_clients", [2, 3, 6])
def test_sums_of_extreme_values_reach_the_end_of_the_word(num_clients, word_bits):
    limit = 2 ** (word_bits - 1) - 1
    allowed = limit // num_clients
    max_abs = float(allowed)
    if max_abs > allowed:
        max_abs = math.nextafter(max_abs, 0)
    fixed = fixed_point(max_abs, num_clients, word_bits)
    assert fixed.step == 1.0
    assert fixed_point(math.nextafter(max_abs + 1, math.inf), num_clients, word_bits).step == 2.0
    signs = np.array([[1, -1, (-1) ** client, client % 2] for client in range(num_clients)])
    total = modular_sum(fixed.encode(row * max_abs) for row in signs)
    exact = [int(sum(column)) * int(max_abs) for column in signs.T.tolist()]
    np.testing.assert_array_equal(total.view(f"i{word_bits // 8}"), exact)
    assert limit - max(exact) < (num_clients if word_bits == 32 else num_clients * 2**10)
    np.testing.assert_array_equal(fixed.decode(total), np.array(exact, np.float64))


def test_a_word_that_is_too_small_wraps():
    fixed = fixed_point(1.0, 2)
    total = modular_sum([fixed.encode(np.array([1.0]))] * 6)  # six where two were announced
    assert fixed.decode(total) != 6.0
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(fixed.decode(total), [6.0])
    fixed = fixed_point(1.0, 6)
    total = modular_sum([fixed.encode(np.array([1.0]))] * 6)
    np.testing.assert_array_equal(fixed.decode(total), [6.0])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"step": 0.3}, "power of two"),
        ({"step": 0.0}, "power of two"),
        ({"step": -1.0}, "power of two"),
        ({"step": math.nan}, "power of two"),
        ({"step": 2.0**-130}, "power of two"),
        ({"max_abs": 0.0}, "max_abs=0.0"),
        ({"max_abs": math.inf}, "max_abs=inf"),
        ({"max_abs": math.nan}, "max_abs=nan"),
        ({"max_abs": 1e300}, "float32's range"),
        ({"num_clients": 0}, "num_clients=0"),
        ({"word_bits": 16}, "word_bits=16"),
        ({"step": 2.0**-31}, "exceed the 32-bit word"),
    ],
)
def test_encodings_that_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        FixedPoint(**{"step": 2.0**-20, "max_abs": 1.0, "num_clients": 2, **options})


def test_words_of_another_size_are_refused():
    with pytest.raises(ValueError, match="uint32, got uint64"):
        fixed_point(1.0, 2).decode(np.zeros(3, np.uint64))
