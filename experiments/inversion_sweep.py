"""The sweep behind `experiments.inversion`: tiles, settings, attacks, scores; kept as it goes."""

import dataclasses
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from dp_accounting import dp_event

from fedjax_dp.assembly.federation import load_federation
from fedjax_dp.attacks import scores
from fedjax_dp.attacks.canvas import tissue
from fedjax_dp.attacks.inversion import Attack, invert
from fedjax_dp.attacks.messages import Sent, one_hot, sent_message, simulated, unit_loss
from fedjax_dp.config import Config
from fedjax_dp.inference.model import load_run
from fedjax_dp.models.layers import default_conv_variant
from fedjax_dp.models.unet import unet
from fedjax_dp.privacy.accounting import epsilon
from fedjax_dp.privacy.reconstruction import identification_bound
from fedjax_dp.reporting.progress import busy

_LEAST_CONTRAST = 0.04
"""Standard deviation of a tile's pixels below which it is taken for empty, and not attacked."""

_SMALLEST = 11
"""Side of the window of the structural similarity."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of `experiments.inversion`, of the same names."""

    checkpoints: tuple[str, ...] = ("fresh",)
    site: str = ""
    split: str = "test"
    tile_size: int = 32
    victims: int = 4
    candidates: int = 64
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    noise_multipliers: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 0.1, 0.65, 3.7)
    l2_clip_norm: float = 0.5
    update_clip_norm: float = 0.01
    local_steps: int = 4
    local_learning_rate: float = 0.01
    steps: int = 1500
    batch_steps: int = 750
    restarts: int = 1
    mask: str = "known"
    delta: float = 1e-5
    seed: int = 0


class Setting(NamedTuple):
    """One column of the report.

    Attributes:
        name: for people.
        sent: what the client sends.
        tiles: B, in the message.
    """

    name: str
    sent: Sent
    tiles: int = 1


class Tiles(NamedTuple):
    """The tiles of one site.

    Attributes:
        site: its name.
        images: float32 [N, H, W, 3] in [0, 1], the candidates.
        labels: uint8 [N, H, W].
        classes: K.
        is_public: whether they are nobody's tissue.
    """

    site: str
    images: np.ndarray
    labels: np.ndarray
    classes: int
    is_public: bool


class Target(NamedTuple):
    """A network under attack.

    Attributes:
        name: "fresh", or the last two folders of the run.
        params: its parameters.
        apply: as the client computes.
        kinked: as the attacker does, with smooth kinks in second derivatives.
        digest: of the parameters.
    """

    name: str
    params: Any
    apply: Any
    kinked: Any
    digest: str


def settings(options: Options) -> list[Setting]:
    """What is attacked: unprotected first, then clipped, then ever more noise."""
    clip, steps = options.l2_clip_norm, options.local_steps
    found = [
        Setting("one tile" if count == 1 else f"batch of {count}", Sent(), count)
        for count in options.batch_sizes
    ]
    local: dict[str, Any] = {"local_steps": steps, "learning_rate": options.local_learning_rate}
    if steps > 1:
        found.append(Setting(f"{steps} local steps", Sent(**local)))
    found.append(Setting("clipped, no noise", Sent(placement="dp_sgd", l2_clip_norm=clip)))
    found += [
        Setting(f"noise {z:g}", Sent(placement="dp_sgd", l2_clip_norm=clip, noise_multiplier=z))
        for z in options.noise_multipliers
    ]
    if steps > 1 and options.noise_multipliers:
        z = options.noise_multipliers[-1]
        sent = Sent(
            placement="update", l2_clip_norm=options.update_clip_norm, noise_multiplier=z, **local
        )
        found.append(Setting(f"update, noise {z:g}", sent))
    return found


def sweep(
    config: Config, options: Options, folder: pathlib.Path
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Attacks every setting on every checkpoint; what `folder` holds already is not done again.

    Returns:
        The report, as in `inversion.json`, and the pictures: "original" uint8 [V, H, W, 3] and one
        of "checkpoint/setting" each.

    Raises:
        ValueError: an option does not fit the data, or a checkpoint is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Settings that differ in their noise alone are attacked by the same program.
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    tiles = choose_tiles(config, options)
    targets = [load_target(name, config, tiles.classes, options) for name in options.checkpoints]
    called = [target.name for target in targets]
    if len(set(called)) < len(called) or not called:
        raise ValueError(f"Expected --checkpoints of different names, at least one, got {called}.")
    report: dict[str, Any] = {
        "options": dataclasses.asdict(options),
        "site": tiles.site,
        "split": options.split,
        "is_public": tiles.is_public,
        "tile_size": options.tile_size,
        "threat": "honest-but-curious server that knows parameters, learning rate, clip norm, the "
        "number of tiles" + (" and the masks" if options.mask == "known" else ""),
        "checkpoints": {},
    }
    pictures = {"original": np.round(tiles.images[: options.victims] * 255).astype(np.uint8)}
    for target in targets:
        rows = []
        for setting in settings(options):
            row, drawn = _attacked(target, setting, tiles, options, folder)
            rows.append(row)
            pictures[f"{target.name}/{setting.name}"] = drawn
        report["checkpoints"][target.name] = rows
    return report, pictures


def choose_tiles(config: Config, options: Options) -> Tiles:
    """Candidates, drawn at random from the site's tiles that are not empty; victims come first."""
    federation = load_federation(config, progress=True)
    table = getattr(federation, options.split)
    sizes = {site: len(table.of_site(site)) for site in table.sites}
    site = options.site or max(sizes, key=lambda name: sizes[name], default="")
    if not sizes.get(site):
        raise ValueError(
            f"Expected --site among those with {options.split} tiles, {sorted(sizes)}, got "
            f"{site!r}."
        )
    side = table.images.shape[1]
    if not _SMALLEST <= options.tile_size <= side or options.tile_size % 2**config.model.depth:
        raise ValueError(
            f"Expected --tile_size from {_SMALLEST} to {side} and a multiple of 2**model.depth = "
            f"{2**config.model.depth}, got {options.tile_size}."
        )
    begin = (side - options.tile_size) // 2
    window = slice(begin, begin + options.tile_size)
    index = table.of_site(site)
    images = np.stack([table.images[i][window, window] for i in index]).astype(np.float32) / 255
    labels = np.stack([table.labels[i][window, window] for i in index])
    is_full = (images.std((1, 2)).mean(-1) > _LEAST_CONTRAST) & (labels != 255).all((1, 2))
    usable = np.flatnonzero(is_full)
    largest = max(options.batch_sizes, default=1)
    # Tiles that are in no victim's message are the prior, and fill the batches of candidates.
    count = max(options.candidates + largest - 1, 2 * _messages(options.victims, largest).size)
    if len(usable) < count:
        raise ValueError(
            f"Expected at least {count} {options.split} tiles with tissue of {site}, got "
            f"{len(usable)}. Lower --candidates, --victims or --batch_sizes, or take another "
            "--split or --site."
        )
    order = np.random.default_rng(options.seed).permutation(usable)
    chosen = order[:count]
    return Tiles(
        site,
        images[chosen],
        labels[chosen],
        len(federation.class_names),
        federation.is_public,
    )


def load_target(name: str, config: Config, classes: int, options: Options) -> Target:
    """The network of a finished run, or an untrained one of `config.model`."""
    run = None if name == "fresh" else load_run(pathlib.Path(name))
    if run is not None and len(run.class_names) != classes:
        raise ValueError(f"Expected a run of {classes} classes, got {run.class_names} from {name}.")
    model = (config if run is None else run.config).model

    def network(kink_width: float) -> Any:
        return unet(
            classes,
            base_channels=model.base_channels,
            depth=model.depth,
            num_groups=model.num_groups,
            standardize=model.standardize,
            conv_variant=default_conv_variant(jax.default_backend()),
            kink_width=kink_width,
        )

    init, apply = network(0.0)
    params = init(jax.random.key(options.seed)) if run is None else run.params
    digest = hashlib.blake2b(
        b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(params)),
        digest_size=8,
    )
    label = "fresh" if run is None else "-".join(pathlib.Path(name).parts[-2:])
    return Target(label, params, apply, network(_attack(options, 1).kink_width)[1],
                  digest.hexdigest())  # fmt: skip


def _attack(options: Options, steps: int) -> Attack:
    return Attack(steps=steps, restarts=options.restarts, mask=options.mask)  # type: ignore[arg-type]


def _messages(victims: int, count: int) -> np.ndarray:
    """Tiles of each attacked message, int [messages, B]: all victims, and what fills the last."""
    messages = -(-victims // count)
    return np.arange(messages * count).reshape(messages, count)


def _attacked(
    target: Target, setting: Setting, tiles: Tiles, options: Options, folder: pathlib.Path
) -> tuple[dict[str, Any], np.ndarray]:
    """The row of a setting and its pictures, from `folder` where they lie there."""
    told = dataclasses.asdict(setting.sent) | dataclasses.asdict(options) | {
        "parameters": target.digest,
        "tiles": hashlib.blake2b(tiles.images.tobytes(), digest_size=8).hexdigest(),
        "count": setting.tiles,
    }  # fmt: skip
    for name in ("checkpoints", "batch_sizes", "noise_multipliers"):  # which others there are
        del told[name]
    digest = hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()
    path = folder / "attacked" / f"{digest}.npz"
    if not path.exists():
        row, drawn = attack_setting(target, setting, tiles, options)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez_compressed(partial, row=json.dumps(row), drawn=drawn)
        partial.rename(path)
    with np.load(path) as kept:
        return json.loads(str(kept["row"])) | {"setting": setting.name}, kept["drawn"]


def attack_setting(
    target: Target, setting: Setting, tiles: Tiles, options: Options
) -> tuple[dict[str, Any], np.ndarray]:
    """Inverts the victims' messages of one setting, and scores what was found."""
    sent, count = setting.sent, setting.tiles
    title = f"{target.name}, {setting.name}"
    truth = np.asarray(one_hot(jnp.asarray(tiles.labels), tiles.classes))
    chosen = _messages(options.victims, count)
    send = jax.jit(sent_message(unit_loss(target.apply), sent))
    alone = jax.jit(simulated(unit_loss(target.apply), sent))
    key = jax.random.fold_in(jax.random.key(options.seed), 1)
    with busy(f"{title}: what is sent"):
        observed = [
            send(target.params, tiles.images[some], truth[some], jax.random.fold_in(key, number))
            for number, some in enumerate(chosen)
        ]
    attack = _attack(options, options.steps if count * sent.local_steps == 1
                     else options.batch_steps)  # fmt: skip
    prior = np.setdiff1d(np.arange(len(tiles.images)), chosen)
    canvas = tissue(options.tile_size, tiles.images[prior].mean((0, 1, 2)))
    start = time.perf_counter()
    found = invert(
        simulated(unit_loss(target.kinked), sent),
        canvas,
        attack,
        target.params,
        jax.tree.map(lambda *leaves: np.stack(leaves), *observed),
        truth[chosen],
        jax.random.fold_in(jax.random.key(options.seed), 2),
        one_by_one=sent.local_steps > 1,
        progress=title,
    )
    row = {
        "placement": sent.placement,
        "count": count,
        "local_steps": sent.local_steps,
        "l2_clip_norm": sent.l2_clip_norm if math.isfinite(sent.l2_clip_norm) else None,
        "noise_multiplier": sent.noise_multiplier,
        "objective": found.objective.tolist(),
        "seconds_per_message": found.seconds / len(chosen),
        "seconds_with_compilation": time.perf_counter() - start,
        "attack": dataclasses.asdict(attack),
    }
    row |= _reconstruction(found, tiles, chosen, prior, options)
    row["identification"] = _identification(target, setting, tiles, truth, options, send, alone)
    rebuilt = [
        images[scores.pairing(images, tiles.images[some])]
        for images, some in zip(found.images, chosen, strict=True)
    ]
    drawn = np.concatenate(rebuilt)[: options.victims]
    return row, np.round(drawn * 255).astype(np.uint8)


def _reconstruction(
    found: Any, tiles: Tiles, chosen: np.ndarray, prior: np.ndarray, options: Options
) -> dict[str, Any]:
    """Scores of all rebuilt tiles, and of guesses that know nothing, means over all of them."""
    rng = np.random.default_rng(options.seed)
    ours: list[scores.TileScores] = []
    guesses: dict[str, list[scores.TileScores]] = {}
    ranks, dices = [], []
    for images, masks, some in zip(found.images, found.truth, chosen, strict=True):
        true = tiles.images[some]
        ours.append(scores.tile_scores(images, true))
        for name, guess in scores.priors(true, tiles.images[prior], rng).items():
            guesses.setdefault(name, []).append(guess)
        for own, tile in zip(scores.pairing(images, true), some, strict=True):
            # Not against those who are in the same message: they would be right answers too.
            rivals = np.setdiff1d(np.arange(len(tiles.images)), np.setdiff1d(some, tile))
            target = int(np.searchsorted(rivals, tile))
            ranks.append(scores.rank_by_resemblance(images[own], tiles.images[rivals], target))
            if options.mask == "joint":
                dices.append(scores.mask_dice(masks[own].argmax(-1), tiles.labels[tile]))
    result: dict[str, Any] = {
        "scores": _means(ours),
        "priors": {name: _means(guess) for name, guess in guesses.items()},
        "identified_by_resemblance": scores.success(ranks),
    }
    if options.mask == "joint":
        known = [dice for dice in dices if dice is not None]
        result["mask_dice"] = float(np.mean(known)) if known else None
    return result


def _means(all_scores: Sequence[scores.TileScores]) -> dict[str, float]:
    return {
        name: float(np.concatenate([getattr(one, name) for one in all_scores]).mean())
        for name in scores.TileScores._fields
    }


def _identification(
    target: Target,
    setting: Setting,
    tiles: Tiles,
    truth: np.ndarray,
    options: Options,
    send: Any,
    alone: Any,
) -> dict[str, Any]:
    """How often the target is named from the message itself, each candidate once the target."""
    sent, count = setting.sent, setting.tiles
    number = options.candidates
    key = jax.random.fold_in(jax.random.key(options.seed), 3)
    rng = np.random.default_rng(options.seed)

    def flat(message: Any) -> np.ndarray:
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(message)])

    with busy(f"{target.name}, {setting.name}: naming the target"):
        messages = np.stack(
            [
                flat(alone(target.params, tiles.images[i : i + 1], truth[i : i + 1]))
                for i in range(number)
            ]
        )
        ranks = []
        for victim in range(number):
            # The others of the batch are no candidates: naming one of them would be right too.
            others = rng.choice(np.arange(number, len(tiles.images)), count - 1, replace=False)
            some = np.array([victim, *others])
            seen = send(
                target.params, tiles.images[some], truth[some], jax.random.fold_in(key, victim)
            )
            ranks.append(scores.rank_by_message(flat(seen), messages, victim, count))
    return scores.success(ranks) | _guarantee(sent, number, options.delta)


def _guarantee(sent: Sent, candidates: int, delta: float) -> dict[str, Any]:
    """The message's epsilon and the bound on naming the target; none without clip and noise."""
    if sent.placement not in ("dp_sgd", "update") or not sent.noise_multiplier:
        return {"epsilon": None, "delta": delta, "bound": 1.0, "chance": 1 / candidates}
    event = dp_event.GaussianDpEvent(sent.noise_multiplier)
    steps = sent.local_steps if sent.placement == "dp_sgd" else 1
    return {
        "epsilon": epsilon(event, steps, delta),
        "delta": delta,
        "bound": identification_bound(event, steps, candidates),
        "chance": 1 / candidates,
    }
