"""Everything a run can be told, as plain keyword-only dataclasses; frozen by convention.

`experiments` exposes them as flags: `--config.privacy.target_epsilon=4`. What stands in
`ExecutionConfig`, and how often a run evaluates and saves, never changes a result beyond rounding.
"""

import dataclasses
import hashlib
import json
import math
import operator
from typing import Any


@dataclasses.dataclass(kw_only=True)
class DataConfig:
    """Where the tiles come from.

    Attributes:
        manifest: CSV of images, masks and sites; empty = the synthetic federation.
        store: folder of `experiments.prepare_tiles`, instead of a manifest; tile size and classes
            are the store's.
        tile_size: side of a tile, pixels; a multiple of 2**model.depth.
        stride: distance of training tiles, pixels; 0 = tile_size.
        min_tissue: training tiles without annotation and with less tissue are left out.
        label_mode: "class" (mask values are classes) or "instance" (every object is class 1).
        class_names: comma-separated, background first.
        train_sites: comma-separated; empty = as the manifest's split says.
        external_sites: comma-separated; empty = as the manifest's split says.
        synthetic_task: "nuclei" (binary) or "tissue" (classes of tissue).
        synthetic_variation: "sites" (each site its stain) or "wide" (each tile its own).
        synthetic_mpp: micrometres a pixel of the synthetic tiles.
        patients_per_site: of the synthetic federation, training patients of each site.
        tiles_per_patient: of the synthetic federation.
        synthetic_seed: seed of the synthetic federation, which is public.
    """

    manifest: str = ""
    store: str = ""
    tile_size: int = 128
    stride: int = 0
    min_tissue: float = 0.0
    label_mode: str = "class"
    class_names: str = "background,nucleus"
    train_sites: str = ""
    external_sites: str = ""
    synthetic_task: str = "nuclei"
    synthetic_variation: str = "sites"
    synthetic_mpp: float = 0.25
    patients_per_site: int = 200
    tiles_per_patient: int = 4
    synthetic_seed: int = 0


@dataclasses.dataclass(kw_only=True)
class ModelConfig:
    """The U-Net.

    Attributes:
        base_channels: channels of the first level.
        depth: number of poolings.
        num_groups: groups of the group normalisation.
        standardize: weight-standardised convolutions.
        compute_dtype: "float32", or "bfloat16" for speed on GPU and TPU: what convolutions
            multiply in. Parameters, gradients, norms and noise are float32 in any case.
        init_from: workdir of a finished run whose parameters to start from; empty = random. What
            that run's data owe to privacy is its own affair: start from public (synthetic) data.
    """

    base_channels: int = 16
    depth: int = 4
    num_groups: int = 8
    standardize: bool = False
    compute_dtype: str = "float32"
    init_from: str = ""


@dataclasses.dataclass(kw_only=True)
class ObjectiveConfig:
    """Loss and augmentation.

    Attributes:
        dice_weight: of the soft Dice term beside the cross-entropy.
        flips: mirror tiles at random.
        rotate: turn tiles by quarter turns at random.
        hed_jitter: range of the stain jitter, a fraction.
        multiplicity: augmentations averaged before a unit's gradient is clipped.
    """

    dice_weight: float = 1.0
    flips: bool = True
    rotate: bool = True
    hed_jitter: float = 0.05
    multiplicity: int = 1


@dataclasses.dataclass(kw_only=True)
class PrivacyConfig:
    """What is protected, and how strongly.

    Attributes:
        placement: "dp_sgd" (noise in every local step), "update" (noise on the model update),
            "distributed" (shares of noise under secure aggregation), "central" (noise by a trusted
            server), "update_unclipped" (noise without a clip: no guarantee) or "none".
        protects: of "update" and "central", whom target_epsilon is for: the "client" or the "unit".
        unit: "tile", "slide", "patient", or "auto": the largest that the data knows everywhere.
        l2_clip_norm: of a unit's gradient (dp_sgd) or of the model update (update).
        noise_multiplier: noise std / sensitivity; 0 = calibrate to `target_epsilon`.
        target_epsilon: budget of every client; a client that would exceed it leaves. 0 = none
            (then noise_multiplier must be given).
        target_delta: delta at which epsilon is stated.
        expected_batch_size: units a client draws in a step, on average; at most its units.
        sampling_prob: the probability of each unit in a step, instead, the same at every client;
            0 = as expected_batch_size says.
        target_epsilon_by_site: "site=4,other=2": budgets of their own; empty = none.
        noise_multiplier_by_site: the same for the noise, with placements that do not share it.
        sampling_prob_by_site: the same for the probability of a unit.
        relation: "zero_out", or "add_or_remove", where the number of units is private: then
            sampling_prob and nominal_num_units are declared, and weights are "uniform".
        nominal_num_units: units of a client under "add_or_remove", declared without the data.
        noise: "gaussian", or with "distributed" "discrete_gaussian", exact in integers.
        max_dropouts: clients that "distributed" may lose in a round; more abort it.
        adaptive_clip: whether the clip norm follows `clip_quantile` of the norms, by a noised count
            that is part of the budget; l2_clip_norm is then the first.
        clip_quantile: the fraction of norms that shall be below the clip norm.
        clip_learning_rate: of the logarithm of the clip norm.
        tiles_per_unit: T, the tiles of a drawn unit that enter its gradient; with unit = tile, 1.
        max_tiles_per_patient: k, an enforced cap on the tiles of a patient in training, so that a
            tile guarantee has a patient conversion; 0 = no cap.
    """

    placement: str = "dp_sgd"
    protects: str = "client"
    unit: str = "auto"
    l2_clip_norm: float = 1.0
    noise_multiplier: float = 0.0
    target_epsilon: float = 8.0
    target_delta: float = 1e-5
    expected_batch_size: float = 16.0
    sampling_prob: float = 0.0
    target_epsilon_by_site: str = ""
    noise_multiplier_by_site: str = ""
    sampling_prob_by_site: str = ""
    relation: str = "zero_out"
    nominal_num_units: int = 0
    noise: str = "gaussian"
    max_dropouts: int = 0
    adaptive_clip: bool = False
    clip_quantile: float = 0.5
    clip_learning_rate: float = 0.2
    tiles_per_unit: int = 4
    max_tiles_per_patient: int = 0


@dataclasses.dataclass(kw_only=True)
class FederationConfig:
    """Rounds, and what clients and server do with gradients.

    Attributes:
        rounds: rounds to run; fewer if the budget ends before.
        local_steps: steps of a client in a round.
        client_optimizer: name of an optax optimiser, started anew each round.
        client_learning_rate: its learning rate.
        client_momentum: its momentum, where it has one.
        server_optimizer: name of an optax optimiser; "sgd" with learning rate 1 is FedAvg.
        server_learning_rate: its learning rate.
        server_momentum: its momentum, where it has one.
        server_schedule: "constant" or "cosine" (to zero over the rounds).
        ema_decay: of the server's averaged parameters, which are what is evaluated; 0 = none.
        weights: "units" (each site's public number of units), "uniform", or "inverse_variance" (of
            the noise on its delta). "distributed" weighs every drawn unit the same.
        pooled: all sites as ONE client: centralised training, the upper bound.
        clients: who is a client: each "site", or each "patient", for "central".
        cohort: clients of a round: "all", "fixed" (cohort_size of them) or "poisson".
        cohort_size: with "fixed".
        cohort_prob: with "poisson".
        dropout_prob: with which a client is lost in a round, to simulate "distributed".
    """

    rounds: int = 100
    local_steps: int = 1
    client_optimizer: str = "sgd"
    client_learning_rate: float = 1.0
    client_momentum: float = 0.0
    server_optimizer: str = "adam"
    server_learning_rate: float = 1e-3
    server_momentum: float = 0.9
    server_schedule: str = "constant"
    ema_decay: float = 0.95
    weights: str = "units"
    pooled: bool = False
    clients: str = "site"
    cohort: str = "all"
    cohort_size: int = 0
    cohort_prob: float = 0.0
    dropout_prob: float = 0.0


@dataclasses.dataclass(kw_only=True)
class ExecutionConfig:
    """How fast, never what.

    Attributes:
        auto: time the plans that can be fastest here on the first run, and remember the choice; of
            the settings below, what is set is kept.
        clients_per_block: clients mapped together on a device; 1 = one after another.
        microbatch_size: units computed together; 1 = a loop, large = `vmap` over all; 0 = 1 on
            CPU and 32 on accelerators.
        devices: of each process; 0 = all that have work. Of a CPU an experiment makes one device a
            core, or as many as are asked for.
        devices_per_client: devices that share the units of one client, the others having clients
            of their own; 0 = see `assembly.devices.devices_per_client`.
        processes: that an experiment starts on this machine, the cores shared out among them.
        conv_variant: "auto", or a `models.layers.ConvVariant`.
        pool: where the training tiles lie: "resident" (whole on every device), "packed" (on the
            host, which hands over those that a chunk of clients names) or "auto": resident where
            they take no more than half of an accelerator's memory, or a quarter of the host's.
        eval_batch_size: tiles of an evaluation batch.
        compilation_cache: folder of JAX's persistent compilation cache, of calibrations and of
            chosen plans, for all runs; empty = none.
    """

    auto: bool = False
    clients_per_block: int = 1
    microbatch_size: int = 0
    devices: int = 0
    devices_per_client: int = 0
    processes: int = 1
    conv_variant: str = "auto"
    pool: str = "auto"
    eval_batch_size: int = 16
    compilation_cache: str = ""


@dataclasses.dataclass(kw_only=True)
class Config:
    """A run.

    Attributes:
        data: see `DataConfig`.
        model: see `ModelConfig`.
        objective: see `ObjectiveConfig`.
        privacy: see `PrivacyConfig`.
        federation: see `FederationConfig`.
        execution: see `ExecutionConfig`.
        seed: -1 = secret randomness; >= 0 = reproducible, and marked "not private".
        eval_every: rounds between evaluations on the validation tiles.
        checkpoint_every: rounds between checkpoints.
    """

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    privacy: PrivacyConfig = dataclasses.field(default_factory=PrivacyConfig)
    federation: FederationConfig = dataclasses.field(default_factory=FederationConfig)
    execution: ExecutionConfig = dataclasses.field(default_factory=ExecutionConfig)
    seed: int = -1
    eval_every: int = 10
    checkpoint_every: int = 10


def check(config: Config) -> None:
    """Refuses numbers that no other part of a run would notice in time.

    Raises:
        ValueError: an interval or a number of processes below one.
    """
    for name in ("eval_every", "checkpoint_every", "execution.processes"):
        value = operator.attrgetter(name)(config)
        if value < 1:
            raise ValueError(f"Expected {name} >= 1, got {value}.")


_ONLY_SPEED = ("execution", "eval_every", "checkpoint_every")


def names(comma_separated: str) -> tuple[str, ...]:
    """The names in a comma-separated string; none in an empty one."""
    return tuple(name.strip() for name in comma_separated.split(",") if name.strip())


def by_site(numbers: str, name: str) -> dict[str, float]:
    """The number of each site in "site=4,other=2"; none in an empty string.

    Args:
        numbers: comma-separated pairs.
        name: of the setting, for the error.

    Raises:
        ValueError: a pair is not one, or a site is named twice.
    """
    found: dict[str, float] = {}
    for pair in names(numbers):
        site, _, number = (part.strip() for part in pair.rpartition("="))
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not site or math.isnan(value) or site in found:
            raise ValueError(f"Expected {name} like site=4,other=2, got {numbers!r} at {pair!r}.")
        found[site] = value
    return found


def identity(config: Config) -> dict[str, Any]:
    """What decides the result: the configuration without what is only speed, flattened."""
    flat: dict[str, Any] = {}
    for section, value in dataclasses.asdict(config).items():
        if section in _ONLY_SPEED:
            continue
        if isinstance(value, dict):
            flat |= {f"{section}.{name}": item for name, item in value.items()}
        else:
            flat[section] = value
    return flat


def config_hash(config: Config) -> str:
    """BLAKE2b, in hex, of `identity(config)`."""
    text = json.dumps(identity(config), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
