"""The public numbers of one client's mechanism, and the contradictions among them that are refused.

Everything that samples, clips, noises or accounts reads these numbers and no others.
"""

import dataclasses
import math
from typing import Literal, get_args

Placement = Literal["none", "dp_sgd", "update", "distributed", "central", "update_unclipped"]
Unit = Literal["tile", "slide", "patient"]
Relation = Literal["zero_out", "add_or_remove"]
Noise = Literal["gaussian", "discrete_gaussian"]

UNITWISE: tuple[Placement, ...] = ("dp_sgd", "distributed")
"""Placements that clip each unit's gradient; the others clip the model update, or nothing."""

MAX_LEVELS = 2**20
"""The most integer steps of one clip norm: rounding then costs 0.1 % at 2 million parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MechanismSettings:
    """Everything the guarantee of one client depends on, as one immutable value.

    All of it is public, the site's number of units among it, and printed in the statement.

    Attributes:
        placement: where noise enters.
            "dp_sgd": on the clipped sum of every local step, by the client.
            "update": on the clipped model update, once a round, by the client.
            "distributed": a share of it on the client's clipped sum, which leaves the client under
            secure aggregation; one step a round.
            "central": on the sum of the clipped model updates, by the server, who is trusted.
            "update_unclipped": on a model update that nothing clips: no guarantee at all.
            "none": nowhere.
        unit: what is sampled and, unit by unit, clipped and protected.
        num_units: units of the site, n_k. Under "add_or_remove" a nominal number that does not
            depend on the data.
        sampling_prob: probability of each unit in each step, q_k in (0, 1].
        capacity: the most units in a step; a draw above it is cut uniformly.
        local_steps: steps of a round, L.
        tiles_per_unit: the most tiles of a unit in a step, T; 1 for unit "tile".
        l2_clip_norm: of a unit's gradient (C) or of the model update (S).
        noise_multiplier: z. Noise standard deviation over `l2_clip_norm` of "dp_sgd" and "update";
            of the SUM that the server opens for "distributed", when as many clients drop out as may
            (`max_dropouts`); over the largest weight times `l2_clip_norm` for "central". With
            adaptive clipping z covers sum and count together. 0 for "none".
        max_units_per_patient: k, the public and ENFORCED cap of units one patient owns; None where
            patients are unknown or nothing enforces a cap.
        is_stateless: whether the client keeps nothing computed from its data between rounds
            (momentum, control variates, error feedback, personal layers).
        relation: "zero_out": the unit's contribution becomes zero, n_k stays. "add_or_remove": the
            unit comes or goes; for placements that clip units, and no draw is ever cut.
        num_shares: K, clients that share the noise of "distributed" at the start; 1 elsewhere.
        max_dropouts: d, clients of "distributed" that may be lost in a round; more abort it.
        noise: "gaussian", float32, hardened; or "discrete_gaussian", exact integers, for
            "distributed" alone.
        dimension: number of parameters; needed by "discrete_gaussian" alone.
        levels: integer steps of one clip norm; of "discrete_gaussian" alone.
        cohort_prob: p, probability of the client in each round of "central"; 1 elsewhere.
        relative_weight: w_k over the largest weight of all clients, in (0, 1], for "central".
        protects: of "update" and "central", whose row is the headline that calibration and budget
            go by: the "client", or the sampled "unit".
        averaged_over: m, clients of "update" of equal weight and noise in every average; 1 where
            that is not known.
        count_noise_stddev: sigma_b of the count of unclipped units that adapts the clip norm; None
            where the clip norm is fixed.
    """

    placement: Placement
    unit: Unit
    num_units: int
    sampling_prob: float
    capacity: int
    local_steps: int
    tiles_per_unit: int = 1
    l2_clip_norm: float
    noise_multiplier: float
    max_units_per_patient: int | None = None
    is_stateless: bool = True
    relation: Relation = "zero_out"
    num_shares: int = 1
    max_dropouts: int = 0
    noise: Noise = "gaussian"
    dimension: int | None = None
    levels: int = MAX_LEVELS
    cohort_prob: float = 1.0
    relative_weight: float = 1.0
    protects: Literal["client", "unit"] = "client"
    averaged_over: int = 1
    count_noise_stddev: float | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("placement", get_args(Placement)),
            ("unit", get_args(Unit)),
            ("relation", get_args(Relation)),
            ("noise", get_args(Noise)),
            ("protects", ("client", "unit")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"Expected {name} in {choices}, got {getattr(self, name)!r}.")
        self._check_draw()
        if self.placement == "none":
            if self.noise_multiplier != 0:
                raise ValueError(
                    f"Expected noise_multiplier 0 for placement none, got {self.noise_multiplier}."
                )
            if not self.l2_clip_norm > 0:
                raise ValueError(f"Expected l2_clip_norm > 0, got {self.l2_clip_norm}.")
        else:
            self._check_noise()
        self._check_sharing()
        self._check_relation()
        if self.count_noise_stddev is not None:
            self._check_count(self.count_noise_stddev)

    def _check_draw(self) -> None:
        for name in ("num_units", "capacity", "local_steps", "tiles_per_unit"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"Expected {name} >= 1, got {getattr(self, name)}. Leave a site without units "
                    "out of training."
                )
        if not 0 < self.sampling_prob <= 1:
            raise ValueError(
                f"Expected 0 < sampling_prob <= 1, got {self.sampling_prob} for "
                f"{self.num_units} units. Lower privacy.expected_batch_size."
            )
        if self.capacity > self.num_units:
            raise ValueError(
                f"Expected capacity <= num_units, got {self.capacity} > {self.num_units}."
            )
        if self.unit == "tile" and self.tiles_per_unit != 1:
            raise ValueError(f"Expected tiles_per_unit 1 for unit tile, got {self.tiles_per_unit}.")
        if self.max_units_per_patient is not None and self.max_units_per_patient < 1:
            raise ValueError(
                f"Expected max_units_per_patient >= 1 or None, got {self.max_units_per_patient}."
            )

    def _check_noise(self) -> None:
        for name in ("noise_multiplier", "l2_clip_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(
                    f"Expected a finite {name} > 0 for placement {self.placement}, got {value}. "
                    'Without noise or clip there is no guarantee: use placement "none" for that.'
                )

    def _check_sharing(self) -> None:
        if self.placement == "distributed":
            if self.local_steps != 1:
                raise ValueError(
                    f"Expected local_steps 1 for placement distributed, got {self.local_steps}. "
                    "More steps make a model update, which would have to be clipped as a whole: "
                    'use placement "update" or "central" for that.'
                )
            if self.max_dropouts < 0 or self.num_shares < self.min_sharing:
                raise ValueError(
                    "Expected at least 2 sites, and more than twice max_dropouts, for placement "
                    f"distributed, got max_dropouts={self.max_dropouts}, "
                    f"num_shares={self.num_shares}. A sum of one client is its message, and half "
                    'of the sites must be there to open it: add sites, or use placement "dp_sgd".'
                )
        elif (self.num_shares, self.max_dropouts, self.noise) != (1, 0, "gaussian"):
            raise ValueError(
                "Expected num_shares 1, max_dropouts 0 and gaussian noise for placement "
                f"{self.placement}, got {self.num_shares}, {self.max_dropouts}, {self.noise!r}. "
                'They belong to placement "distributed".'
            )
        if self.noise == "discrete_gaussian" and not (self.dimension or 0) > 0:
            raise ValueError(
                f"Expected dimension > 0, the number of parameters, for discrete_gaussian, got "
                f"{self.dimension}."
            )
        if self.placement != "central" and (self.cohort_prob, self.relative_weight) != (1.0, 1.0):
            raise ValueError(
                f"Expected cohort_prob 1 and relative_weight 1 for placement {self.placement}, got "
                f"{self.cohort_prob}, {self.relative_weight}. Sampling of clients amplifies "
                "nothing where the server sees who takes part."
            )
        if not (0 < self.cohort_prob <= 1 and 0 < self.relative_weight <= 1):
            raise ValueError(
                "Expected cohort_prob and relative_weight in (0, 1], got "
                f"{self.cohort_prob}, {self.relative_weight}."
            )

    def _check_relation(self) -> None:
        if self.relation == "add_or_remove" and self.placement not in ("none", *UNITWISE):
            raise ValueError(
                f"Expected relation zero_out for placement {self.placement}, got add_or_remove. "
                "Use a placement that clips units, or the zero-out relation."
            )

    def _check_count(self, count_noise_stddev: float) -> None:
        if self.placement not in (*UNITWISE, "central") or self.noise != "gaussian":
            raise ValueError(
                "Expected adaptive clipping with placement dp_sgd, distributed or central and "
                f"gaussian noise, got {self.placement}, {self.noise}. One client's update is one "
                "value: a count of one tells nothing below its own noise. Fix the clip norm."
            )
        if not self.noise_multiplier < 2 * count_noise_stddev < math.inf:
            raise ValueError(
                "Adaptive clipping needs noise_multiplier < 2 count_noise_stddev, got "
                f"{self.noise_multiplier:.4g} and {count_noise_stddev:.4g}: the count alone would "
                "spend more than the budget. Its noise is a twentieth of what it counts on "
                "average: draw more units a step, or fix the clip norm."
            )

    @property
    def min_sharing(self) -> int:
        """The fewest clients that can share noise: a majority must outlast the dropouts."""
        return max(2, 2 * self.max_dropouts + 1)

    @property
    def expected_batch_size(self) -> float:
        """q_k n_k: the public number that a noised sum is divided by."""
        return self.sampling_prob * self.num_units

    @property
    def sum_noise_multiplier(self) -> float:
        """The multiplier of the sum alone: above z where a noised count goes with it.

        Sum and count are one Gaussian release: in units of their noise, one unit moves them by
        (1 / z_sum, 1 / (2 sigma_b)), because the count is centred, b - 1/2. That vector has length
        1 / z for z_sum = (z^-2 - (2 sigma_b)^-2)^(-1/2) (Andrew et al. 2021, Theorem 1).
        """
        if self.count_noise_stddev is None:
            return self.noise_multiplier
        return (self.noise_multiplier**-2 - (2 * self.count_noise_stddev) ** -2) ** -0.5
