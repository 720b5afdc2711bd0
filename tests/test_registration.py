"""A run enters the register before it charges, and tells what all runs cost when it ends."""

import json
import pathlib
import shutil

import pytest

from fedjax_dp.data.sources import Holding, SiteSource
from fedjax_dp.privacy.mechanism import Mechanism
from fedjax_dp.privacy.register import Register
from fedjax_dp.registration import REGISTER_NAME, register_run

SOURCES = {"oak": SiteSource("oak", "f1", "p1"), "elm": SiteSource("elm", "f2", "p2")}
MECHANISM = Mechanism(
    placement="dp_sgd", unit="patient", num_units=50, sampling_prob=0.1, capacity=50,
    local_steps=1, l2_clip_norm=1.0, noise_multiplier=2.0,
)  # fmt: skip


def begin(folder, **changes):
    settings = {
        "experiment": "feddp", "seed": -1, "tile_size": 32,
        "holdings": {name: Holding((source,), True, False) for name, source in SOURCES.items()},
        "mechanisms": dict.fromkeys(SOURCES, MECHANISM), "charged": {}, "rounds_left": 10,
        "limits": {},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    return register_run(folder, **settings | changes)


def planned(folder):
    """Rounds of every run of the folder's register, client by client."""
    runs = Register(folder / REGISTER_NAME).runs()
    return [{client: plan.rounds for client, plan in run.plans.items()} for run in runs]


def test_runs_of_one_folder_share_a_register(tmp_path):
    first, second = begin(tmp_path / "a"), begin(tmp_path / "b", seed=3)
    assert first.register.path == second.register.path == tmp_path / REGISTER_NAME
    assert first.run_id != second.run_id
    assert len(bytes.fromhex(first.run_id)) == 16
    runs = first.register.runs()
    assert [(run.name, run.seed, run.tile) for run in runs] == [
        ("a", -1, "32 px"),
        ("b", 3, "32 px"),
    ]
    assert runs[0].plans["oak"].holding.sources == (SOURCES["oak"],)


def test_the_register_lies_beside_a_workdir_named_by_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    assert begin(pathlib.Path(".")).register.path == tmp_path / REGISTER_NAME
    assert Register(tmp_path / REGISTER_NAME).runs()[0].name == "a"


def test_a_run_that_goes_on_is_the_same_run(tmp_path):
    first = begin(tmp_path / "a")
    again = begin(tmp_path / "a", charged={"oak": 4, "elm": 3}, rounds_left=6)
    assert again.run_id == first.run_id
    assert planned(tmp_path) == [{"oak": 10, "elm": 10}]
    # Five rounds after the checkpoint were charged, and may have to be charged again.
    begin(tmp_path / "a", charged={"oak": 9, "elm": 4}, rounds_left=6)
    assert planned(tmp_path) == [{"oak": 15, "elm": 10}]
    again.close({"oak": 10, "elm": 4})
    assert planned(tmp_path) == [{"oak": 10, "elm": 4}]


def test_no_more_is_planned_than_the_budget_allows(tmp_path):
    begin(tmp_path / "a", charged={"oak": 3, "elm": 9}, rounds_left=10, limits={"oak": 5, "elm": 8})
    assert planned(tmp_path) == [{"oak": 5, "elm": 9}]


def test_a_copy_and_a_workdir_made_anew_are_runs_of_their_own(tmp_path):
    first = begin(tmp_path / "a", charged={"oak": 2}, rounds_left=8)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    copy = begin(tmp_path / "copy", charged={"oak": 2}, rounds_left=8)
    assert begin(tmp_path / "copy", charged={"oak": 2}, rounds_left=8).run_id == copy.run_id
    shutil.rmtree(tmp_path / "a")
    anew = begin(tmp_path / "a")
    assert len({first.run_id, copy.run_id, anew.run_id}) == 3
    assert [rounds["oak"] for rounds in planned(tmp_path)] == [10, 10, 10]


def test_a_pool_holds_the_data_of_every_site(tmp_path):
    pooled = begin(
        tmp_path / "a",
        holdings={"pooled": Holding(tuple(SOURCES.values()), True, False)},
        mechanisms={"pooled": MECHANISM},
    )
    (run,) = pooled.register.runs("f2")
    assert run.plans["pooled"].holding.sources == tuple(SOURCES.values())
    pooled.close({"pooled": 10})
    assert set(pooled.across_runs(1e-5)["sites"]) == {"oak", "elm"}


def test_the_statements_part_counts_all_runs_up_to_now(tmp_path):
    epsilons = []
    for name in ("a", "b", "c"):
        made = begin(tmp_path / name)
        made.close(dict.fromkeys(SOURCES, 10))
        part = made.across_runs(1e-5)
        assert json.loads(json.dumps(part, allow_nan=False)) == part
        epsilons.append(part["sites"]["oak"]["epsilon_if_all_released"]["patient"]["epsilon"])
    expected = [MECHANISM.epsilon(rounds, 1e-5) for rounds in (10, 20, 30)]
    assert epsilons == pytest.approx(expected, rel=1e-6)
    assert part["register"] == REGISTER_NAME


def test_what_another_run_left_does_not_keep_this_one_from_ending(tmp_path):
    made = begin(tmp_path / "a")
    made.close({})
    with made.register.path.open("ab") as file:
        file.write(b"nonsense\n")
    assert "Line 3" in made.across_runs(1e-5)["error"]
    with pytest.raises(ValueError, match="Line 3"):  # but nothing new begins
        begin(tmp_path / "b")


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_charged(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Register, "open_run", refuse)
    with pytest.raises(PermissionError, match=r"Use a workdir in a folder that can be written"):
        begin(tmp_path / "a")
