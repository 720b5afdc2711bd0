"""Finished runs become points: the worst client's epsilon, the colluders', the patients'."""

import json
import math

import pytest

from experiments import tradeoff
from experiments.tradeoff import Point, label, read, table
from fedjax_dp.privacy.budgets import make_mechanisms
from fedjax_dp.privacy.statement import statement
from fedjax_dp.reporting.tradeoff import plot_tradeoff

ROUNDS = 5


def finished(folder, placement, *, dice=0.8, worst=0.7, done=True, **settings):
    """A workdir as far as it is read, with the statement of a real mechanism."""
    noise = {} if placement == "none" else {"noise_multiplier": 2.0}
    made = make_mechanisms(
        {"north": 200, "south": 400}, placement=placement, unit="tile", expected_batch_size=20,
        local_steps=1, rounds=ROUNDS, l2_clip_norm=1.0, **noise, **settings,
    )  # fmt: skip
    stated = statement(
        made.mechanisms, dict.fromkeys(made.mechanisms, ROUNDS), target_delta=1e-5,
        is_private_randomness=True,
    )  # fmt: skip
    test = {"dice": dice, "worst_site": {"dice": worst, "site": "south"}}
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"finished": done, "test": test}))
    (folder / "privacy.json").write_text(json.dumps(stated))
    return made.mechanisms


def test_a_point_is_of_the_worst_client_and_each_adversary(tmp_path):
    mechanisms = finished(tmp_path / "run", "distributed", max_units_per_patient=2)
    point = read(tmp_path / "run")

    def worst(name):
        rows = (row for m in mechanisms.values() for row in m.guarantees() if row.name == name)
        return max(row.epsilon(ROUNDS, 1e-5) for row in rows)

    assert point.epsilon == pytest.approx(worst("tile"))
    assert point.collusion == pytest.approx(worst("tile_against_shares"))
    assert point.patient == pytest.approx(worst("patient"))
    assert point.epsilon < point.collusion
    assert point.epsilon < point.patient
    assert (point.dice, point.worst, point.protected) == (0.8, 0.7, "tile")


def test_no_valid_number_is_no_number(tmp_path):
    finished(tmp_path / "capless", "dp_sgd")
    capless = read(tmp_path / "capless")
    assert capless.patient is None
    assert capless.collusion is None
    finished(tmp_path / "none", "none")
    assert math.isinf(read(tmp_path / "none").epsilon)
    text = table([capless, read(tmp_path / "none")])
    assert "none valid" in text
    assert "infinite" in text


def test_what_has_not_finished_is_left_out(tmp_path):
    finished(tmp_path / "stopped", "dp_sgd", done=False)
    assert read(tmp_path / "stopped") is None
    assert read(tmp_path / "absent") is None


def point(**changes):
    settings = {
        "name": "run", "placement": "dp_sgd", "protected": "tile", "epsilon": 1.0,
        "collusion": None, "patient": None, "dice": 0.8, "worst": 0.7,
    }  # fmt: skip
    return Point(**settings | changes)


def test_a_run_without_a_guarantee_is_a_level_of_its_own():
    assert label(point()) == "dp_sgd, tile"
    assert label(point(name="none-tile", epsilon=math.inf)) == "none-tile"


def test_the_table_goes_by_placement_and_epsilon():
    points = [point(name=f"at-{e:g}", epsilon=e) for e in (8.0, 1.0, 3.0)]
    lines = table(points).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["at-1", "at-3", "at-8"]


def test_the_picture_shows_something(tmp_path, read_picture):
    path = tmp_path / "tradeoff.png"
    plot_tradeoff([("a", 1.0, 0.7, 0.6), ("a", 8.0, 0.8, 0.7), ("none", math.inf, 0.9, 0.8)], path)
    pixels = read_picture(path)
    assert pixels.shape[0] > 300
    assert pixels.std() > 5


@pytest.fixture
def read_picture():
    """The pixels of a PNG."""
    import numpy as np
    from PIL import Image

    return lambda path: np.asarray(Image.open(path).convert("L"), np.float64)


def test_nothing_finished_is_told(tmp_path, monkeypatch, capsys):
    values = {"_WORKDIRS": str(tmp_path / "*"), "_OUTPUT": str(tmp_path / "out")}
    for name, value in values.items():
        monkeypatch.setattr(tradeoff, name, type("Flag", (), {"value": value}))
    assert tradeoff.main(["tradeoff"]) == 1
    assert "No finished run" in capsys.readouterr().err
    finished(tmp_path / "run", "dp_sgd")
    assert tradeoff.main(["tradeoff"]) == 0
    assert (tmp_path / "out.md").read_text() in capsys.readouterr().out + "\n"
    assert (tmp_path / "out.png").stat().st_size > 1000
