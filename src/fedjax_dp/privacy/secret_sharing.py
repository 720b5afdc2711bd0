"""Secrets in shares, of which a threshold tells all and fewer tell nothing (Shamir 1979)."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

PRIME = 2**521 - 1
"""Shares are numbers modulo this Mersenne prime; a secret of 256 bits is always below it."""


class Share(NamedTuple):
    """A point of a sharing polynomial; `point` is the holder's number, from 1."""

    point: int
    value: int


def split(
    secret: int, coefficients: Sequence[int], num_shares: int, prime: int = PRIME
) -> list[Share]:
    """Shamir's shares (1979): values of secret + c1 x + c2 x^2 + ... at 1 ... num_shares.

    Guarantees: with t - 1 coefficients, uniform and secret, any t shares give the secret and any
    t - 1 are uniform whatever the secret is.

    Raises:
        ValueError: more shares than points of the field, or a secret outside of it.
    """
    if not (0 <= secret < prime and len(coefficients) < num_shares < prime):
        raise ValueError(
            f"Expected a secret of the field and {len(coefficients)} coefficients < num_shares < "
            f"prime, got {num_shares=}. Use fewer shares or a larger prime."
        )
    shares = []
    for point in range(1, num_shares + 1):
        value = 0
        for coefficient in reversed([secret, *coefficients]):
            value = (value * point + coefficient) % prime
        shares.append(Share(point, value))
    return shares


def reconstruct(shares: Iterable[Share], threshold: int, prime: int = PRIME) -> int:
    """The secret that `threshold` shares of one polynomial determine: its value at zero.

    Raises:
        ValueError: fewer than `threshold` shares of different holders.
    """
    values = dict(list(dict(shares).items())[:threshold])
    if len(values) < threshold:
        raise ValueError(
            f"Expected shares of {threshold} holders, got those of {len(values)}: they say nothing "
            "about the secret. Ask more of the clients that are left."
        )
    secret = 0
    for point, value in values.items():
        numerator, denominator = value, 1
        for other in values:
            if other != point:
                numerator = numerator * other % prime
                denominator = denominator * (other - point) % prime
        secret += numerator * pow(denominator, -1, prime)
    return secret % prime
