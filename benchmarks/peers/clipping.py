"""How fast is a private step of ours beside PyTorch not private, Opacus and jax_privacy?

    python -m benchmarks.peers.clipping --output=benchmarks/results/peers.jsonl

Needs the environment that `make bench-peers` makes. Every arrangement first shows that its sum of
gradients, clipped where it clips, agrees with ours on the same weights and tiles; one that does not
stops everything. `competition` says how the best of each library is found and timed.
"""

from absl import app

from benchmarks.peers import competition
from benchmarks.peers.variants import split, step_variants

QUESTION = competition.Question(
    benchmark="clipping",
    columns=("16:128:8", "32:256:4"),
    variants=lambda cores: step_variants(),
    split=split,
    targets={"torch": (0.75, 1.0), "opacus": (1.8, 3.0), "jax_privacy": (2.0, 3.0)},
)


def main(argv: list[str]) -> None:
    """Measures and reports."""
    del argv
    competition.run(QUESTION)


if __name__ == "__main__":
    app.run(main)
