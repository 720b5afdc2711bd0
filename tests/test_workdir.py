"""A workdir is one run's: another configuration is refused, and nothing else is."""

import math

import jax
import pytest

from fedjax_dp import workdir
from fedjax_dp.config import Config, ExecutionConfig, PrivacyConfig

MINE = ("feddp", Config(seed=3), "data")


def test_a_claimed_workdir_is_the_runs_own(tmp_path):
    folder = tmp_path / "deep" / "run"
    workdir.check(folder, *MINE)
    assert not folder.exists()  # looking claims nothing
    workdir.claim(folder, *MINE)
    before = (folder / "config.json").read_bytes()
    workdir.check(folder, *MINE)
    workdir.claim(folder, *MINE)
    assert (folder / "config.json").read_bytes() == before


def test_each_difference_is_shown(tmp_path):
    workdir.claim(tmp_path, *MINE)
    config = Config(seed=4, privacy=PrivacyConfig(target_epsilon=2.0))
    for refuse in (workdir.check, workdir.claim):
        with pytest.raises(ValueError, match="another --workdir") as caught:
            refuse(tmp_path, "centralized", config, "other")
        message = str(caught.value)
        assert message.splitlines()[1:-1] == [
            "  data.fingerprint: 'data' there, 'other' now",
            "  experiment: 'feddp' there, 'centralized' now",
            "  privacy.target_epsilon: 8.0 there, 2.0 now",
            "  seed: 3 there, 4 now",
        ]
        assert str(tmp_path) in message
    workdir.check(tmp_path, *MINE)  # a refusal changes nothing


def test_what_is_only_speed_may_change(tmp_path):
    workdir.claim(tmp_path, *MINE)
    config = Config(seed=3, execution=ExecutionConfig(microbatch_size=9), eval_every=1)
    config.checkpoint_every = 1
    workdir.claim(tmp_path, "feddp", config, "data")


def test_a_field_of_an_older_or_newer_version_is_a_difference(tmp_path):
    workdir.claim(tmp_path, *MINE)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"seed"', '"old.seed"'))
    with pytest.raises(ValueError, match=r"old.seed: 3 there, 'absent' now\n  seed: 'absent'"):
        workdir.check(tmp_path, *MINE)


def test_numbers_without_a_json_form_are_no_difference(tmp_path):
    config = Config(privacy=PrivacyConfig(target_epsilon=math.inf, target_delta=1 / 3))
    workdir.claim(tmp_path, "feddp", config, "data")
    workdir.check(tmp_path, "feddp", config, "data")


def test_the_environment_holds_whatever_the_bytes_depend_on(monkeypatch, tmp_path):
    plan = {"microbatch_size": 1}
    plain = workdir.environment_hash(plan)
    assert workdir.environment_hash(dict(plan)) == plain
    found = {plain, workdir.environment_hash({"microbatch_size": 2})}
    with jax.default_matmul_precision("float32"):
        found.add(workdir.environment_hash(plan))
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
        found.add(workdir.environment_hash(plan))
    with monkeypatch.context() as patch:
        patch.setattr(workdir, "versions", lambda: {"jax": "0.0.1"})
        found.add(workdir.environment_hash(plan))
    with monkeypatch.context() as patch:
        patch.setattr(workdir, "_processor", lambda: "another")
        found.add(workdir.environment_hash(plan))
    with monkeypatch.context() as patch:
        # A process held to fewer cores sums in another order, however many the machine has.
        patch.setattr(workdir.os, "sched_getaffinity", lambda pid: set(range(77)), raising=False)
        found.add(workdir.environment_hash(plan))
    with monkeypatch.context() as patch:
        patch.setenv("NPROC", "3")
        found.add(workdir.environment_hash(plan))
    for text in ("", "WIDTH = 3\n", "WIDTH = 4\n"):
        # A package whose source is another: a replay would send other messages.
        package = tmp_path / str(len(found))
        package.joinpath("models").mkdir(parents=True)
        package.joinpath("models", "unet.py").write_text(text)
        with monkeypatch.context() as patch:
            patch.setattr(workdir.fedjax_dp, "__file__", str(package / "__init__.py"))
            found.add(workdir.environment_hash(plan))
    assert len(found) == 11
    assert workdir.environment_hash(plan) == plain


def test_versions_are_of_what_a_result_depends_on():
    found = workdir.versions()
    assert found["jax"] == jax.__version__
    assert {"fedjax_dp", "python", "jaxlib", "flax", "optax", "numpy", "dp-accounting"} <= set(
        found
    )
