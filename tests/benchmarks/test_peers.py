"""What the benchmarks beside other libraries rest on; all but one test need none of them."""

import dataclasses
import json
import os
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.peers import competition, flax_unet, interleave, jax_steps, records, variants
from benchmarks.peers.agreement import Agreement, DisagreementError
from benchmarks.peers.problem import Sizes, load, relative_error
from fedjax_dp.models.unet import unet

SMALL = Sizes(base_channels=8, depth=1, tile_size=8, batch=2)

DUMMY = """
import time
import numpy as np

class Dummy:
    def __init__(self, seconds, value):
        self.seconds, self.value, self.turns = seconds, value, 0

    def step(self):
        print("a library that prints")
        if self.seconds < 0:
            raise ValueError("no such step")
        self.note(f"{self.value}")
        if self.seconds:
            time.sleep(self.seconds)
            self.note("end")

    def note(self, text):
        with open("turns", "a") as file:
            file.write(text + "\\n")

    def summed(self):
        return {"leaf": np.full(3, self.value)}

    def info(self):
        return {"told": self.value}

def make(problem, seconds, value):
    return Dummy(seconds, value)
"""


@pytest.fixture(scope="module")
def problem():
    return records.make_problem(SMALL)


@pytest.fixture
def dummy(tmp_path, monkeypatch):
    """Makes variants of a module that only the workers can import."""
    (tmp_path / "dummy_peer.py").write_text(textwrap.dedent(DUMMY))
    path = [str(tmp_path), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.chdir(tmp_path)

    def make(name, *, seconds=0.0, value=1.0, processes=1):
        return interleave.Variant(
            name=name,
            label=f"{processes}",
            factory="dummy_peer:make",
            options={"seconds": seconds, "value": value},
            processes=processes,
        )

    return make


def cores():
    return interleave.first_cores(1) * 2  # this machine may have one


def test_a_problem_survives_its_file(problem, tmp_path):
    problem.save(tmp_path / "problem.npz")
    again = load(tmp_path / "problem.npz")
    assert again.sizes == problem.sizes
    assert relative_error(again.weights, problem.weights) == 0.0
    np.testing.assert_array_equal(again.images, problem.images)
    np.testing.assert_array_equal(again.labels, problem.labels)
    assert {0, 1, 255} == set(np.unique(problem.labels))


def test_parts_are_the_batch(problem):
    parts = [problem.part(index, 2) for index in range(2)]
    np.testing.assert_array_equal(np.concatenate([p.images for p in parts]), problem.images)
    assert [p.sizes.batch for p in parts] == [1, 1]
    with pytest.raises(ValueError, match="divisible by 3"):
        problem.part(0, 3)


@pytest.mark.parametrize("up", ["transpose", "dense"])
def test_plain_flax_layers_give_our_logits_and_gradients(problem, up):
    """Also at weights that are not kept away from ReLU's kink, which `make` arranges."""
    rng = np.random.default_rng(1)
    weights = {
        name: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32)
        for name, leaf in problem.weights.items()
    }
    images = jnp.asarray(problem.images, jnp.float32) / 255.0
    ours = jax_steps.our_network(problem)(jax_steps.from_flat(weights), images, None)
    plain = flax_unet.FlaxUNet(2, base_channels=8, depth=1, up=up)
    params = flax_unet.from_flat(weights, up)
    shapes = jax.eval_shape(plain.init, jax.random.key(0), images)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    np.testing.assert_allclose(plain.apply({"params": params}, images), ours, atol=2e-4)
    assert relative_error(flax_unet.to_flat(params, up), weights) == 0.0


def test_our_sum_without_noise_is_read_from_the_step(problem):
    """The naive loop over the tiles, from Flax's own layers, gives the same clipped sum."""
    plain, clip = flax_unet.FlaxUNet(2, base_channels=8, depth=1), problem.sizes.l2_clip_norm
    loss = jax_steps.loss_of(lambda params, images, key: plain.apply({"params": params}, images))
    params, key = flax_unet.from_flat(problem.weights), jax.random.key(0)[None]

    @jax.jit
    def gradient(image, labels):
        return jax.grad(lambda p: loss(p, image[None], labels[None], 1, key))(params)

    total, norms = {}, []
    for image, labels in zip(problem.images, problem.labels, strict=True):
        flat = flax_unet.to_flat(gradient(image, labels))
        norms.append(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in flat.values())))
        factor = min(1.0, clip / norms[-1])
        total = {name: total.get(name, 0.0) + factor * leaf for name, leaf in flat.items()}
    assert min(norms) < clip < max(norms)  # clipping matters, and not for all
    assert relative_error(jax_steps.ours(problem, placement="dp_sgd").summed(), total) < 1e-4


def test_the_weights_of_torch_map_there_and_back(problem):
    pytest.importorskip("torch", reason="PyTorch is in the environment of `make bench-peers` alone")
    from benchmarks.peers import torch_unet

    for up in ("shuffle", "transpose"):
        model = torch_unet.TorchUNet(2, base_channels=8, depth=1, up=up)
        torch_unet.load_flat(model, problem.weights)
        again = torch_unet.to_flat(dict(model.named_parameters()))
        assert relative_error(again, problem.weights) == 0.0


def test_variants_take_turns(dummy, tmp_path):
    with (
        interleave.started(dummy("a", value=1.0), None, cores()[:1]) as first,
        interleave.started(dummy("b", value=2.0), None, cores()[:1]) as second,
    ):
        assert first.info["told"] == 1.0
        (tmp_path / "turns").write_text("")
        interleave.take_turns([first, second], 3)
        assert (tmp_path / "turns").read_text().split() == ["1.0", "1.0", "2.0", "2.0"] * 3
        assert len(first.seconds) == len(second.seconds) == 3
        assert first.peak_bytes() >= 0


def test_two_processes_work_at_once_and_the_slower_counts(dummy, tmp_path):
    with interleave.started(dummy("a", seconds=0.4, processes=2), None, cores()) as running:
        (tmp_path / "turns").write_text("")
        running.repeat()
        assert (tmp_path / "turns").read_text().split() == ["1.0", "1.0", "end", "end"] * 2
        assert running.seconds[0] >= 0.4
        assert running.summed()["leaf"].tolist() == [2.0] * 3  # the sum over both


def test_a_worker_that_fails_says_why(dummy):
    with pytest.raises(interleave.WorkerError, match="no such step"):
        interleave.Running(dummy("a", seconds=-1.0), None, cores()[:1])


def test_unlike_work_is_refused(dummy):
    agreement = Agreement()
    with interleave.started(dummy("private"), None, cores()[:1]) as running:
        assert agreement.check(running) == 0.0
    with interleave.started(dummy("opacus", value=1.00005), None, cores()[:1]) as running:
        assert agreement.check(running) == pytest.approx(5e-5, rel=1e-3)
    for value in (1.001, float("nan")):
        with (
            interleave.started(dummy("opacus", value=value), None, cores()[:1]) as running,
            pytest.raises(DisagreementError, match="opacus: 1 differs"),
        ):
            agreement.check(running)


def test_a_record_says_which_arrangement(dummy, tmp_path, capsys):
    found = [
        records.Result(
            variant=dummy(name),
            is_best=is_best,
            seconds=(seconds,) * 3,
            peak_bytes=5,
            error=1e-6,
            info={"prepare_seconds": 3.0},
        )
        for name, seconds, is_best in (
            ("torch", 4.0, False),
            ("torch", 2.0, True),
            ("private", 1.0, True),
        )
    ]
    path = tmp_path / "records.jsonl"
    records.report("clipping", found, SMALL, str(path), {"torch": (0.75, 1.0)})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["name"] for line in lines] == ["torch", "private", "torch: 1"]
    assert [line["tiles_per_second"] for line in lines] == [1.0, 2.0, 0.5]
    assert [line["compile_seconds"] for line in lines] == [1.0, 2.0, 0.0]
    assert lines[0]["peak_bytes"] == 5
    assert lines[0]["settings"]["base_channels"] == 8
    assert "2.000" in capsys.readouterr().out  # ours is twice as fast


def test_sizes_of_a_column():
    assert competition.sizes_of("32:256:4") == Sizes(base_channels=32, tile_size=256, batch=4)
    assert competition.sizes_of("16:128:8:4:3").num_tiles == 96
    for text in ("16:128", "a:b:c", "1:2:3:4:5:6"):
        with pytest.raises(ValueError, match="Expected --columns"):
            competition.sizes_of(text)


@pytest.mark.parametrize("made", [variants.step_variants(), variants.round_variants(2)])
def test_titles_are_distinct_and_ours_come_first(made):
    made = made + [variants.split(v, 2) for v in made]
    assert len({v.title for v in made}) == len(made)
    assert made[0].name == "private"
    assert all(dataclasses.asdict(v)["factory"].count(":") == 1 for v in made)


def test_the_network_that_is_timed_is_the_one_we_ship(problem):
    init, _ = unet(2, base_channels=8, depth=1)
    shipped = jax.tree.map(jnp.shape, init(jax.random.key(0)))
    assert shipped == jax.tree.map(jnp.shape, jax_steps.from_flat(problem.weights))
