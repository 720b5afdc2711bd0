"""The demo: its claims hold for its configurations, and it writes what it promises."""

import itertools

import numpy as np
import pytest
from absl import flags
from PIL import Image

from experiments import demo
from experiments.launcher import EXIT_STOPPED
from fedjax_dp import training
from fedjax_dp.assembly.sites import make_sites
from fedjax_dp.data.federation import Federation
from fedjax_dp.data.tiles import TileTable
from fedjax_dp.interrupts import Stopped
from tests import runs
from tests.runs import compiled, no_pictures, read_json  # noqa: F401

SITES = ("alder", "birch", "cedar", "elm", "fir")


def shapes_only(patients, tiles):
    """A federation of the demo's numbers, without its pixels."""
    owners = np.arange(len(SITES) * patients, dtype=np.int32)
    count = len(owners) * tiles
    table = TileTable(
        images=np.zeros((count, 1, 1, 3), np.uint8),
        labels=np.zeros((count, 1, 1), np.uint8),
        site=np.repeat(np.arange(len(SITES), dtype=np.int32), patients * tiles),
        slide=np.repeat(owners, tiles),
        patient=np.repeat(owners, tiles),
        sites=SITES,
        slides=tuple(f"s{owner}" for owner in owners),
        patients=tuple(f"p{owner}" for owner in owners),
    )
    return Federation(
        name="n", class_names=("a", "b"), train=table, validation=table, test=table, external=table
    )


def test_the_three_runs_see_the_same_tiles_and_as_many_rounds():
    made = demo.configs()
    assert list(made) == ["fedavg", "feddp-tile", "feddp-patient"]
    for config in made.values():
        assert config.data == made["fedavg"].data
        assert config.model == made["fedavg"].model
        assert config.federation.rounds == made["fedavg"].federation.rounds
        assert config.data.tile_size % 2**config.model.depth == 0
        assert config.data.patients_per_site >= 200
        assert config.seed == -1  # the private runs are private
    placements = [config.privacy.placement for config in made.values()]
    assert placements == ["none", "dp_sgd", "dp_sgd"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["feddp-tile", "feddp-patient"])
def test_what_the_demo_claims_of_privacy(name, tmp_path):
    config = demo.configs()[name]
    federation = shapes_only(config.data.patients_per_site, config.data.tiles_per_patient)
    made = make_sites(config, federation, cache_dir=str(tmp_path))
    assert made.unit == name.removeprefix("feddp-")
    assert made.warnings == ()
    delta = config.privacy.target_delta
    for site in made.sites:
        assert site.mechanism.epsilon(config.federation.rounds, delta) <= 10.0
        assert delta < 1 / site.mechanism.num_units
        patient = site.mechanism.patient_guarantee
        assert patient.is_valid, patient.reason


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The demo on a federation of ten patients, two rounds a run."""
    made = demo.configs()
    for config in made.values():
        config.data.tile_size = 32
        config.model.depth = 1
        config.federation.rounds = 2
    for name in ("feddp-tile", "feddp-patient"):
        privacy = made[name].privacy
        privacy.max_tiles_per_patient = 0
        privacy.noise_multiplier = 4.0  # to calibrate takes longer than to train
        # As many slots for patients as for tiles: both runs then share one program.
        privacy.tiles_per_unit = 1
        privacy.expected_batch_size = 0.3 if privacy.unit == "tile" else 0.5
    monkeypatch.setattr(demo, "configs", lambda: made)
    loader = "fedjax_dp.assembly.federation.load_federation"
    monkeypatch.setattr(loader, lambda *_, **__: runs.federation())
    flags.FLAGS(["demo", f"--workdir={tmp_path / 'demo'}"])
    return tmp_path / "demo"


@pytest.mark.slow
def test_the_whole_demo(small, compiled, no_pictures, capsys, monkeypatch):  # noqa: F811
    assert demo.main(["demo"]) == 0
    printed = capsys.readouterr().out
    for name in ("fedavg", "feddp-tile", "feddp-patient"):
        summary = read_json(small / name / "summary.json")
        assert (summary["experiment"], summary["finished"]) == (name, True)
        assert name in printed
        if name != "fedavg":
            assert summary["privacy"]["epsilon"]["max"] <= 10
            assert summary["privacy"]["is_private"] is True
    text = (small / "comparison.md").read_text()
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    expected = ["fedavg", "feddp-tile", "feddp-patient"]
    assert rows[1:] == ["---", *expected, "predict all background", "predict all foreground"]
    (sentence,) = (line for line in text.splitlines() if line.startswith("Against"))
    assert sentence in printed
    # One tile of every site, five ways.
    with Image.open(small / "comparison.png") as picture:
        pixels = np.asarray(picture)
    assert min(pixels.shape[:2]) > 200
    assert pixels[..., :3].std() > 20

    # A second call trains nothing, and compares again.
    monkeypatch.setattr(training, "compile_programs", None)
    compared = []
    monkeypatch.setattr(demo, "compare", lambda *arguments: compared.append(arguments) or "")
    assert demo.main(["demo"]) == 0
    ((_, _, _, summaries),) = compared
    assert summaries == {name: read_json(small / name / "summary.json") for name in expected}


def test_a_stopped_demo_says_so_and_compares_nothing(small, monkeypatch, capsys):
    calls = itertools.count()

    def stop(*_, **__):
        if next(calls):
            raise Stopped("Stopped after round 1.")
        return {}

    monkeypatch.setattr(training, "run", stop)
    assert demo.main(["demo"]) == EXIT_STOPPED
    assert "Stopped after round 1." in capsys.readouterr().err
    assert not (small / "comparison.md").exists()
