"""Gradient inversion: tiles whose message resembles the one that was seen.

The variables of a canvas are moved by Adam until the message of what they paint lies close to the
observed one. All victims and restarts are one compiled step, which the host repeats: inside a loop
of XLA's the step would be several times slower on CPU (see `models.layers`).
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from tqdm import tqdm

from fedjax_dp.attacks.canvas import Canvas
from fedjax_dp.typing import Params, PRNGKey

Distance = Literal["squared", "cosine"]

_LEAST_SQUARE = 1e-20

_MASK_SPEED = 5.0
"""How much faster than a canvas's variables a mask's logits move: they have further to go."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack:
    """How an attacker searches.

    Attributes:
        distance: of messages: "squared", relative to the observed one's square (Zhu et al. 2019,
            equation 3), or "cosine", one minus the cosine (Geiping et al. 2020, equation 4), which
            does not see a clip's scale.
        canvas: "pixels" or "tissue", see `canvas`.
        total_variation: weight of the tile's mean absolute difference of neighbours.
        signed: whether Adam is given the gradient's signs alone (Geiping et al., section 5).
        learning_rate: of Adam, decaying to zero as a cosine.
        steps: of Adam.
        restarts: starts of every victim, of which the one with the lowest objective is kept.
        mask: "known" to the attacker, or searched "joint"ly.
        kink_width: of the smooth kinks that the network is differentiated through, see
            `models.kinks`; 0 = none.
    """

    distance: Distance = "cosine"
    canvas: Literal["pixels", "tissue"] = "tissue"
    total_variation: float = 0.05
    signed: bool = False
    learning_rate: float = 0.02
    steps: int = 1500
    restarts: int = 1
    mask: Literal["known", "joint"] = "known"
    kink_width: float = 0.15

    def __post_init__(self) -> None:
        choices = (
            self.distance in get_args(Distance)
            and self.canvas in ("pixels", "tissue")
            and self.mask in ("known", "joint")
        )
        if not choices or min(self.steps, self.restarts) < 1 or self.learning_rate <= 0:
            raise ValueError(
                "Expected distance 'squared' or 'cosine', canvas 'pixels' or 'tissue', mask "
                f"'known' or 'joint', steps and restarts >= 1, learning_rate > 0, got {self}."
            )
        if self.total_variation < 0 or self.kink_width < 0:
            raise ValueError(f"Expected total_variation and kink_width >= 0, got {self}.")


def deep_leakage() -> Attack:
    """Deep Leakage from Gradients (Zhu et al. 2019, Algorithm 1), with Adam for L-BFGS."""
    return Attack(
        distance="squared", canvas="pixels", total_variation=0.0, learning_rate=0.1, kink_width=0.0
    )


def inverting_gradients() -> Attack:
    """Inverting Gradients (Geiping et al. 2020, section 5), by signed Adam."""
    return Attack(
        canvas="pixels", signed=True, total_variation=0.1, learning_rate=0.1, kink_width=0.0
    )


class Found(NamedTuple):
    """What was rebuilt of V victims of B tiles each, the best restart of each.

    Attributes:
        images: float32 [V, B, H, W, 3] in [0, 1].
        truth: float32 [V, B, H, W, K], the mask that was known or found.
        objective: float32 [V] of the restart that was kept.
        objectives: float32 [V, R] of all.
        seconds: of the steps, without compilation.
    """

    images: np.ndarray
    truth: np.ndarray
    objective: np.ndarray
    objectives: np.ndarray
    seconds: float


def message_distance(kind: Distance, simulated: Params, observed: Params) -> Float[Array, ""]:
    """How far two messages are apart; 0 where they are equal. Finite for messages of zero."""
    pairs = list(zip(jax.tree.leaves(simulated), jax.tree.leaves(observed), strict=True))
    # Far below any message, and far above where a square root or a quotient leaves float32.
    norm = jnp.maximum(sum(jnp.vdot(b, b) for _, b in pairs), _LEAST_SQUARE)
    if kind == "squared":
        return sum(jnp.sum(jnp.square(a - b)) for a, b in pairs) / norm
    ours = jnp.maximum(sum(jnp.vdot(a, a) for a, _ in pairs), _LEAST_SQUARE)
    product = sum(jnp.vdot(a, b) for a, b in pairs)
    return 1.0 - product * (jax.lax.rsqrt(ours) * jax.lax.rsqrt(norm))


def total_variation(image: Float[Array, "H W 3"]) -> Float[Array, ""]:
    """Mean absolute difference of neighbouring pixels, down plus across."""
    down, across = (jnp.abs(jnp.diff(image, axis=axis)).mean() for axis in (0, 1))
    return down + across


def invert(
    message: Callable[..., Params],
    canvas: Canvas,
    attack: Attack,
    params: Params,
    observed: Params,
    truth: Any,
    key: PRNGKey,
    *,
    one_by_one: bool = False,
    progress: str = "",
) -> Found:
    """Searches the tiles of every victim.

    Args:
        message: from `messages.simulated`; of one victim.
        canvas: of a tile.
        attack: how to search.
        params: the public parameters that the messages start from.
        observed: the messages seen; leaves with a leading axis V.
        truth: [V, B, H, W, K], the masks; where they are searched, only the shape is looked at.
        key: of the starts.
        one_by_one: victims one after the other within a step: faster where a message takes several
            local steps, for the parameters then differ between victims.
        progress: what to call the bar; empty = none.
    """
    truth = jnp.asarray(truth, jnp.float32)
    victims, count, height, width, classes = truth.shape
    is_joint = attack.mask == "joint"

    def start(key: PRNGKey) -> Any:
        mask = jnp.zeros((count, height, width, classes)) if is_joint else ()
        return jax.vmap(canvas.init)(jax.random.split(key, count)), mask

    def painted(variables: Any, truth: Any) -> Any:
        drawn, mask = variables
        return jax.vmap(canvas.paint)(drawn), jax.nn.softmax(
            _MASK_SPEED * mask
        ) if is_joint else truth

    def objective(variables: Any, truth: Any, observed: Params, params: Params) -> Any:
        images, mask = painted(variables, truth)
        matched = message_distance(attack.distance, message(params, images, mask), observed)
        variation = jax.vmap(total_variation)(images).mean()
        return matched + attack.total_variation * variation

    schedule = optax.cosine_decay_schedule(attack.learning_rate, attack.steps)
    optimizer = optax.adam(schedule)

    def one(variables: Any, truth: Any, observed: Params, params: Params) -> Any:
        return jax.value_and_grad(objective)(variables, truth, observed, params)

    def step(variables: Any, state: Any, truth: Any, observed: Params, params: Params) -> Any:
        of_restarts = jax.vmap(one, (0, None, None, None))
        if one_by_one:

            def of_victim(victim: Any) -> Any:
                own, truth, observed = victim
                return jax.lax.map(lambda v: one(v, truth, observed, params), own)

            values, grads = jax.lax.map(of_victim, (variables, truth, observed))
        else:
            values, grads = jax.vmap(of_restarts, (0, 0, 0, None))(
                variables, truth, observed, params
            )
        # One start that has run away must not take the others' progress bar with it.
        grads = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0.0), grads)
        if attack.signed:
            grads = jax.tree.map(jnp.sign, grads)
        updates, state = optimizer.update(grads, state, variables)
        drawn, mask = optax.apply_updates(variables, updates)
        project = jax.vmap(jax.vmap(jax.vmap(canvas.project)))
        return (project(drawn), mask), state, values

    keys = jax.random.split(key, (victims, attack.restarts))
    variables = jax.jit(jax.vmap(jax.vmap(start)))(keys)
    state = optimizer.init(variables)
    arguments = truth, observed, params
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(variables, state, *arguments).compile()
    began, values = time.perf_counter(), jnp.zeros((victims, attack.restarts))
    with tqdm(
        total=attack.steps, desc=progress, unit="step", disable=not progress, dynamic_ncols=True
    ) as bar:
        for index in range(attack.steps):
            variables, state, values = compiled(variables, state, *arguments)
            if index % 25 == 24 or index == attack.steps - 1:
                bar.set_postfix(objective=f"{float(np.nanmin(values, 1).mean()):.4f}")
                bar.update(index + 1 - bar.n)
    seconds = time.perf_counter() - began
    objectives = np.asarray(jnp.where(jnp.isfinite(values), values, jnp.inf))
    best = objectives.argmin(1)
    kept = jax.tree.map(lambda leaf: leaf[np.arange(victims), best], variables)
    images, mask = jax.jit(jax.vmap(painted))(kept, truth)
    return Found(np.asarray(images), np.asarray(mask), objectives.min(1), objectives, seconds)
