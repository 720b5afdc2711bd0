"""A hospital's folder of slides to a store by command, and a run on that store."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from fedjax_dp import training
from fedjax_dp.data.stored_federation import federation_from_store
from tests import runs
from tests.runs import compiled, no_pictures, read_json, tiny  # noqa: F401
from tests.slide_files import write_generic, write_svs
from tests.test_preparation import box, tissue_picture

CLASSES = "background; nucleus = Tumor; stroma"


def hospital(folder, count=6):
    """Slides of two sites, drawn on, and the table that names them."""
    slides = folder / "my slides"
    slides.mkdir()
    rows = ["slide,site,patient,split"]
    splits = ["train", "train", "test", "validation", "train", "train"]
    for number in range(count):
        path = slides / f"slide {number}.svs"
        (write_svs if number % 2 else write_generic)(path, tissue_picture(seed=number), levels=2)
        x = 160 + 10 * number
        shapes = [box("Tumor", x, 128, x + 90, 200), box("Stroma", 130, 250, 300, 400)]
        path.with_suffix(".geojson").write_text(json.dumps(shapes))
        rows.append(
            f"{path.name},{('north', 'south')[number % 2]},patient {number},{splits[number]}"
        )
    (folder / "sites.csv").write_text("\n".join(rows) + "\n")
    return slides


def prepare(folder, *more):
    words = [
        sys.executable, "-W", "error", "-m", "experiments.prepare_tiles",
        f"--slides={folder / 'my slides'}", f"--sites={folder / 'sites.csv'}",
        f"--classes={CLASSES}", f"--output={folder / 'store'}", "--tile_size=32",
        "--unannotated=background", *more,
    ]  # fmt: skip
    return subprocess.run(words, cwd=runs.ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hospital")
    hospital(folder)
    done = prepare(folder)
    assert done.returncode == 0, done.stderr
    assert "tiles of 6 slides" in done.stdout
    assert "6/6" in done.stderr  # the progress bar
    return folder / "store"


def test_a_second_call_finds_all_done(store):
    done = prepare(store.parent, "--nooverview")
    assert done.returncode == 0
    assert done.stdout.count("(done before)") + done.stderr.count("(done before)") == 6


def test_a_broken_slide_ends_non_zero_and_is_listed(tmp_path):
    slides = hospital(tmp_path, 2)
    path = slides / "slide 1.svs"
    path.write_bytes(path.read_bytes()[:9000])
    done = prepare(tmp_path, "--nooverview")
    assert done.returncode == 1
    assert "No tile of 1 slides:" in done.stderr
    assert "slide 1.svs: " in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list((tmp_path / "store" / "slides").iterdir())) == 1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--classes=background", "Expected 2 to"),
        ("--mpp=0", "mpp"),
        ("--sites=nowhere.csv", "Cannot open"),
        ("--slides=nowhere", "Expected a folder"),
        ("--min_tissue=2", "min_tissue"),
    ],
)
def test_mistakes_are_one_line(flag, message, tmp_path):
    hospital(tmp_path, 1)
    done = prepare(tmp_path, flag)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def config(store, **changes):
    return tiny(**{"data.store": str(store), "federation.rounds": 3, **changes})


@pytest.mark.slow
@pytest.mark.usefixtures("compiled", "no_pictures")
def test_training_reads_the_store_and_the_pool_changes_nothing(store, tmp_path):
    states = []
    for pool in ("resident", "packed"):
        folder = tmp_path / pool
        summary = training.run(config(store, **{"execution.pool": pool}), folder, progress=False)
        assert summary["rounds"] == 3
        assert (folder / "privacy.json").exists()
        states.append(runs.saved(folder)[0])
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert read_json(folder / "config.json")["identity"]["data.store"] == str(store)


def test_what_contradicts_the_store_is_refused(store, tmp_path):
    for name, value in (
        ("data.stride", 16),
        ("data.manifest", "a.csv"),
        ("data.class_names", "a,b"),
    ):
        with pytest.raises(ValueError, match=name):
            training.run(config(store, **{name: value}), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="tile_size=32"):
        training.run(config(store, **{"data.tile_size": 64}), tmp_path / "run", progress=False)


def test_tiles_lie_on_disk_until_they_are_asked_for(store):
    table = federation_from_store(store, tile_size=32).train
    assert not isinstance(table.images, np.ndarray)
    assert table.images.shape == (len(table), 32, 32, 3)
    assert isinstance(table.images[:3], np.ndarray)
