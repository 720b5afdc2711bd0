"""What a privacy guarantee says about picking a record out of candidates."""

import math

from dp_accounting import dp_event
from scipy import optimize

from fedjax_dp.privacy.accounting import delta_for
from fedjax_dp.privacy.events import Relation

_FARTHEST = 10.0
"""At a smaller epsilon than minus this the bound is within 1e-4 of one."""


def identification_bound(
    event: dp_event.DpEvent,
    count: int,
    num_candidates: int,
    relation: Relation = "zero_out",
) -> float:
    """The largest probability with which any attacker names the target among equal candidates.

    The target is drawn uniformly from N candidates and takes part in the messages. Had it not, any
    guess would be right with probability 1/N; whatever happens with probability p then happens
    with at most e^epsilon p + delta(epsilon) now, at every epsilon. The smallest of
    e^epsilon / N + delta(epsilon) is returned; it bounds identification, not the likeness of a
    picture, and holds for an attacker who knows everything else.

    Args:
        event: what makes a message, without the amplification of a sampling the attacker sees
            through: here he knows that the target was drawn.
        count: messages about the same target.
        num_candidates: N >= 1.
        relation: of the event, under which the target's contribution vanishes.

    Returns:
        At least 1/N and at most 1; 1 without a guarantee.

    Raises:
        ValueError: no candidate.

    References:
        Balle, Cherubin and Hayes 2022, "Reconstructing Training Data with Informed Adversaries";
        Hayes, Mahloujifar and Balle 2023, "Bounding Training Data Reconstruction in DP-SGD",
        Theorem 2, of which this is the bound for a uniform prior over candidates.
    """
    if num_candidates < 1:
        raise ValueError(f"Expected num_candidates >= 1, got {num_candidates}.")

    def bound(epsilon: float) -> float:
        delta = delta_for(event, count, abs(epsilon), relation)
        if epsilon < 0:  # the same inequality, of the complement and the other direction
            delta = 1 - math.exp(epsilon) * (1 - delta)
        return math.exp(epsilon) / num_candidates + delta

    # Every epsilon gives a bound, so a search that ends beside the smallest is safe.
    sides = [(-_FARTHEST, 0.0), (0.0, max(math.log(num_candidates), 1e-9))]
    found = [optimize.minimize_scalar(bound, bounds=side, method="bounded") for side in sides]
    return min(1.0, bound(0.0), *(float(side.fun) for side in found))
