"""Real numbers as integers modulo a power of two, so that sums are exact and can be masked."""

import dataclasses
import math
from typing import Literal

import numpy as np

WordBits = Literal[32, 64]


WORDS: dict[int, tuple[np.dtype, np.dtype]] = {
    32: (np.dtype(np.uint32), np.dtype(np.int32)),
    64: (np.dtype(np.uint64), np.dtype(np.int64)),
}
"""Unsigned and signed type of a word, by its bits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedPoint:
    """Real numbers as integers in two's complement; `fixed_point` chooses the step.

    The word of x is `round_half_to_even(x / step) mod 2**word_bits`. As the step is a power of
    two, the quotient is exact in float32 as in float64: a device that rounds `x / step` half to
    even, converts it to a signed word and adds that modulo 2**word_bits has the same words.

    Guarantees: the sum of `num_clients` encoded vectors fits the signed word, so the modular sum
    decodes to the plain one. Rounding moves a coordinate by step / 2 at most; it happens before the
    sum, so whoever accounts the sum counts it in the sensitivity.

    Attributes:
        step: value of one unit in the last place, a power of two.
        max_abs: largest magnitude of a coordinate.
        num_clients: how many vectors are summed at most.
        word_bits: 32 or 64.

    Raises:
        ValueError: the sum could overflow, or the step is no power of two.
    """

    step: float
    max_abs: float
    num_clients: int
    word_bits: WordBits = 32

    def __post_init__(self) -> None:
        check_word_bits(self.word_bits)
        _check_range(self.max_abs, self.num_clients)
        # A device that flushes subnormal float32 to zero would encode finer steps differently.
        if not 2.0**-126 <= self.step <= 2.0**127 or math.frexp(self.step)[0] != 0.5:
            raise ValueError(
                f"Expected a step that is a power of two in float32's range, got "
                f"step={self.step!r}. Let fixed_point choose it, or scale the values."
            )
        if self.num_clients * self.max_word > _largest(self.word_bits):
            raise ValueError(
                f"{self.num_clients} clients times {self.max_word} steps exceed the "
                f"{self.word_bits}-bit word. Use a larger step than {self.step!r}, 64-bit words, "
                "or a smaller max_abs."
            )

    @property
    def max_word(self) -> int:
        """Magnitude of the largest encoded coordinate, in steps."""
        return round(self.max_abs / self.step)

    def encode(self, values: np.ndarray) -> np.ndarray:
        """The words of `values`.

        Args:
            values: floating-point array of any shape, each |value| <= max_abs.

        Returns:
            uint32 or uint64 of the same shape.

        Raises:
            OverflowError: a value is not finite or exceeds `max_abs`; the message shows none, for
                they are private. It never is raised where `max_abs` follows from the clip norm and
                the reach of the noise, or where noised values are clamped to it.
        """
        values = np.asarray(values, np.float64)
        outside = int(np.count_nonzero(~(np.abs(values) <= self.max_abs)))
        if outside:
            raise OverflowError(
                f"{outside} of {values.size} values are not finite or exceed "
                f"max_abs={self.max_abs!r}. Clamp the noised values, or raise max_abs."
            )
        unsigned, signed = WORDS[self.word_bits]
        return np.rint(values / self.step).astype(signed).view(unsigned)

    def decode(self, words: np.ndarray, dtype: type[np.floating] = np.float64) -> np.ndarray:
        """The values of `words`, those of a modular sum included, as `dtype`.

        Exact up to the precision of `dtype`: float64 holds 53 bits, float32 24.
        """
        unsigned, signed = WORDS[self.word_bits]
        words = np.asarray(words)
        check_dtype(words, unsigned)
        return (words.view(signed) * np.float64(self.step)).astype(dtype)


def fixed_point(max_abs: float, num_clients: int, word_bits: WordBits = 32) -> FixedPoint:
    """The finest encoding for which the sum of the clients' vectors cannot overflow.

    Guarantees: of all powers of two the smallest step with
    `num_clients * round(max_abs / step) <= 2**(word_bits - 1) - 1`; hence at least
    `2**(word_bits - 2) / num_clients - 1` steps from zero to `max_abs`.

    Args:
        max_abs: largest magnitude of a coordinate of one client's vector, noise included.
        num_clients: how many vectors are summed at most.
        word_bits: 32 or 64.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> fixed_point(1.0, num_clients=6).step == 2.0**-28
        True
    """
    check_word_bits(word_bits)
    _check_range(max_abs, num_clients)
    allowed = _largest(word_bits) // num_clients
    exponent = math.frexp(max_abs)[1] - word_bits  # here max_abs fills more than the signed word
    while round(math.ldexp(max_abs, -exponent)) > allowed:
        exponent += 1
    return FixedPoint(
        step=math.ldexp(1.0, exponent),
        max_abs=max_abs,
        num_clients=num_clients,
        word_bits=word_bits,
    )


def _largest(word_bits: int) -> int:
    return 2 ** (word_bits - 1) - 1


def check_word_bits(word_bits: int) -> None:
    """Refuses a size of words that no type has."""
    if word_bits not in WORDS:
        raise ValueError(f"Expected word_bits 32 or 64, got {word_bits=}.")


def _check_range(max_abs: float, num_clients: int) -> None:
    if not 0 < max_abs < 2.0**128 or num_clients < 1:
        raise ValueError(
            f"Expected max_abs in float32's range, > 0, and num_clients >= 1, got {max_abs=}, "
            f"{num_clients=}. Scale the values."
        )


def check_dtype(words: np.ndarray, dtype: np.dtype) -> None:
    """Refuses words of another type."""
    if words.dtype != dtype:
        raise ValueError(f"Expected words of {dtype}, got {words.dtype}. Encode the values first.")
