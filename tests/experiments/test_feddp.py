"""The experiment by command line: flags, exit codes, and messages without a traceback."""

import csv
import os
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from experiments import launcher
from fedjax_dp import training
from fedjax_dp.config import Config
from fedjax_dp.interrupts import Stopped
from tests import runs
from tests.runs import compiled, federation, no_pictures, read_json, tiny  # noqa: F401

TINY = {
    "data.tile_size": 32, "data.patients_per_site": 2, "data.tiles_per_patient": 1,
    "model.base_channels": 8, "model.depth": 1, "model.num_groups": 4,
    "privacy.noise_multiplier": 1.5, "privacy.target_epsilon": 0, "execution.devices": 1,
    "federation.rounds": 2, "seed": 3,
}  # fmt: skip


def command(workdir, *more, experiment="feddp", **changes):
    given = [f"--config.{name}={value}" for name, value in (TINY | changes).items()]
    return [
        sys.executable, "-W", "error", "-m", f"experiments.{experiment}", f"--workdir={workdir}",
        *given, *more,
    ]  # fmt: skip


def call(words, compiled):  # noqa: F811
    environment = runs.subprocess_environment(compiled)
    return subprocess.run(words, cwd=runs.ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_run_by_flags(compiled, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    done = call(command(folder), compiled)
    assert done.returncode == 0, done.stderr
    assert "an integer seed makes the noise reproducible: NOT private" in done.stdout
    assert f"are in {folder}" in done.stdout
    for shown in ("loss=", "dice=", "epsilon="):
        assert shown in done.stderr
    summary = read_json(folder / "summary.json")
    assert (summary["experiment"], summary["rounds"], summary["seed"]) == ("feddp", 2, 3)
    assert len(summary["privacy"]["epsilon"]["per_client"]) == 5
    identity = read_json(folder / "config.json")["identity"]
    for name, value in TINY.items():
        if not name.startswith("execution."):
            assert identity[name] == value
    for name in ("metrics.jsonl", "charges.jsonl", "privacy.json", "checkpoints/2"):
        assert (folder / name).exists(), name
    for name in ("curves.png", "overlays.png", "overlays_external.png"):
        assert (folder / name).stat().st_size > 1000
    assert list((folder / "tensorboard").glob("events.*"))


def test_the_process_ends_with_1_and_a_line(compiled, tmp_path):  # noqa: F811
    for words, line in (
        (
            command(tmp_path / "run", **{"data.tile_size": 33}),
            "ValueError: Expected data.tile_size",
        ),
        (command(tmp_path / "run", **{"privacy.epsilon": 4}), "Field epsilon not found"),
    ):
        done = call(words, compiled)
        assert done.returncode == 1
        assert done.stderr.startswith(line)
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.tile_size": 33}, "data.tile_size to be a multiple of 2**model.depth = 2, got 33"),
        ({"data.train_sites": "alder"}, "train_sites and data.external_sites empty without a"),
        ({"data.manifest": "nowhere/manifest.csv"}, "nowhere/manifest.csv"),
        ({"privacy.placement": "dpsgd"}, "'dpsgd'"),
        ({"privacy.unit": "person"}, "'person'"),
        ({"privacy.noise_multiplier": 0.0}, "target_epsilon"),
        ({"model.init_from": "nowhere"}, "Expected model.init_from to hold a finished run"),
        ({"federation.client_optimizer": "adamm"}, "'adamm'"),
    ],
    ids=str,
)
def test_a_users_mistake_is_one_line_and_exit_code_1(
    changes, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    drawn = "fedjax_dp.assembly.federation.synthetic_federation"
    monkeypatch.setattr(drawn, lambda **_: federation())
    code = launcher.run_and_report(tiny(**changes), str(tmp_path / "run"), "feddp")
    captured = capsys.readouterr()
    assert code == 1
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_folder_that_may_not_be_written_is_a_users_mistake(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "/locked")

    monkeypatch.setattr(training, "run", refuse)
    assert launcher.run_and_report(tiny(), str(tmp_path), "feddp") == 1
    assert "Permission denied: '/locked'" in capsys.readouterr().err


def test_a_stopped_run_has_an_exit_code_of_its_own(tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise Stopped("Stopped after round 3.")

    monkeypatch.setattr(training, "run", stop)
    assert launcher.run_and_report(tiny(), str(tmp_path), "feddp") == launcher.EXIT_STOPPED == 130
    assert capsys.readouterr().err == "Stopped after round 3.\n"


def test_an_error_of_the_program_is_no_users_mistake(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise TypeError

    monkeypatch.setattr(training, "run", fail)
    with pytest.raises(TypeError):
        launcher.run_and_report(tiny(), str(tmp_path), "feddp")


# --- flags


def parsed(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["feddp", *arguments])  # ml_collections looks there
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_dataclass("config", Config(), flag_values=values)
    values(sys.argv)
    return holder.value


def test_flags_are_the_configuration(monkeypatch):
    assert parsed(monkeypatch) == Config()
    config = parsed(
        monkeypatch,
        "--config.seed=7", "--config.privacy.target_epsilon=4", "--config.model.standardize=true",
        "--config.data.train_sites=a,b", "--config.federation.pooled",
    )  # fmt: skip
    expected = Config(seed=7)
    expected.privacy.target_epsilon = 4.0
    expected.model.standardize = True
    expected.data.train_sites = "a,b"
    expected.federation.pooled = True
    assert config == expected
    for argument in ("--config.privacy.epsilon=4", "--config.seed=x"):
        with pytest.raises((KeyError, flags.Error)):
            parsed(monkeypatch, argument)


@pytest.mark.parametrize(
    ("given", "devices", "expected"),
    [
        (None, 1, None),
        (None, 2, "--xla_force_host_platform_device_count=2"),
        (None, 0, "--xla_force_host_platform_device_count=5"),
        ("--a=1", 3, "--a=1 --xla_force_host_platform_device_count=3"),
        ("--xla_force_host_platform_device_count=8", 2, "--xla_force_host_platform_device_count=8"),
    ],
)
def test_the_processor_is_split_unless_the_user_did(given, devices, expected, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # so that what split_cpu sets is taken back
    monkeypatch.delenv("XLA_FLAGS")
    if given:
        monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.setattr(launcher, "cores", lambda: 5)
    launcher.split_cpu(devices)
    assert os.environ.get("XLA_FLAGS") == expected


def test_centralized_pools_and_protects_nobody(monkeypatch):
    """Its defaults; flags may change them."""
    seen = {}
    monkeypatch.setattr(launcher.flags, "DEFINE_string", lambda *_, **__: None)
    monkeypatch.setattr(launcher.app, "run", lambda *_, **__: None)
    monkeypatch.setattr(
        launcher.config_flags, "DEFINE_config_dataclass", lambda name, value: seen.update(c=value)
    )
    source = (runs.ROOT / "experiments" / "centralized.py").read_text()
    exec(compile(source, "centralized.py", "exec"), {"__name__": "__main__"})
    expected = Config()
    expected.federation.pooled = True
    expected.privacy.placement = "none"
    assert seen["c"] == expected


# --- real tissue


def real(real_data, **changes):
    return tiny(
        **{
            "data.manifest": str(real_data / "federation" / "manifest.csv"),
            "data.tile_size": 256,
            "federation.rounds": 1,
            "privacy.unit": "patient",
        }
        | changes
    )


@pytest.mark.slow
def test_real_tissue_with_known_patients(real_data, compiled, no_pictures, tmp_path):  # noqa: F811
    sites = {"data.train_sites": "curie,tcga-b0", "data.external_sites": "tcga-ch"}
    config = real(real_data, **sites)
    summary = training.run(config, tmp_path, progress=False)
    with open(config.data.manifest, newline="") as file:
        rows = list(csv.DictReader(file))
    for site in ("curie", "tcga-b0"):
        patients = {r["patient"] for r in rows if (r["site"], r["split"]) == (site, "train")}
        stated = read_json(tmp_path / "privacy.json")["clients"][site]
        assert stated["mechanism"]["num_units"] == len(patients)
    assert summary["privacy"]["unit"] == "patient"
    assert set(summary["test"]["per_site"]) == {"curie"}
    assert set(summary["external"]["per_site"]) == {"tcga-ch"}


@pytest.mark.slow
def test_real_tissue_without_known_patients_is_refused(real_data, tmp_path, capsys):
    assert launcher.run_and_report(real(real_data), str(tmp_path / "run"), "feddp") == 1
    message = capsys.readouterr().err
    assert "unknown ones at emory, uhcw" in message
    assert "unit='slide'" in message


@pytest.mark.slow
def test_an_unknown_site_is_refused(real_data, tmp_path, capsys):
    config = real(real_data, **{"data.train_sites": "curie,nowhere"})
    assert launcher.run_and_report(config, str(tmp_path / "run"), "feddp") == 1
    assert "nowhere" in capsys.readouterr().err
