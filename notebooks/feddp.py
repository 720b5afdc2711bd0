# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Federated segmentation with differential privacy, a cell at a time
#
# Several hospitals train one segmentation network on their own H&E tiles. Each clips what a
# single patient can contribute, adds noise, and sends the result. A server averages.
#
# This notebook builds one round of that from its parts: tiles, a loss of your own, one client's
# update mapped over the clients, clip, noise, average, and the price in epsilon. Then it runs a
# few rounds, and at the end the same through `training.run`, which also charges, saves, resumes
# and reports.
#
# The tiles are drawn by a program. No patient is involved.

# %%
# Fill in SOURCE if the package is not installed, for instance in Colab: the folder of a checkout,
# or "git+" and the URL of the repository.
import importlib.util
import subprocess
import sys

SOURCE = ""

if importlib.util.find_spec("fedjax_dp") is None:
    if not SOURCE:
        raise RuntimeError("fedjax_dp is not installed. Fill in SOURCE above and run this again.")
    subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", SOURCE])
    importlib.invalidate_caches()

# %%
import json
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import Image, display

from fedjax_dp import training
from fedjax_dp.config import Config, DataConfig, FederationConfig, ModelConfig, PrivacyConfig
from fedjax_dp.data.synthetic import synthetic_federation
from fedjax_dp.evaluation import Evaluator
from fedjax_dp.federated import client, cohort, sites
from fedjax_dp.federated.aggregators import weighted_mean
from fedjax_dp.privacy import clipping, noise, statement
from fedjax_dp.privacy.secrets import Secrets
from fedjax_dp.reporting import contours
from fedjax_dp.segmentation.metrics import summarise

# %% [markdown]
# ## Tiles
#
# Three hospitals, each with its own stain, blur and noise. Every tile knows its site, its slide
# and its patient. `train` is what the hospitals train on; validation, test and external tiles
# come from other patients.

# %%
TILE_SIZE = 64
federation = synthetic_federation(
    num_training_sites=3,
    num_external_sites=1,
    patients_per_site=60,
    evaluation_patients_per_site=8,
    tiles_per_patient=2,
    tile_size=TILE_SIZE,
)
tiles = federation.train
print(f"{len(tiles)} training tiles, {len(tiles.patients)} patients, sites {tiles.sites}")

figure, axes = plt.subplots(2, len(tiles.sites), figsize=(7, 4.8), layout="constrained")
for column, site in enumerate(tiles.sites):
    first = tiles.of_site(site)[0]
    image, truth = tiles.images[first], tiles.labels[first]
    contours.show_tile(axes[0, column], image, truth, title=site)
    contours.show_contours(axes[1, column], image, truth, truth, federation.class_names)
contours.name_row(axes[0, 0], "image")
contours.name_row(axes[1, 0], "truth")
plt.show()

# %% [markdown]
# ## What is protected
#
# The unit of privacy is the patient: the guarantee covers all tiles of a patient together. In
# each step a hospital draws every patient with probability q, at most two tiles of each. The
# noise is calibrated so that 20 rounds cost epsilon 8 at delta 1e-3. Delta should be well below
# one over the number of patients, which is 60 here.
#
# One object, the mechanism, makes the sampler, the clip, the noise and the accountant's event, so
# what runs and what is accounted cannot disagree.

# %%
ROUNDS = 20
clients, pool = sites.protect(
    tiles,
    unit="patient",
    placement="dp_sgd",
    expected_batch_size=20,
    tiles_per_unit=2,
    local_steps=1,
    rounds=ROUNDS,
    l2_clip_norm=0.5,
    target_epsilon=8.0,
    target_delta=1e-3,
)
for one in clients:
    mechanism = one.mechanism
    print(
        f"{one.name}: {mechanism.num_units} patients, q {mechanism.sampling_prob:.2f}, clip "
        f"{mechanism.l2_clip_norm}, noise multiplier {mechanism.noise_multiplier:.2f}"
    )

# %% [markdown]
# ## Model and loss
#
# Both are yours, as pure functions. Here is a network in plain JAX: three layers that look at a
# pixel and its eight neighbours, one, two and four pixels away. (`fedjax_dp.models.unet` is used
# further down.)
#
# The loss sees ONE unit of privacy, here the tiles of one patient, and must not depend on anybody
# else's: no batch normalisation, no Dice pooled over a batch. Of the tiles only the first
# `num_tiles` are real; the rest is padding.

# %%
CHANNELS, REACH = 16, (1, 2, 4)


def init(rng):
    """Random weights: a kernel and a bias for each layer, and a head for two classes."""
    sizes = [3, *[CHANNELS] * len(REACH)]
    kernels = [
        rng.normal(0, np.sqrt(2 / (9 * before)), (9 * before, after))
        for before, after in zip(sizes[:-1], sizes[1:], strict=True)
    ]
    params = {
        "kernels": kernels,
        "biases": [np.zeros(CHANNELS) for _ in REACH],
        "head": rng.normal(0, 0.1, (CHANNELS, 2)),
    }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def apply(params, images, key):
    """Logits [N, H, W, 2] of images [N, H, W, 3] in [0, 1]; draws no randomness."""
    del key
    x = 2.0 * images - 1.0
    for kernel, bias, reach in zip(params["kernels"], params["biases"], REACH, strict=True):
        steps = (-reach, 0, reach)
        around = [jnp.roll(x, (down, right), (1, 2)) for down in steps for right in steps]
        x = jax.nn.relu(jnp.concatenate(around, -1) @ kernel + bias)
    return x @ params["head"]


def loss_fn(params, images, labels, num_tiles, keys):
    """Cross-entropy plus one minus soft Dice, the mean over one patient's tiles.

    Images are uint8 [T, H, W, 3], labels uint8 [T, H, W], keys one a tile.
    """
    log_probs = jax.nn.log_softmax(apply(params, images / 255.0, keys[0]))
    is_nucleus = (labels == 1).astype(jnp.float32)
    cross_entropy = -jnp.where(is_nucleus > 0, log_probs[..., 1], log_probs[..., 0]).mean((1, 2))
    probs = jnp.exp(log_probs[..., 1])
    overlap, total = (probs * is_nucleus).sum((1, 2)), (probs + is_nucleus).sum((1, 2))
    per_tile = cross_entropy + 1.0 - (2.0 * overlap + 1.0) / (total + 1.0)
    is_padding = jnp.arange(len(labels)) >= num_tiles
    return jnp.where(is_padding, 0.0, per_tile).sum() / jnp.maximum(num_tiles, 1)


params = init(np.random.default_rng(0))
print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters")

# %% [markdown]
# ## One round
#
# `client_update` is written for ONE client. `jax.vmap` maps it over the clients of a round. What
# differs between clients has a leading axis: keys, client state (none here), public constants,
# and the plan of tile indices. Parameters and pool are shared.
#
# `sites.draw` draws the patients and derives the keys from a secret that each client owns.

# %%
client_update = client.client_update(loss_fn, optax.sgd(1.0), placement="dp_sgd")
over_clients = jax.jit(jax.vmap(client_update, in_axes=(None, 0, 0, 0, 0, None)))

secrets = Secrets.generate([one.name for one in clients])
chunk = sites.draw(clients, secrets, round_index=0)
deltas, _, info = over_clients(params, *chunk, pool)

print("a leaf of the deltas, with its client axis:", jax.tree.leaves(deltas)[0].shape)
print("all messages are finite:", bool(info.is_finite.all()))
# Exact counts of a draw are not private. They may be looked at here and must not be released.
print("patients drawn (not private):", info.units.value.units.astype(int))
print("of these clipped (not private):", info.units.value.clipped.astype(int))

# %% [markdown]
# ## Clip and noise, by hand
#
# The core of a private step. Each patient's gradient is scaled so that it weighs at most one in
# the sum. Take any patient out, and the sum moves by at most one: that is the sensitivity, and
# the noise is measured against it.

# %%
patients = clients[0].unit_tiles[:12]
unit_tiles = client.UnitTiles(
    tile_index=jnp.stack([jnp.asarray(owned) for owned in patients]),
    num_tiles=jnp.full(len(patients), 2),
)


def patient_loss(params, unit, key):
    """The loss of one patient, whose tiles are given by their indices in the pool."""
    images, labels = jnp.asarray(pool.images)[unit.tile_index], pool.labels[unit.tile_index]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, unit.tile_index)
    return loss_fn(params, images, labels, unit.num_tiles, keys)


pool = jax.tree.map(jnp.asarray, pool)
clipped_sum = jax.jit(clipping.clipped_grad(patient_loss))
clip = clients[0].mechanism.l2_clip_norm
unit_keys = jax.random.split(jax.random.key(1), len(patients))

with_all, aux = clipped_sum(params, unit_tiles, unit_keys, len(patients), clip)
without_last, _ = clipped_sum(params, unit_tiles, unit_keys, len(patients) - 1, clip)
difference = jax.tree.map(jnp.subtract, with_all, without_last)
moved = float(clipping.global_norm(difference))
print(f"mean gradient norm before the clip: {aux.value.norm / aux.value.units:.2f} (clip {clip})")
print(f"norm of the sum over {len(patients)} patients: {clipping.global_norm(with_all):.2f}")
print(f"the last patient's share of it: {moved:.4f}, at most 1")
if moved > 1.0001:
    raise RuntimeError("one patient weighs more than one: the clip is broken")

noisy = noise.add_noise(jax.random.key(2), with_all, clients[0].mechanism.noise_multiplier)
added = jax.tree.map(jnp.subtract, noisy, with_all)
print(f"norm of the noise, over all parameters: {clipping.global_norm(added):.2f}")

# %% [markdown]
# The noise is longer than the sum. It points nowhere in particular, though, while the gradients of
# many patients, hospitals and rounds point the same way. So large batches and few rounds pay.

# %% [markdown]
# ## Average
#
# The server adds the messages one by one, with public weights, and never sees more than them.
# Whatever it does with them costs no privacy.

# %%
aggregator = weighted_mean()


def average(deltas):
    """The weighted mean of deltas with a leading client axis."""
    acc = aggregator.init(params)
    for index, one in enumerate(clients):
        model_delta = jax.tree.map(lambda leaf, index=index: leaf[index], deltas)
        acc = aggregator.add(acc, model_delta, one.weight)
    return aggregator.finish(acc)


mean_delta = average(deltas)
print("norm of each message:", jax.vmap(clipping.global_norm)(deltas).round(2))
print(f"norm of their mean: {clipping.global_norm(mean_delta):.2f}")

# %% [markdown]
# ## The price
#
# Each round that a client takes part in is charged, also one in which it drew nobody. Epsilon
# grows with the rounds; the mechanism knows how many fit a budget.

# %%
mechanism = clients[0].mechanism
steps = np.arange(1, 2 * ROUNDS + 1, 3)
spent = [mechanism.epsilon(int(rounds), 1e-3) for rounds in steps]
for rounds in (1, ROUNDS):
    print(f"rounds {rounds}: epsilon {mechanism.epsilon(rounds, 1e-3):.2f}")
print("rounds within epsilon 8:", mechanism.max_rounds(8.0, 1e-3))

figure, axis = plt.subplots(figsize=(5, 2.8), layout="constrained")
axis.plot(steps, spent)
axis.axvline(ROUNDS, linestyle=":", color="grey")
axis.set(xlabel="rounds", ylabel="epsilon of a patient", title="delta 1e-3")
plt.show()

# %% [markdown]
# ## A few rounds
#
# The server's optimiser takes the negative mean delta as its gradient. Every function is compiled
# once: shapes do not depend on what is drawn.

# %%
server = optax.adam(1e-2)


@jax.jit
def server_step(params, server_state, deltas):
    """The average of what the clients sent, and the optimiser's step."""
    gradient = jax.tree.map(jnp.negative, average(deltas))
    updates, server_state = server.update(gradient, server_state, params)
    return optax.apply_updates(params, updates), server_state


trained, server_state, losses = params, server.init(params), []
for round_index in range(1, ROUNDS):  # round 0 was released above, and counts
    chunk = sites.draw(clients, secrets, round_index)
    deltas, _, info = over_clients(trained, *chunk, pool)
    trained, server_state = server_step(trained, server_state, deltas)
    losses.append(float(info.units.value.loss.sum() / info.units.value.units.sum()))
print(f"loss (not private): {losses[0]:.2f} at first, {losses[-1]:.2f} at last")
print(f"epsilon spent: {mechanism.epsilon(ROUNDS, 1e-3):.2f} for each patient, at delta 1e-3")

# %%
evaluator = Evaluator(
    apply, trained, tile_size=TILE_SIZE, batch_size=16, mesh=cohort.client_mesh(1)
)
test = federation.test
scores = summarise(evaluator.confusions(trained, test), test, federation.class_names)
trivial = scores["trivial"]["all_foreground"]["dice"]
print(f"test Dice {scores['dice']:.3f}; calling every pixel a nucleus gives {trivial:.3f}")

shown = [test.of_site(site)[0] for site in test.sites]
predicted = evaluator.predictions(trained, test.images[shown])
figure, axes = plt.subplots(2, len(shown), figsize=(7, 4.8), layout="constrained")
for column, (index, labels) in enumerate(zip(shown, predicted, strict=True)):
    image, truth = test.images[index], test.labels[index]
    contours.show_contours(
        axes[0, column], image, truth, truth, federation.class_names, title=test.sites[column]
    )
    contours.show_contours(
        axes[1, column],
        image,
        truth,
        labels,
        federation.class_names,
        title=contours.dice_text(labels, truth, 2),
        single_colour=contours.PREDICTION_COLOUR,
    )
contours.name_row(axes[0, 0], "truth")
contours.name_row(axes[1, 0], "prediction")
plt.show()

# %% [markdown]
# ## The same, as a run
#
# With a U-Net, augmentation and a moving average of the parameters. `training.run` takes a
# configuration and a folder. It charges each round on disk before it computes it, saves
# checkpoints, and goes on where it was stopped. Run the cell again: the run has finished, so its
# summary is returned. The flags of `python -m experiments.feddp` are the fields of this
# configuration.
#
# It is a second release of the same tiles. On patients' tiles the epsilons of both would add up.

# %%
config = Config(
    data=DataConfig(tile_size=TILE_SIZE),
    model=ModelConfig(base_channels=8, depth=1, num_groups=4),
    privacy=PrivacyConfig(
        placement="dp_sgd",
        unit="patient",
        l2_clip_norm=0.5,
        target_epsilon=8.0,
        target_delta=1e-3,
        expected_batch_size=20,
        tiles_per_unit=2,
    ),
    federation=FederationConfig(rounds=12, server_learning_rate=1e-2, ema_decay=0.5),
    eval_every=5,
    checkpoint_every=5,
)
workdir = pathlib.Path("runs/notebook")
summary = training.run(config, workdir, experiment="notebook", federation=federation)

# %%
for name in ("test", "external"):
    print(f"{name} Dice {summary[name]['dice']:.3f}, worst site {summary[name]['worst_site']}")
print("epsilon per client:", summary["privacy"]["epsilon"]["per_client"])
display(Image(str(workdir / "curves.png"), width=760))
display(Image(str(workdir / "overlays.png"), width=760))

# %% [markdown]
# ## The statement
#
# `privacy.json` says what is promised to whom, and what was not accounted. Its epsilon can be
# computed anew from that file alone.

# %%
stated = json.loads((workdir / "privacy.json").read_text())
print("protected:", stated["protected"], "| against:", stated["adversary"])
for point in stated["weak_points"]:
    print("weak point:", point)
recomputed = statement.recompute_epsilon(stated)
for name, entry in stated["clients"].items():
    print(f"{name}: stated {entry['epsilon']:.4f}, recomputed {recomputed[name]:.4f}")

# %% [markdown]
# ## Your own images
#
# Write a manifest (see the README) and set `config.data.manifest`; or build a `TileTable` from
# arrays and hand `training.run` a `Federation` of such tables.
