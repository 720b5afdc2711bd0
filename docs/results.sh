#!/usr/bin/env bash
# Every command behind docs/results.md:   MANIFEST=path/to/manifest.csv bash docs/results.sh
# Stopped, it goes on where it stood. See results.md for how long it takes.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${MANIFEST:?Set MANIFEST to the CSV of a federation with a split column.}"
PYTHON=${PYTHON:-.venv/bin/python}
RUNS=${RUNS:-runs/results}

# --- The start that costs no privacy: a network that has seen drawn tiles only.
pretrain() { # name, then flags of the network
  local name=$1; shift
  $PYTHON -m experiments.centralized --workdir="$RUNS/$name" "$@" \
    --config.data.synthetic_variation=wide --config.privacy.unit=tile \
    --config.privacy.expected_batch_size=16 --config.federation.rounds=700 \
    --config.federation.server_learning_rate=2e-3 --config.federation.server_schedule=cosine \
    --config.federation.ema_decay=0.98 --config.eval_every=175 --config.checkpoint_every=100 \
    --config.execution.devices=1 --config.seed=0
}
pretrain pretrain

# --- The table: 40 rounds each, about 13,400 tiles (update: 3,400, see results.md).
REAL=(--config.data.manifest="$MANIFEST" --config.model.init_from="$RUNS/pretrain"
  --config.privacy.unit=tile --config.federation.rounds=40 --config.execution.devices=1
  --config.seed=0)
LOCAL=(--config.federation.client_optimizer=adam --config.federation.client_learning_rate=1e-3
  --config.federation.client_momentum=0.9 --config.federation.server_optimizer=sgd
  --config.federation.server_learning_rate=1.0 --config.federation.server_momentum=0.0
  --config.federation.ema_decay=0.8)
DP_SGD=(--config.privacy.placement=dp_sgd --config.privacy.l2_clip_norm=0.5
  --config.privacy.expected_batch_size=56 --config.federation.server_learning_rate=1e-3
  --config.federation.server_schedule=cosine --config.federation.ema_decay=0.9)
dp_sgd() { $PYTHON -m experiments.feddp --workdir="$RUNS/$1" "${REAL[@]}" "${DP_SGD[@]}"; }
dp_sgd dp_sgd
$PYTHON -m experiments.feddp --workdir="$RUNS/fedavg" "${REAL[@]}" "${LOCAL[@]}" \
  --config.privacy.placement=none --config.federation.local_steps=4 \
  --config.privacy.expected_batch_size=14
$PYTHON -m experiments.centralized --workdir="$RUNS/centralized" "${REAL[@]}" "${LOCAL[@]}" \
  --config.federation.local_steps=21 --config.privacy.expected_batch_size=16
$PYTHON -m experiments.feddp --workdir="$RUNS/update" "${REAL[@]}" "${LOCAL[@]}" \
  --config.privacy.placement=update --config.privacy.l2_clip_norm=3e-4 \
  --config.federation.local_steps=2 --config.privacy.expected_batch_size=7
$PYTHON -m experiments.compare --output="$RUNS/table.md" \
  --workdirs="$RUNS/fedavg,$RUNS/centralized,$RUNS/dp_sgd,$RUNS/update"

# --- `dp_sgd` once more, killed in the middle of round 25, and the same command again.
if [ ! -e "$RUNS/killed" ]; then
  dp_sgd killed & sleep 1
  until [ "$(wc -l < "$RUNS/killed/metrics.jsonl" 2>/dev/null || echo 0)" -ge 25 ]; do sleep 1; done
  sleep 3; pkill -9 -f -- "--workdir=$RUNS/killed " || true; wait || true
fi
dp_sgd killed
$PYTHON - "$RUNS/dp_sgd" "$RUNS/killed" <<'EOF'
import json, pathlib, sys

import jax, numpy as np, orbax.checkpoint as ocp

def end(run):
    folder = pathlib.Path(run, "checkpoints").absolute()
    last = folder / str(max(int(path.name) for path in folder.glob("[0-9]*")))
    position = json.loads((last / "position" / "metadata").read_text())
    charges = pathlib.Path(run, "charges.jsonl").read_text().splitlines()
    stated = json.loads(pathlib.Path(run, "privacy.json").read_text())["clients"]
    epsilon = {client: entry["epsilon"] for client, entry in stated.items()}
    return ocp.StandardCheckpointer().restore(last / "state"), position["ledger"], charges, epsilon

(a, *rest_a), (b, *rest_b) = map(end, sys.argv[1:])
same = jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)
print(f"{len(jax.tree.leaves(same))} arrays, all identical: {all(jax.tree.leaves(same))}")
print("ledger, charges, epsilon identical:", *(x == y for x, y in zip(rest_a, rest_b)))
EOF

# --- What each setting was worth: a smaller network (base 8, depth 3), about 3,000 tiles a run.
SMALL=(--config.model.base_channels=8 --config.model.depth=3)
pretrain small-pretrain "${SMALL[@]}"
ablation() { # name, then what differs from the reference
  local name=$1; shift
  $PYTHON -m experiments.feddp --workdir="$RUNS/small-$name" "${SMALL[@]}" \
    --config.data.manifest="$MANIFEST" --config.data.external_sites=mayo,henry-ford,case-western \
    --config.model.init_from="$RUNS/small-pretrain" \
    --config.privacy.unit=tile --config.execution.devices=1 --config.seed=0 \
    "${DP_SGD[@]}" --config.privacy.expected_batch_size=32 --config.federation.rounds=16 \
    --config.eval_every=1000 --config.checkpoint_every=4 "$@"
}
ablation reference
ablation from-scratch --config.model.init_from=
ablation small-batches --config.privacy.expected_batch_size=8 --config.federation.rounds=64
ablation no-ema --config.federation.ema_decay=0
ablation multiplicity-2 --config.objective.multiplicity=2
ablation clip-4 --config.privacy.l2_clip_norm=4
ablation no-noise --config.privacy.placement=none
$PYTHON -m experiments.compare --output="$RUNS/ablations.md" \
  --workdirs="$RUNS/small-no-noise,$RUNS/small-reference,$RUNS/small-from-scratch,$RUNS/small-small-batches,$RUNS/small-no-ema,$RUNS/small-multiplicity-2,$RUNS/small-clip-4"
