"""Slides, a store, training, a held-out slide segmented: the way of a hospital, by command."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tifffile
from PIL import Image

from fedjax_dp import training
from fedjax_dp.data.annotations.reading import open_labels
from fedjax_dp.data.annotations.shapes import AnnotationError
from fedjax_dp.inference.model import load_run, predictor
from tests import runs
from tests.experiments.test_prepare_tiles import CLASSES, hospital, prepare
from tests.runs import compiled, tiny  # noqa: F401
from tests.slide_files import write_generic
from tests.test_preparation import tissue_picture

pytestmark = pytest.mark.slow


def segment(folder, compiled, *more):  # noqa: F811
    words = [
        sys.executable, "-W", "error", "-m", "experiments.segment_slide",
        f"--checkpoint={folder / 'run'}", f"--slide={folder / 'held out.tif'}",
        f"--output={folder / 'out'}", "--block=512", *more,
    ]  # fmt: skip
    environment = runs.subprocess_environment(compiled)
    return subprocess.run(words, cwd=runs.ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("way")
    hospital(folder)
    assert prepare(folder, "--nooverview").returncode == 0
    config = tiny(**{"data.store": str(folder / "store"), "federation.rounds": 2})
    training.run(config, folder / "run", progress=False)
    write_generic(folder / "held out.tif", tissue_picture(700, 900, seed=9), levels=2)
    return folder


def test_the_whole_way(trained, compiled):  # noqa: F811
    done = segment(trained, compiled)
    assert done.returncode == 0, done.stderr
    out = trained / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {
        "labels.ome.tif", "colours.ome.tif", "objects.geojson", "open_in_qupath.groovy",
        "overlay.png", "areas.csv", "summary.json", "work",
    }  # fmt: skip
    with tifffile.TiffFile(out / "labels.ome.tif") as tiff:
        labels = tiff.series[0].levels[0].asarray()
    assert labels.shape == (700, 900)
    assert set(np.unique(labels)) <= {0, 1, 2, 255}
    assert (labels[:60] == 255).all()  # glass
    assert (labels[120:420, 150:480] != 255).all()
    from fedjax_dp.data.annotations.classes import ClassTable

    table = ClassTable.from_text(CLASSES)
    path = out / "objects.geojson"
    if json.loads(path.read_text())["features"]:
        read = open_labels(path, table=table, dimensions=(900, 700), unannotated="background")
        again = read.label_region(0, 0, 900, 700, 1, 1)
        assert (again == np.where(labels == 255, 0, labels)).all()
    with Image.open(out / "overlay.png") as picture:
        assert picture.width >= 600
    again = segment(trained, compiled)  # all blocks are done
    assert again.returncode == 0
    assert json.loads((out / "summary.json").read_text())["mpp"] == 0.5


def test_the_model_is_the_runs(trained):
    run = load_run(trained / "run")
    assert run.class_names == ("background", "nucleus", "stroma")
    assert run.mpp == 0.5
    predict = predictor(run, window=32, batch_size=4)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    found = predict(images)
    assert found.shape == (5, 32, 32, 3)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    assert (found.argmax(-1) == runs_prediction(trained, images)).all()
    with pytest.raises(ValueError, match="multiple of 2"):
        predictor(run, window=33, batch_size=4)


def runs_prediction(trained, images):
    from fedjax_dp.data.stored_federation import federation_from_store
    from fedjax_dp.results import predict

    run = load_run(trained / "run")
    federation = federation_from_store(trained / "store", tile_size=32)
    return predict(run.config, federation, trained / "run", images)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--checkpoint=nowhere", "workdir of a finished run"),
        ("--slide=nowhere.svs", "Cannot open"),
        ("--tissue=nowhere.geojson", "Cannot read"),
        ("--overlap=0.3", "overlap: 0.25 there, 0.3 now"),
        ("--window=33", "--window"),
    ],
)
def test_mistakes_are_one_line(trained, compiled, flag, message):  # noqa: F811
    if "there" in message and not (trained / "out" / "work").exists():
        assert segment(trained, compiled).returncode == 0
    done = segment(trained, compiled, flag)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(ValueError, match="finished run"):
        load_run(tmp_path)
    assert issubclass(AnnotationError, ValueError)
