"""The two worlds of the audit: real client updates with and without a canary, many times over.

The canary is a Dirac: under a linear loss its gradient is one huge coordinate, whatever the
parameters are, so nothing but clip and noise stands between it and who looks at that coordinate
(Nasr et al. 2023, section 4). Everything that makes a release private is the library's own: the
sampler, the client's update or share, the masks, the aggregator, keys derived from secrets. The
trials are mapped by `vmap`, for the parameters are few.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.audit_cases import DIMENSION, Case
from fedjax_dp.federated.aggregators import noised_sum, secure_sum
from fedjax_dp.federated.client import client_update
from fedjax_dp.federated.rounds import client_constants
from fedjax_dp.federated.share import masked_share
from fedjax_dp.privacy import discrete_gaussian
from fedjax_dp.privacy.fixed_point import fixed_point
from fedjax_dp.privacy.noise import NOISE_REACH
from fedjax_dp.privacy.secrets import SERVER, Purpose, Secrets
from fedjax_dp.privacy.secure_aggregation import SecureRound, agree
from fedjax_dp.typing import ClientKeys, ClientPlan, ServerRelease, TilePool

CHUNK = 5000
"""Trials mapped at once, at most."""

CANARY, BYSTANDER, LOST = "ash", "birch", "cedar"
PARAMS = {"canary": np.zeros((1, 1, 3), np.float32), "rest": np.zeros(DIMENSION - 3, np.float32)}


def observe(case: Case, trials: int, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yields ("in" or "out", statistics float64 [n]) chunk by chunk, `trials` of each world.

    The statistic is the canary's coordinate, summed over all releases of a trial and divided by the
    standard deviation that the mechanism promises for it. Chunks have one size, so a world may get
    a few trials more than asked for.
    """
    chunks = -(-trials // CHUNK)
    size = -(-trials // chunks)
    secrets = Secrets.from_seed((CANARY, BYSTANDER, LOST), seed)
    make = {"distributed": _distributed, "central": _central}.get(case.mechanism.placement, _local)
    release = make(case, secrets)
    scale = case.multiplier * math.sqrt(case.releases)
    for world, name in enumerate(("in", "out")):
        for chunk in range(chunks):
            total = np.zeros(size)
            for index in range(case.rounds):
                # A trial and a round together are a round index that no other trial has.
                events = (np.arange(size) + chunk * size) * case.rounds + index
                total += np.asarray(release(events.tolist(), world), np.float64)
            yield name, total / scale


def canary_loss(params: Any, images: Any, labels: Any, num_tiles: Any, keys: Any) -> Any:
    """The gradient of a tile is its content times its label, on "canary" alone."""
    del keys
    content = (images.astype(jnp.float32) - 128.0) / 100.0
    gain = labels.astype(jnp.float32)[:, :1, :1, None]
    along = jnp.sum(content * gain * params["canary"], (1, 2, 3)) + 0.0 * params["rest"].sum()
    is_padding = jnp.arange(len(images)) >= num_tiles
    return jnp.where(is_padding, 0.0, along).sum() / jnp.maximum(num_tiles, 1)


Release = Callable[[Sequence[int], int], Any]
"""`release(events, world) -> [n]`: the canary's coordinate in clip norms, summed over a round."""


def _pool(case: Case, world: int) -> TilePool:
    """Tile 0 is the canary, nothing in world 1; 1 and 2 are others of its site, 3 to 5 another's.

    They do not touch the canary's coordinate, so in both worlds its mean is what the canary makes.
    """
    images = np.full((6, 1, 1, 3), 128, np.uint8)
    if world == 0:
        images[0, 0, 0, 0] = 228
    for tile in range(1, 6):
        images[tile, 0, 0, 1 + tile % 2] = 100 + 30 * tile
    labels = np.ones((6, 1, 1), np.uint8)
    labels[0] = case.size
    return TilePool(jnp.asarray(images), jnp.asarray(labels))


def _plans(case: Case, secrets: Secrets, owner: str, events: Sequence[int], world: int) -> Any:
    """One draw an event, stacked; where everything is always drawn a single plan for all."""
    m, first = case.mechanism, 3 * (owner == BYSTANDER)
    owned = [np.array([first + unit]) for unit in range(m.num_units)]
    if not case.is_sampled:
        events = events[:1]
    draws = [m.sample(secrets.rng(owner, e, Purpose.SAMPLING, world), owned) for e in events]
    plan = ClientPlan(*(np.stack(parts) for parts in zip(*draws, strict=True)))
    return plan if case.is_sampled else jax.tree.map(lambda leaf: leaf[0], plan)


def _noise_keys(secrets: Secrets, owner: str, events: Sequence[int], world: int) -> Any:
    """Typed keys [n], derived as `rounds.client_input` and `RoundMaker` derive them."""
    purpose = Purpose.SERVER_NOISE if owner == SERVER else Purpose.NOISE
    data = np.stack([secrets.key_data(owner, event, purpose, world) for event in events])
    return jax.random.wrap_key_data(jnp.asarray(data), impl="threefry2x32")


def _unused_key() -> Any:
    """Of augmentation, which the linear loss has not."""
    return jax.random.key(0, impl="threefry2x32")


def _local(case: Case, secrets: Secrets) -> Release:
    """What the server sees of "dp_sgd", "update" and "update_unclipped"."""
    m = case.mechanism
    update = client_update(
        canary_loss,
        optax.sgd(1.0),
        placement=m.placement,  # type: ignore[arg-type]
    )
    constants = client_constants(m, 1.0)

    def one(noise_key: Any, plan: Any, pool: Any) -> Any:
        keys = ClientKeys(noise_key, _unused_key())
        delta, _, _ = update(PARAMS, keys, (), constants, plan, pool)
        return -delta["canary"][0, 0, 0]

    mapped = jax.jit(jax.vmap(one, (0, 0 if case.is_sampled else None, None)))
    divisor = m.expected_batch_size if m.placement == "dp_sgd" else 1.0

    def release(events: Sequence[int], world: int) -> Any:
        keys = _noise_keys(secrets, CANARY, events, world)
        plans = _plans(case, secrets, CANARY, events, world)
        return mapped(keys, plans, _pool(case, world)) * (divisor / m.l2_clip_norm)

    return release


def _central(case: Case, secrets: Secrets) -> Release:
    """What whoever sees the model of "central" sees; the canary is a client, another is there."""
    m, aggregator = case.mechanism, noised_sum()
    update = jax.jit(client_update(canary_loss, optax.sgd(1.0), placement="central"))
    constants = client_constants(m, 1.0)
    divisor = 2.0 * m.cohort_prob * m.relative_weight

    def opened(acc: Any, key: Any) -> Any:
        stddev = np.float32(m.server_noise_stddev)
        made = ServerRelease(divisor=np.float32(divisor), noise_key=key, noise_stddev=stddev)
        return -aggregator.finish(acc, made)[0]["canary"][0, 0, 0]

    mapped = jax.jit(jax.vmap(opened, (None, 0)))

    def release(events: Sequence[int], world: int) -> Any:
        acc, keys = aggregator.init(PARAMS), ClientKeys(_unused_key(), _unused_key())
        for owner in (CANARY, BYSTANDER):  # no coin and no noise of theirs: one message for all
            plan = _plans(case, secrets, owner, events, world)
            message, _, _ = update(PARAMS, keys, (), constants, plan, _pool(case, world))
            acc = aggregator.add(acc, message, constants.weight)
        noise_keys = _noise_keys(secrets, SERVER, events, world)
        return mapped(acc, noise_keys) * (divisor / m.l2_clip_norm)

    return release


def _distributed(case: Case, secrets: Secrets) -> Release:
    """What the server of secure aggregation opens, or what one share is without its mask.

    Three clients share the noise and one of them drops out of every round, as many as may.
    """
    m = case.mechanism
    is_discrete, constants = m.noise == "discrete_gaussian", client_constants(m, 1.0)
    max_abs = m.capacity + NOISE_REACH * m.share_stddev(m.num_shares) / m.l2_clip_norm
    step = 1.0 / m.levels if is_discrete else fixed_point(max_abs, m.num_shares).step
    share = masked_share(canary_loss, step=step, levels=m.levels if is_discrete else None)
    aggregator = secure_sum(PARAMS, step)

    def one(noise_key: Any, mask: Any, integers: Any, plan: Any, pool: Any) -> Any:
        keys = ClientKeys(noise_key, _unused_key(), mask, integers)
        return share(PARAMS, keys, (), constants, plan, pool)[0]

    def opened(words: Any, unmask: Any) -> Any:
        acc = aggregator.init(PARAMS)
        for message in words:
            acc = aggregator.add(acc, message, np.float32(1))
        return -aggregator.finish(acc, ServerRelease(unmask=unmask))[0]["canary"][0, 0, 0]

    mapped = jax.jit(jax.vmap(one, (0, 0, 0, 0 if case.is_sampled else None, None)))
    opens = jax.jit(jax.vmap(opened))

    def release(events: Sequence[int], world: int) -> Any:
        secure, messages, masks = _session(case, secrets, events, world), [], []
        for owner in (CANARY, BYSTANDER):
            mask = secure.mask(owner).reshape(-1, DIMENSION)
            integers = np.zeros(mask.shape, np.int32)
            if is_discrete:
                rng = secrets.rng(owner, events[0], Purpose.INTEGER_NOISE, world)
                drawn = discrete_gaussian.sample(rng, m.share_variance(m.num_shares), mask.shape)
                integers = drawn.astype(np.uint32).view(np.int32)
            keys = _noise_keys(secrets, owner, events, world)
            plans = _plans(case, secrets, owner, events, world)
            messages.append(mapped(keys, mask, integers, plans, _pool(case, world)))
            masks.append(mask)
        if case.sees_share:
            words = np.asarray(messages[0]) - masks[0]
            return words.view(np.int32)[:, 0] * step
        unmask = secure.unmask((CANARY, BYSTANDER)).reshape(-1, DIMENSION)
        return opens(jnp.stack(messages, 1), unmask)

    return release


def _session(case: Case, secrets: Secrets, events: Sequence[int], world: int) -> SecureRound:
    """One session whose long messages are those of all trials, end to end."""

    def seed(client: str, peer: str = "") -> bytes:
        key = secrets.derive(client, events[0], Purpose.MASK, world)
        return hashlib.blake2b(peer.encode(), key=key, digest_size=32).digest()

    return SecureRound(
        (CANARY, BYSTANDER, LOST),
        client_seed=seed,
        pair_seed=lambda u, v: agree(seed(u, v), seed(v, u)),
        num_words=len(events) * DIMENSION,
        max_dropouts=case.mechanism.max_dropouts,
    )
