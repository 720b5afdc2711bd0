"""Do all variants compute the same sum of gradients, clipped where they clip, before noise?

    python -m benchmarks.peers.clipping

asks this of every arrangement before it is timed, with the program that is timed. A library that
skipped part of the work, or did it wrongly, would otherwise look fast.
"""

import dataclasses

from benchmarks.peers.interleave import Running
from benchmarks.peers.problem import Flat, relative_error

TOLERANCE = 1e-4

NOT_PRIVATE = ("nonprivate", "torch")
"""Names whose sum is not clipped, and must agree with ours not private."""


class DisagreementError(RuntimeError):
    """A variant computes something else than ours: its time would mean nothing."""


@dataclasses.dataclass
class Agreement:
    """Compares each variant with the first of ours that does the same.

    Attributes:
        tolerance: largest relative L2 error that passes.
        errors: title -> what was found.
    """

    tolerance: float = TOLERANCE
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    _references: dict[bool, Flat] = dataclasses.field(default_factory=dict)

    def check(self, running: Running) -> float:
        """The relative error; ours has to come before the others.

        Raises:
            DisagreementError: it is above the tolerance, or not a number.
        """
        title, value = running.variant.title, running.summed()
        is_clipped = running.variant.name not in NOT_PRIVATE
        if running.variant.name in ("private", "nonprivate"):
            self._references.setdefault(is_clipped, value)
        error = relative_error(value, self._references[is_clipped])
        self.errors[title] = error
        if not error <= self.tolerance:
            raise DisagreementError(
                f"{title} differs from ours by {error:.1e} of its size, where at most "
                f"{self.tolerance:.0e} is rounding. Times of unlike work would mean nothing."
            )
        return error
