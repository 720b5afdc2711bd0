"""The library with one rule broken: every rule of privacy needs a test that sees it break.

    FEDJAX_DP_MUTANT=no_clip python -m pytest tests/federated/test_coupled_neighbours.py
    FEDJAX_DP_MUTANT=no_clip python -m tests.mutants tests.federated.two_devices

A mutant edits the source of a module while it is imported, so what is broken is one line, also in
the middle of a function, and every `from x import y` sees it. A text that is not there exactly once
is an error: the table cannot outlive the code that it describes.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import pathlib
import runpy
import sys
from collections.abc import Sequence
from typing import NamedTuple

VARIABLE = "FEDJAX_DP_MUTANT"
PACKAGE = "fedjax_dp"
_SOURCE = pathlib.Path(__file__).resolve().parents[1] / "src" / PACKAGE


class Edit(NamedTuple):
    """`old`, which stands in the module once, becomes `new`."""

    module: str  # below the package
    old: str
    new: str


class Mutant(NamedTuple):
    """One broken rule.

    Attributes:
        description: what is broken.
        edits: how.
        caught_by: node ids of the tests that must fail, or "audit:CASE" of the audit.
    """

    description: str
    edits: tuple[Edit, ...]
    caught_by: tuple[str, ...]


NEIGHBOURS = "tests/federated/test_coupled_neighbours.py::"
CLIENT = "tests/federated/test_client.py::"
ROUNDS = "tests/federated/test_rounds.py::"
SAMPLING = "tests/data/test_sampling.py::"
RULES = "tests/federated/test_rules.py::"
PRIVACY_RULES = "tests/privacy/test_rules.py::"

MUTANTS = {
    # --- noise
    "noise_too_small": Mutant(
        "noise of a standard deviation smaller by 1.25 than is accounted",
        (Edit("privacy.noise", "    return draws.reshape(-1)[:size].reshape(shape)",
              "    return draws.reshape(-1)[:size].reshape(shape) / 1.25"),),
        ("audit:dp_sgd", "audit:update", "audit:central", "audit:distributed"),
    ),
    "discrete_noise_too_small": Mutant(
        "integer noise of a standard deviation smaller by 1.5 than is accounted",
        (Edit("privacy.discrete_gaussian", "    variance = _checked(stddev_squared)",
              "    variance = _checked(stddev_squared) * 4 / 9"),),
        ("audit:distributed_discrete",),
    ),
    "leaf_without_noise": Mutant(
        "one leaf of the parameters leaves without noise",
        (Edit("privacy.noise", "    return jax.tree.unflatten(treedef, noised)",
              "    return jax.tree.unflatten(treedef, [leaves[0], *noised[1:]])"),),
        (CLIENT + "test_noise_has_the_stated_std[dp_sgd-1.0]",),
    ),
    "noise_reused_across_blocks": Mutant(
        "every block of a draw has the same noise",
        (Edit("privacy.noise", "_pairs(jax.random.fold_in(key, index), _BLOCK)",
              "_pairs(key, _BLOCK)"),),
        ("tests/privacy/test_noise.py::test_the_blocks_of_a_draw_are_independent",),
    ),
    "noise_reused_across_rounds": Mutant(
        "every round has the noise of round 0",
        (Edit("federated.rounds",
              "noise=secrets.key_data(site.name, round_index, Purpose.NOISE",
              "noise=secrets.key_data(site.name, 0, Purpose.NOISE"),),
        (ROUNDS + "test_no_derivation_is_used_twice",),
    ),
    "noise_reused_across_clients": Mutant(
        "every client has the noise of the first",
        (Edit("federated.rounds",
              "noise=secrets.key_data(site.name, round_index, Purpose.NOISE",
              "noise=secrets.key_data(secrets.clients[0], round_index, Purpose.NOISE"),),
        (ROUNDS + "test_no_derivation_is_used_twice",),
    ),
    "noise_reused_across_steps": Mutant(
        "every step of a round has the same noise",
        (Edit("federated.client", "noise_key = jax.random.fold_in(keys.noise, index)",
              "noise_key = keys.noise"),),
        (CLIENT + "test_noise_is_independent_across_steps",),
    ),
    "noise_replicated_over_slots": Mutant(
        "the clients of a chunk, and so those on unlike devices, have the noise of its first",
        (Edit("federated.cohort",
              "        accs, client_state, info = per_device(params, chunk, pool)",
              "        noise = chunk.keys.noise[jax.numpy.zeros(slots, int)]\n"
              "        chunk = chunk._replace(keys=chunk.keys._replace(noise=noise))\n"
              "        accs, client_state, info = per_device(params, chunk, pool)"),),
        (NEIGHBOURS + "test_on_two_devices[noise_is_independent_across_devices]",
         "tests/federated/test_cohort.py::test_blocks_equal_the_loop_over_clients[2]"),
    ),
    "noise_once_a_block": Mutant(
        "noise is added with every block of units, so an empty draw has none",
        (Edit("federated.client",
              "summed = add_noise(noise_key, summed, constants.noise_stddev)",
              "summed = lax.fori_loop(\n"
              "    0, (num_units + microbatch_size - 1) // microbatch_size,\n"
              "    lambda i, tree: add_noise(\n"
              "        jax.random.fold_in(noise_key, i), tree, constants.noise_stddev\n"
              "    ), summed)"),),
        (CLIENT + "test_an_empty_draw_takes_the_same_path",
         CLIENT + "test_client_update_equals_the_naive_loop[dp_sgd-1-drawn]"),
    ),
    "sampler_has_the_noise_seed": Mutant(
        "the sampler and the noise are seeded alike",
        (Edit("federated.rounds",
              "rng = secrets.rng(site.name, round_index, Purpose.SAMPLING",
              "rng = secrets.rng(site.name, round_index, Purpose.NOISE"),),
        (ROUNDS + "test_no_derivation_is_used_twice",),
    ),
    # --- clipping
    "no_clip_of_units": Mutant(
        "a unit's gradient is divided by the clip norm and not clipped",
        (Edit("privacy.clipping",
              "factor = jnp.minimum(1.0 / jnp.maximum(norm, tiny), 1.0 / l2_clip_norm)",
              "factor = 1.0 / l2_clip_norm"),),
        (NEIGHBOURS + "test_one_unit_moves_a_step_by_the_stated_sensitivity[unit0-1]",
         "audit:dp_sgd"),
    ),
    "no_clip_of_updates": Mutant(
        "a model update is not clipped",
        (Edit("privacy.clipping",
              "factor = jnp.minimum(1.0, l2_clip_norm / "
              "jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))",
              "factor = jnp.float32(1.0)"),),
        (NEIGHBOURS + "test_zeroing_a_client_moves_the_update_by_at_most_the_clip",
         "audit:update", "audit:central"),
    ),
    "clip_by_layer": Mutant(
        "every layer is clipped to the whole clip norm, which is accounted as that of the whole",
        (Edit("privacy.clipping",
              "        return loss, norm, norm > l2_clip_norm, "
              "_scale_or_zero(gradient, factor, norm)",
              "        by_layer = jax.tree.map(\n"
              "            lambda g: clip_by_norm([g], l2_clip_norm)[0][0] / l2_clip_norm,\n"
              "            gradient,\n"
              "        )\n"
              "        return loss, norm, norm > l2_clip_norm, by_layer"),),
        (NEIGHBOURS + "test_one_unit_moves_a_step_by_the_stated_sensitivity[unit0-1]",),
    ),
    "clip_of_tiles": Mutant(
        "the tiles of a patient are clipped one by one, and the guarantee is called the patient's",
        (Edit("privacy.clipping", "    return unit\n",
              "    def tiles(params, owner, key, clip):\n"
              "        total = None\n"
              "        for t in range(owner.tile_index.shape[0]):\n"
              "            one = owner._replace(\n"
              "                tile_index=owner.tile_index[t : t + 1],\n"
              "                num_tiles=jnp.minimum(owner.num_tiles, 1),\n"
              "            )\n"
              "            *seen, gradient = unit(params, one, key, clip)\n"
              "            is_tile = t < owner.num_tiles\n"
              "            gradient = jax.tree.map(lambda g, r=is_tile: g * r, gradient)\n"
              "            total = gradient if total is None else jax.tree.map(\n"
              "                jnp.add, total, gradient)\n"
              "        return *seen, total\n\n"
              "    return tiles\n"),),
        (NEIGHBOURS + "test_one_unit_moves_a_step_by_the_stated_sensitivity[unit1-1]",),
    ),
    "sum_before_clip": Mutant(
        "the gradient is summed over devices before it is clipped",
        (Edit("federated.cohort", 'params = lax.pcast(params, CLIENTS, to="varying")', ""),),
        (NEIGHBOURS
         + "test_on_two_devices[a_gradient_at_the_servers_parameters_is_clipped_alone]",),
    ),
    "sum_of_shared_units_before_clip": Mutant(
        "the gradient of units that devices share is summed over them before it is clipped",
        (Edit("privacy.blocks", 'params = lax.pcast(params, axis_name, to="varying")', "pass"),),
        (NEIGHBOURS + "test_on_two_devices[shared_units_equal_the_loop_dp_sgd]",),
    ),
    "divisor_of_the_draw": Mutant(
        "the noised sum is divided by the number of units drawn",
        (Edit("federated.client",
              "(leaf * constants.inverse_expected_batch_size).astype(\n",
              "(leaf / jnp.maximum(num_units, 1)).astype(\n"),),
        (CLIENT + "test_the_divisor_is_the_public_number_not_the_draw[dp_sgd]",),
    ),
    "opened_sum_over_the_draw": Mutant(
        "the server of central divides by how many clients were drawn",
        (Edit("federated.rounds",
              "            release = self._central_release(index, nonce, active)\n"
              "            active = [site for site in active if site.name in drawn]",
              "            active = [site for site in active if site.name in drawn]\n"
              "            release = self._central_release(index, nonce, active or self.sites)"),),
        (RULES + "test_the_divisor_of_central_is_the_expected_number",),
    ),
    # --- units
    "padding_counted": Mutant(
        "padded slots count as units",
        (Edit("privacy.blocks", "            is_real = slot < num_units",
              "            is_real = slot < slots"),),
        ("tests/privacy/test_clipping.py::test_clipped_sum_equals_the_loop_over_units[3-drawn]",),
    ),
    "unit_twice": Mutant(
        "a step holds the first of its units a second time",
        (Edit("data.sampling", "    return drawn.astype(np.int32)",
              "    return np.sort(np.append(drawn, drawn[:1]))[:capacity].astype(np.int32)"),),
        (SAMPLING + "test_plan_holds_real_units_and_tiles_first_and_zeros_behind",),
    ),
    "units_with_replacement": Mutant(
        "units are drawn with replacement, in a number that is binomial",
        (Edit("data.sampling",
              "    drawn = np.flatnonzero(rng.random(num_units) < sampling_prob)",
              "    size = rng.binomial(num_units, sampling_prob)\n"
              "    drawn = np.sort(rng.integers(0, max(num_units, 1), size))"),),
        (SAMPLING + "test_poisson_law_is_independent_coins",),
    ),
    "units_mixed_by_the_loss": Mutant(
        "the loss of a unit holds the mean loss of all units that are computed with it",
        (Edit("privacy.clipping",
              "loss, norm, clipped, gradients = jax.vmap(unit, (None, 0, 0, None))(",
              "pooled = normalised_grad(\n"
              "    lambda p, u, k: loss_fn(p, u, k)\n"
              "    + jnp.mean(jax.vmap(loss_fn, (None, 0, 0))(p, units, keys))\n"
              ")\n"
              "loss, norm, clipped, gradients = jax.vmap(pooled, (None, 0, 0, None))("),),
        (NEIGHBOURS + "test_one_unit_moves_a_step_by_the_stated_sensitivity[unit0-3]",),
    ),
    "tiles_mixed_by_a_layer": Mutant(
        "normalisation takes its moments over the whole batch",
        (Edit("models.layers", "mean = centred.mean((1, 2)).reshape(grouped).mean(-1)",
              "mean = jnp.broadcast_to(\n"
              "            centred.mean((0, 1, 2)), (n, channels)).reshape(grouped).mean(-1)"),),
        ("tests/models/test_unet.py::test_a_tile_does_not_see_the_other_tiles_of_its_batch[False]",),
    ),
    # --- sampling
    "batch_repeated_each_step": Mutant(
        "the batch of the first step is that of all",
        (Edit("data.sampling", "_stream(key, step, _COINS)", "_stream(key, 0, _COINS)"),),
        (SAMPLING + "test_every_step_draws_anew",),
    ),
    "batch_repeated_each_round": Mutant(
        "the batches of the first round are those of all",
        (Edit("federated.rounds",
              "rng = secrets.rng(site.name, round_index, Purpose.SAMPLING",
              "rng = secrets.rng(site.name, 0, Purpose.SAMPLING"),),
        (ROUNDS + "test_no_derivation_is_used_twice",),
    ),
    "shuffled_batches": Mutant(
        "batches of binomial sizes are cut from one shuffled list of the units",
        (Edit("data.sampling",
              "        units = poisson_sample(_stream(key, step, _COINS), len(unit_tiles), "
              "sampling_prob, capacity)",
              "        n = len(unit_tiles)\n"
              "        shuffled = np.tile(_stream(key, 0, _COINS).permutation(n), 2)\n"
              "        sizes = _stream(key, 1, _COINS).binomial(n, sampling_prob, local_steps)\n"
              "        start = sizes[:step].sum() % n if n else 0\n"
              "        units = np.sort(shuffled[start : start + sizes[step]])[:capacity]"),),
        (PRIVACY_RULES + "test_steps_of_a_round_are_drawn_independently",),
    ),
    "overflow_kept": Mutant(
        "a draw above the capacity is not cut",
        (Edit("data.sampling", "    if len(drawn) > capacity:", "    if False:"),),
        (SAMPLING + "test_truncated_law_is_a_uniform_cut",),
    ),
    "overflow_cut_in_order": Mutant(
        "a draw above the capacity loses its last units, not random ones",
        (Edit("data.sampling", "np.sort(rng.choice(drawn, capacity, replace=False))",
              "drawn[:capacity]"),),
        (SAMPLING + "test_truncated_law_is_a_uniform_cut",),
    ),
    # --- secure aggregation
    "shares_for_no_dropout": Mutant(
        "shares are split over all clients, though some may drop out of the sum",
        (Edit("privacy.mechanism", "return num_sharing - self.max_dropouts",
              "return num_sharing"),),
        (PRIVACY_RULES + "test_what_is_left_after_the_dropouts_holds_the_noise",
         "audit:distributed"),
    ),
    "shares_not_split_again": Mutant(
        "shares stay those of the start when a client has left",
        (Edit("federated.rounds", "    sharing = num_sharing or mechanism.num_shares",
              "    sharing = mechanism.num_shares"),),
        (RULES + "test_shares_are_split_again_when_a_site_has_left",),
    ),
    "mask_of_round_0": Mutant(
        "every round has the masks of the first",
        (Edit("federated.rounds",
              "self.secrets.derive(site.name, index, Purpose.MASK",
              "self.secrets.derive(site.name, 0, Purpose.MASK"),),
        (RULES + "test_masks_and_noise_of_shared_rounds_are_derived_once",
         RULES + "test_masks_of_two_rounds_differ_in_every_word"),
    ),
    "mask_given_twice": Mutant(
        "a client masks two messages of a round alike",
        (Edit("privacy.secure_aggregation", "        if party.has_masked:", "        if False:"),),
        ("tests/privacy/test_secure_aggregation.py::test_a_round_masks_one_message_of_a_client",),
    ),
    # --- accounting
    "empty_draw_not_charged": Mutant(
        "a client that drew no unit is not charged",
        (Edit("federated.rounds",
              "        names = [site.name for site in active]\n        nonce =",
              "        names = [\n"
              "            site.name for site in active\n"
              "            if client_input(site, self.secrets, index, 0, self.context)"
              ".plan.num_units.any()\n"
              "        ]\n        nonce ="),),
        (RULES + "test_a_client_that_draws_nothing_is_charged",),
    ),
    "charge_after_release": Mutant(
        "a round's draws and keys are made before its charge is on disk",
        (Edit("federated.rounds",
              "        nonce = self.charges.charge(index, names, self.environment)",
              "        for _ in self._chunks(index, 0, active):\n"
              "            pass\n"
              "        nonce = self.charges.charge(index, names, self.environment)"),),
        (ROUNDS + "test_a_round_is_on_disk_before_anything_of_it_exists",),
    ),
    "units_counted_under_add_or_remove": Mutant(
        "the number of units enters the mechanism under add-or-remove",
        (Edit("privacy.budgets",
              "num_units = dict.fromkeys(num_units, int(nominal_num_units or 0))", "pass"),),
        (PRIVACY_RULES + "test_under_add_or_remove_the_number_of_units_enters_nothing",),
    ),
}  # fmt: skip


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that a mutant edits."""

    def __init__(self, edits: Sequence[Edit]):
        self._edits = {f"{PACKAGE}.{edit.module}": edit for edit in edits}

    def find_spec(self, fullname, path=None, target=None):
        edit = self._edits.get(fullname)
        if edit is None:
            return None
        return importlib.util.spec_from_file_location(
            fullname, path_of(edit), loader=_Loader(fullname, edit)
        )


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the edited source, and leaves no compiled file of it behind."""

    def __init__(self, fullname: str, edit: Edit):
        super().__init__(fullname, str(path_of(edit)))
        self._edit = edit

    def get_code(self, fullname):
        return compile(edited(self._edit), self.path, "exec", dont_inherit=True)


def path_of(edit: Edit) -> pathlib.Path:
    """The file of the module that is edited."""
    return _SOURCE.joinpath(*edit.module.split(".")).with_suffix(".py")


def edited(edit: Edit) -> str:
    """The edited source; the indentation of the line that is replaced is given to all of them."""
    source = path_of(edit).read_text("utf-8")
    if source.count(edit.old) != 1:
        raise ValueError(
            f"Expected {edit.old!r} once in {edit.module}, found it {source.count(edit.old)} times."
        )
    before = source[: source.index(edit.old)]
    line = before[before.rindex("\n") + 1 :]
    indent = line[: len(line) - len(line.lstrip())]
    new = edit.new if not indent else edit.new.replace("\n", "\n" + indent)
    return source.replace(edit.old, new)


def apply(name: str) -> None:
    """Breaks the rule in this process; before the library is imported.

    Raises:
        KeyError: no mutant of that name.
        RuntimeError: the library was imported before.
        ValueError: the text to be replaced is not there, or more than once.
    """
    mutant = MUTANTS[name]
    for edit in mutant.edits:
        compile(edited(edit), str(path_of(edit)), "exec")  # now, not in the middle of an import
    if loaded := sorted(m for m in sys.modules if m.split(".")[0] == PACKAGE and "." in m):
        raise RuntimeError(f"Expected to break {name} before the library is loaded, got {loaded}.")
    sys.meta_path.insert(0, _Finder(mutant.edits))


def apply_from_environment() -> str:
    """Applies the mutant that `FEDJAX_DP_MUTANT` names, if any; returns its name or ""."""
    if name := os.environ.get(VARIABLE, ""):
        apply(name)
    return name


if __name__ == "__main__":
    apply_from_environment()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__")
