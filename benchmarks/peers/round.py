"""How long does a whole private round take, ours beside Flower's simulation with Opacus?

    python -m benchmarks.peers.round --output=benchmarks/results/peers.jsonl

Equal work: the same clients, local steps, batches, clip norm and noise. Ours is the cohort's visit
with the placement `dp_sgd`, the host's stacking and the server's step included; Flower's is its
server's loop over actors of one core each, after its start. First the mean model deltas of a round
without noise have to agree, then rounds are timed in turn.
"""

from absl import app

from benchmarks.peers import competition
from benchmarks.peers.variants import round_variants

QUESTION = competition.Question(
    benchmark="peers_round",
    columns=("16:128:8:4:4", "32:256:1:2:4"),
    variants=round_variants,
    split=None,
    finalists=1,  # two simulations of Flower would share the machine even while they wait
    targets={"flower": (1.7, 3.0)},
)


def main(argv: list[str]) -> None:
    """Measures and reports."""
    del argv
    competition.run(QUESTION)


if __name__ == "__main__":
    app.run(main)
