"""The totals of all runs by command line."""

import subprocess
import sys
import types

import pytest
from absl import app

from experiments import released
from experiments.released import tables
from fedjax_dp.data.sources import Holding, SiteSource
from fedjax_dp.privacy.mechanism import Mechanism
from fedjax_dp.privacy.register import Plan, Register, Run


def held(*sources):
    """What a client holds that is one whole site, or a pool of sites."""
    return Holding(sources, is_whole=True, is_patient=False)


OAK, ELM = SiteSource("oak", "f1" * 16, "p1"), SiteSource("elm", "f2" * 16, "p2")


def mechanism(placement="dp_sgd", z=1.0518):
    return Mechanism(
        placement=placement, unit="patient", num_units=200, sampling_prob=0.08, capacity=200,
        local_steps=1, l2_clip_norm=1.0, noise_multiplier=z,
    ).descriptor()  # fmt: skip


@pytest.fixture
def register(tmp_path):
    """Three seeds at epsilon 8 on oak, the last of them killed."""
    made = Register(tmp_path / "privacy_register.jsonl")
    for i in range(3):
        add(made, i, {"oak": Plan(held(OAK), mechanism(), 250)})
    for i in range(2):
        made.close_run(f"{i:032x}", {"oak": 250})
    return made


def add(register, number, plans, name="seed", **changes):
    settings = {"seed": -1, "experiment": "feddp", "tile": "128 px"}
    register.open_run(
        Run(run_id=f"{number:032x}", name=f"{name}{number}", plans=plans, **settings | changes)
    )


def line(text, start):
    (found,) = [row for row in text.splitlines() if row.startswith(f"| {start} |")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_three_seeds(register):
    text = tables(register.path)
    assert "### oak (data f1f1f1f1)" in text
    assert line(text, "seed0")[3:] == ["oak", "secret", "dp_sgd", "patient", "250 charged"]
    assert line(text, "seed2")[-1] == "250 planned"
    unit, epsilon, against, note = line(text, "patient")
    assert (unit, epsilon, note) == ("patient", "14.70", "")
    assert against.startswith("the server")
    assert line(text, "client")[1:] == [
        "none valid",
        "",
        "seed0, seed1, seed2: placement dp_sgd protects no client",
    ]
    assert "NOT PRIVATE" not in text
    assert "Not counted" not in text


def test_some_runs_alone(register):
    assert line(tables(register.path, only=("seed1",)), "patient")[1] == "8.00"
    assert "seed2" not in tables(register.path, only=("seed1",))
    with pytest.raises(ValueError, match="seed0, seed1, seed2; got also seed7"):
        tables(register.path, only=("seed0", "seed7"))


def test_what_a_reader_must_know(register):
    add(register, 3, {"pooled": Plan(held(OAK, ELM), mechanism("none", 0.0), 9)}, "pool", seed=4)
    add(
        register,
        4,
        {"oak": Plan(held(OAK._replace(fingerprint="f3" * 16)), mechanism(), 5)},
        "other",
    )
    text = tables(register.path)
    (oak,) = [part for part in text.split("### ") if part.startswith("oak (data f1f1f1f1)")]
    assert line(oak, "patient")[1] == "none valid"
    assert "pool3: placement none adds no noise. The others together: 14.70" in oak
    assert "NOT PRIVATE to whoever knows their seeds: pool3." in oak
    assert "Not counted: other4" in oak
    assert "privacy filter" in text
    assert [part[:9] for part in text.split("### ")[1:]] == ["elm (data", "oak (data", "oak (data"]


def test_errors_are_told(tmp_path):
    path = tmp_path / "register.jsonl"
    with pytest.raises(FileNotFoundError, match=r"no register of runs at .*register\.jsonl"):
        tables(path)
    path.touch()
    with pytest.raises(ValueError, match="knows no runs yet"):
        tables(path)


def test_the_command(register, monkeypatch, capsys):
    for name, value in {"_REGISTER": str(register.path), "_DELTA": 1e-6, "_ONLY": "seed0,"}.items():
        monkeypatch.setattr(released, name, types.SimpleNamespace(value=value))
    assert released.main(["released"]) == 0
    assert capsys.readouterr().out == tables(register.path, delta=1e-6, only=("seed0",))
    monkeypatch.setattr(released, "_REGISTER", types.SimpleNamespace(value=""))
    with pytest.raises(app.UsageError, match="--register="):
        released.main(["released"])


def test_a_missing_file_by_command_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.released", f"--register={tmp_path / 'absent.jsonl'}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("There is no register of runs at")
