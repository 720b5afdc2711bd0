#!/usr/bin/env bash
# Every command behind the section "Privacy against utility" of docs/results.md:
#   bash docs/privacy_utility.sh                      the synthetic federation
#   MANIFEST=path/to/manifest.csv bash docs/privacy_utility.sh    and the real one
# Stopped, it goes on where it stood.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
RUNS=${RUNS:-runs/privacy_utility}

# --- Synthetic: five sites of 200 patients with 4 tiles each, the network of `make demo`.
SYNTHETIC=(--config.data.tile_size=64 --config.data.synthetic_mpp=0.5
  --config.model.base_channels=8 --config.model.depth=2 --config.model.num_groups=4
  --config.privacy.l2_clip_norm=0.5 --config.privacy.target_delta=1e-4
  --config.privacy.max_tiles_per_patient=4 --config.federation.rounds=40
  --config.federation.server_learning_rate=5e-3 --config.federation.server_schedule=cosine
  --config.federation.ema_decay=0.8 --config.execution.devices=1
  --config.eval_every=1000 --config.checkpoint_every=20 --config.seed=0)
TILE=(--config.privacy.unit=tile --config.privacy.expected_batch_size=64)
PATIENT=(--config.privacy.unit=patient --config.privacy.tiles_per_unit=2
  --config.privacy.expected_batch_size=32)
# "central": each patient is a client, 160 of the 1,000 take part in a round.
CENTRAL=(--config.privacy.placement=central --config.federation.clients=patient
  --config.federation.cohort=poisson --config.federation.cohort_prob=0.16
  --config.federation.weights=uniform)
synthetic() { # name, then what it is
  local name=$1; shift
  $PYTHON -m experiments.feddp --workdir="$RUNS/synthetic/$name" "${SYNTHETIC[@]}" "$@"
}
synthetic none-tile "${TILE[@]}" --config.privacy.placement=none
synthetic none-patient "${PATIENT[@]}" --config.privacy.placement=none
for epsilon in 1 3 8; do
  for placement in dp_sgd distributed; do
    target=(--config.privacy.placement=$placement --config.privacy.target_epsilon=$epsilon)
    synthetic $placement-tile-$epsilon "${TILE[@]}" "${target[@]}"
    synthetic $placement-patient-$epsilon "${PATIENT[@]}" "${target[@]}"
  done
  synthetic central-patient-$epsilon "${PATIENT[@]}" "${CENTRAL[@]}" \
    --config.privacy.expected_batch_size=1 --config.privacy.target_epsilon=$epsilon
  synthetic central-tile-$epsilon "${TILE[@]}" "${CENTRAL[@]}" --config.privacy.protects=unit \
    --config.privacy.expected_batch_size=1 --config.privacy.target_epsilon=$epsilon
done
$PYTHON -m experiments.tradeoff --workdirs="$RUNS/synthetic/*" --output="$RUNS/synthetic_tradeoff"

# --- Real: the small network and the start of docs/results.sh, whose runs must be there.
[ -n "${MANIFEST:-}" ] || exit 0
START=${START:-runs/results/small-pretrain}
REAL=(--config.data.manifest="$MANIFEST" --config.model.base_channels=8 --config.model.depth=3
  --config.data.external_sites=mayo,henry-ford,case-western --config.model.init_from="$START"
  --config.privacy.unit=tile --config.privacy.l2_clip_norm=0.5 --config.federation.rounds=16
  --config.federation.server_learning_rate=1e-3 --config.federation.server_schedule=cosine
  --config.federation.ema_decay=0.9 --config.execution.devices=1 --config.eval_every=1000
  --config.checkpoint_every=4 --config.seed=0)
EACH=(--config.privacy.expected_batch_size=32)
real() { # name, then what it is
  local name=$1; shift
  $PYTHON -m experiments.feddp --workdir="$RUNS/real/$name" "${REAL[@]}" "$@"
}
real none "${EACH[@]}" --config.privacy.placement=none
for epsilon in 3 8; do
  real dp_sgd-$epsilon "${EACH[@]}" --config.privacy.placement=dp_sgd \
    --config.privacy.target_epsilon=$epsilon
  # The same q at every site, 192 expected tiles in all: the smallest site does not set the noise.
  real distributed-$epsilon --config.privacy.placement=distributed \
    --config.privacy.sampling_prob=0.0759 --config.privacy.target_epsilon=$epsilon
done
$PYTHON -m experiments.tradeoff --workdirs="$RUNS/real/*" --output="$RUNS/real_tradeoff"
