"""The clip norm follows a quantile of the norms it clips, by a noised count of those below it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class AdaptiveClipping(NamedTuple):
    """How the clip norm moves.

    Attributes:
        target_quantile: the fraction of norms that shall lie below the clip norm, in (0, 1).
        learning_rate: of the logarithm of the clip norm, > 0.
    """

    target_quantile: float
    learning_rate: float


def adaptive_clipping(target_quantile: float = 0.5, learning_rate: float = 0.2) -> AdaptiveClipping:
    """Checked settings of Andrew et al. 2021; the defaults are theirs.

    Raises:
        ValueError: a number is out of range.
    """
    if not 0 < target_quantile < 1:
        raise ValueError(
            f"Expected 0 < privacy.clip_quantile < 1, got {target_quantile=}. 0.5 follows the "
            "median norm."
        )
    if not learning_rate > 0:
        raise ValueError(f"Expected privacy.clip_learning_rate > 0, got {learning_rate=}.")
    return AdaptiveClipping(target_quantile, learning_rate)


def centred_count(units: Any, clipped: Any, non_finite: Any) -> Float[Array, ""]:
    """The sum of (b - 1/2) over real units, b = 1 where a unit's norm is at most the clip norm.

    Guarantee: one unit moves it by at most 1/2, padding and units that are not finite by nothing.
    """
    finite = units - non_finite
    return finite / 2 - clipped


def adapt(scale: Any, centred: Any, settings: AdaptiveClipping) -> Any:
    """The next clip norm, as a multiple of the first: C exp(-eta (b - gamma)).

    Guarantee: post-processing of the noised count. `centred` is the noised sum of (b - 1/2) over a
    PUBLIC number, the expected one: never over how many there were.

    Args:
        scale: the present multiple, any shape.
        centred: the noised mean of (b - 1/2), of the same shape or a scalar.
        settings: from `adaptive_clipping`.

    References:
        Andrew, Thakkar, McMahan, Ramaswamy 2021, "Differentially Private Learning with Adaptive
        Clipping", Algorithm 1 (geometric updates, section 2.1).
    """
    step = settings.learning_rate * (centred + 0.5 - settings.target_quantile)
    # One bad draw of the count must not throw the clip norm out of float32's range.
    return jnp.clip(scale * jnp.exp(-step), 1e-6, 1e6)
