"""The mechanism of one client: one object makes the sampler, the noise and the accountant's event.

The sampler that runs and the one that is accounted cannot disagree, because `Mechanism.sample` and
`Mechanism.guarantees` read the same sampling probability, capacity and steps.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedjax_dp.data import sampling
from fedjax_dp.privacy import calibration, placements, unit_guarantees
from fedjax_dp.privacy.guarantees import Guarantee
from fedjax_dp.privacy.settings import MechanismSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism(MechanismSettings):
    """Sampling, clipping, noise and accounting of one client; the fields are `MechanismSettings`'.

    Raises:
        ValueError: settings out of range, or that contradict each other; the message says what to
            do instead.
    """

    def sample(
        self,
        rng: np.random.Generator,
        unit_tiles: Sequence[np.ndarray],
        num_slots: int | None = None,
    ) -> sampling.Plan:
        """Draws the plan of one round: THE sampler that `guarantees` accounts for.

        Args:
            rng: the client's sampling generator of this round.
            unit_tiles: for each of the `num_units` units, its tiles as indices into the pool.
            num_slots: U of the plan; `slots` where None.

        Returns:
            The plan with S = local_steps, T = tiles_per_unit.

        Raises:
            ValueError: the number of units is not the accounted one.
        """
        capacity = self.capacity
        if self.relation == "add_or_remove":
            capacity = len(unit_tiles)  # never cut; how many there are is the site's secret
        elif len(unit_tiles) != self.num_units:
            raise ValueError(
                f"Expected the {self.num_units} units that are accounted, got {len(unit_tiles)}."
            )
        return sampling.draw_plan(
            rng,
            unit_tiles,
            sampling_prob=self.sampling_prob,
            capacity=capacity,
            local_steps=self.local_steps,
            tiles_per_unit=self.tiles_per_unit,
            num_slots=num_slots,
        )

    @property
    def sensitivity(self) -> float:
        """L2 sensitivity of what is noised, under the headline's relation."""
        return self.headline.sensitivity

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of what this client adds: to the SUM of a step, or to its update.

        Of "distributed" it is the share at the start, of "central" zero: the server adds it.
        """
        if self.placement in ("none", "central"):
            return 0.0
        if self.placement == "distributed":
            return self.share_stddev(self.num_shares)
        return self.sum_noise_multiplier * self.l2_clip_norm

    def share_stddev(self, num_sharing: int) -> float:
        """Standard deviation of one of `num_sharing` shares: re-split when a site has left.

        Raises:
            ValueError: more sites than at the start, or too few to lose `max_dropouts` of them.
        """
        z = self.sum_noise_multiplier
        return z * self.l2_clip_norm / math.sqrt(self._contributing(num_sharing))

    def share_variance(self, num_sharing: int) -> int:
        """sigma^2 of one of `num_sharing` discrete shares, in squared integer steps."""
        self._contributing(num_sharing)
        return unit_guarantees.share_variance(self, num_sharing)

    def count_share_stddev(self, num_sharing: int) -> float:
        """Standard deviation that one client adds to the count that adapts the clip norm."""
        count_noise = self.count_noise_stddev or 0.0
        if self.placement == "central":
            return 0.0
        if self.placement == "distributed":
            return count_noise / math.sqrt(self._contributing(num_sharing))
        return count_noise

    def _contributing(self, num_sharing: int) -> int:
        """The fewest of `num_sharing` clients whose noise a sum is sure to hold."""
        if not self.min_sharing <= num_sharing <= self.num_shares:
            raise ValueError(
                f"Expected between {self.min_sharing} and {self.num_shares} clients that share "
                f"the noise, got {num_sharing}."
            )
        return num_sharing - self.max_dropouts

    @property
    def server_noise_stddev(self) -> float:
        """Standard deviation that the server of "central" adds to the weighted sum; else zero.

        Weights are in units of the largest.
        """
        if self.placement != "central":
            return 0.0
        return self.sum_noise_multiplier * self.l2_clip_norm

    @property
    def headline(self) -> Guarantee:
        """The row that calibration, budget and progress bar refer to."""
        return self.guarantees()[0]

    @property
    def patient_guarantee(self) -> Guarantee:
        """The row that protects a whole patient; not valid, with a reason, where none does."""
        return next(g for g in self.guarantees() if g.unit == "patient")

    def guarantees(self) -> tuple[Guarantee, ...]:
        """Every guarantee of this client, the headline first; `placements` makes them."""
        return self._guarantees

    @functools.cached_property
    def _guarantees(self) -> tuple[Guarantee, ...]:
        return placements.guarantees(self)  # every client is asked in every round

    def epsilon(self, rounds: int, delta: float) -> float:
        """The headline's epsilon after `rounds` rounds."""
        return self.headline.epsilon(rounds, delta)

    def max_rounds(self, target_epsilon: float, delta: float, *, start: int | None = None) -> int:
        """Rounds within the headline's budget; the next one would exceed it.

        Args:
            target_epsilon: the budget.
            delta: at which it holds.
            start: where to look first: the rounds it was calibrated for save most of the work.
        """
        headline = self.headline
        return 0 if headline.event is None else _max_rounds(headline, target_epsilon, delta, start)

    def calibrated(
        self, rounds: int, target_epsilon: float, target_delta: float, cache_dir: Any = None
    ) -> "Mechanism":
        """The mechanism with the least noise whose headline keeps the target for `rounds` rounds.

        Raises:
            ValueError: no noise reaches the target, or the headline has no guarantee to calibrate.
        """
        if self.headline.event is None:
            raise ValueError(
                f"Nothing to calibrate for placement {self.placement}: {self.headline.reason}."
            )
        # A trial multiplier may be too large for a count that goes with it; the answer may not.
        start = dataclasses.replace(self, noise_multiplier=1.0, count_noise_stddev=None)
        z = _calibrate(start, rounds, target_epsilon, target_delta, cache_dir)
        return dataclasses.replace(self, noise_multiplier=z)

    def descriptor(self) -> dict[str, Any]:
        """A JSON-serialisable description; `mechanism_from_descriptor` rebuilds the mechanism."""
        fields = dataclasses.asdict(self)
        if math.isinf(self.l2_clip_norm):
            fields["l2_clip_norm"] = "infinity"
        return fields

    def fingerprint(self) -> str:
        """Hash of the description, for ledgers: equal mechanisms alone have equal ones."""
        body = json.dumps(self.descriptor(), sort_keys=True).encode()
        return hashlib.blake2b(body, digest_size=16).hexdigest()


@functools.lru_cache(maxsize=2**14)  # thousands of clients may be alike
def _calibrate(
    mechanism: Mechanism, rounds: int, target_epsilon: float, target_delta: float, cache_dir: Any
) -> float:
    def make_event(z: float) -> Any:
        return dataclasses.replace(mechanism, noise_multiplier=z).headline.event

    relation = mechanism.headline.accountant_relation
    return calibration.calibrate_noise_multiplier(
        make_event, rounds, target_epsilon, target_delta, relation, cache_dir=cache_dir
    )


@functools.lru_cache(maxsize=2**14)
def _max_rounds(headline: Guarantee, target_epsilon: float, delta: float, start: int | None) -> int:
    return calibration.max_rounds(
        headline.event, target_epsilon, delta, headline.accountant_relation, start=start
    )


def mechanism_from_descriptor(descriptor: Mapping[str, Any]) -> Mechanism:
    """Rebuilds the mechanism that `Mechanism.descriptor` described."""
    fields = dict(descriptor)
    fields["l2_clip_norm"] = float(fields["l2_clip_norm"])  # also of "infinity"
    return Mechanism(**fields)
