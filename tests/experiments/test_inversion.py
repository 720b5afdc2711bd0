"""The sweep of attacks, small: what it writes, that it goes on, and what it refuses."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from experiments import inversion_report, inversion_sweep
from experiments.inversion_sweep import Options
from fedjax_dp.config import Config, DataConfig, ModelConfig

CONFIG = Config(
    data=DataConfig(tile_size=32, patients_per_site=2, tiles_per_patient=2),
    model=ModelConfig(base_channels=8, depth=1),
)
OPTIONS = Options(
    site="alder",
    split="train",
    tile_size=16,
    victims=1,
    candidates=2,
    batch_sizes=(1,),
    noise_multipliers=(1.0,),
    local_steps=1,
    steps=3,
    batch_steps=2,
)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inversion")
    return folder, *inversion_sweep.sweep(CONFIG, OPTIONS, folder)


def test_every_setting_has_scores_priors_and_a_bound(swept):
    _, report, pictures = swept
    rows = report["checkpoints"]["fresh"]
    assert [row["setting"] for row in rows] == ["one tile", "clipped, no noise", "noise 1"]
    for row in rows:
        assert set(row["priors"]) == {"mean_tile", "random_tile"}
        assert row["identification"]["trials"] == 2
        assert pictures[f"fresh/{row['setting']}"].shape == (1, 16, 16, 3)
    # Without noise the right candidate explains the message exactly.
    assert [row["identification"]["top1"] for row in rows[:2]] == [1.0, 1.0]
    assert rows[0]["identification"]["epsilon"] is None
    assert rows[0]["identification"]["bound"] == 1.0
    assert rows[2]["identification"]["epsilon"] == pytest.approx(4.38, abs=0.01)  # delta 1e-5
    assert rows[2]["identification"]["bound"] == pytest.approx(0.841, abs=0.001)  # Phi(1), of two
    assert report["is_public"]


def test_the_report_has_its_tables_and_a_picture_that_is_not_empty(swept):
    folder, report, pictures = swept
    text = inversion_report.write(report, pictures, folder)
    assert "| noise 1 | 1 | 4.38 |" in text
    assert json.loads((folder / "inversion.json").read_text())["site"] == "alder"
    picture = np.asarray(Image.open(folder / "inversion.png"))
    assert picture.std() > 5


def test_what_was_attacked_is_not_attacked_again(swept, monkeypatch):
    folder, report, _ = swept

    def refuse(*_):
        raise AssertionError("attacked again")

    monkeypatch.setattr(inversion_sweep, "attack_setting", refuse)
    again, _ = inversion_sweep.sweep(CONFIG, OPTIONS, folder)
    assert again == report
    with pytest.raises(AssertionError, match="again"):
        inversion_sweep.sweep(CONFIG, dataclasses.replace(OPTIONS, seed=1), folder)


def test_the_first_tiles_are_the_victims_whatever_the_batch():
    assert inversion_sweep._messages(4, 1).tolist() == [[0], [1], [2], [3]]
    assert inversion_sweep._messages(4, 16).shape == (1, 16)
    assert inversion_sweep._messages(5, 2).tolist() == [[0, 1], [2, 3], [4, 5]]


def test_settings_go_from_nothing_to_much_protection():
    names = [setting.name for setting in inversion_sweep.settings(Options())]
    assert names[:5] == [
        "one tile", "batch of 4", "batch of 16", "4 local steps", "clipped, no noise"
    ]  # fmt: skip
    assert names[-1] == "update, noise 3.7"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"site": "oak"}, "--site among"),
        ({"tile_size": 8}, "--tile_size"),
        ({"tile_size": 64}, "--tile_size"),
        ({"candidates": 500}, "Lower --candidates"),
    ],
)
def test_options_that_do_not_fit_the_data_say_what_to_do(change, message):
    with pytest.raises(ValueError, match=message):
        inversion_sweep.choose_tiles(CONFIG, dataclasses.replace(OPTIONS, **change))


def test_a_checkpoint_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="finished run"):
        inversion_sweep.load_target(str(tmp_path), CONFIG, 2, OPTIONS)
