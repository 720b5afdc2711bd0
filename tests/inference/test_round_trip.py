"""Annotation -> tiles -> a model that sees the truth -> outlines: the annotation again."""

import json

import numpy as np
import pytest
import shapely

from fedjax_dp.data.annotations.classes import ClassTable
from fedjax_dp.data.annotations.rasterise import Grid, rasterise
from fedjax_dp.data.annotations.reading import open_labels
from fedjax_dp.data.pyramids.base import Bounds
from fedjax_dp.data.pyramids.tiff import TiffPyramid
from fedjax_dp.data.slide_list import read_slide_list
from fedjax_dp.data.slides import open_slide
from fedjax_dp.data.store.layout import Recipe
from fedjax_dp.data.store.reading import stored_pixels, tile_rows
from fedjax_dp.data.tissue import everywhere
from fedjax_dp.inference.exports import Exports, export
from fedjax_dp.inference.sliding_window import WindowPlan, segment
from fedjax_dp.preparation import prepare_store
from tests.slide_files import write_generic

WIDTH, HEIGHT = 1400, 1100
COLOURS = np.array([(235, 205, 220), (170, 60, 120), (70, 60, 150)], np.int16)
CLASSES = "background; tumour; stroma"
NAMES = ("background", "tumour", "stroma")
MARKER = [(900, 120), (1180, 120), (1180, 160), (940, 160), (940, 420), (900, 420)]  # an L


def shapes():
    """Polygons at no whole pixels, one with a hole, and the marker far from the middle."""
    rng = np.random.default_rng(0)
    found = [(shapely.Polygon(MARKER), 1)]
    for number, centre in enumerate([(250, 250), (520, 800), (1100, 800), (300, 850)]):
        angle = np.sort(rng.uniform(0, 2 * np.pi, 14))
        radius = rng.uniform(90, 160, 14)
        outer = np.stack([np.cos(angle), np.sin(angle)], -1) * radius[:, None] + centre
        polygon = shapely.Polygon(outer).buffer(6).difference(shapely.Point(centre).buffer(40))
        found.append((polygon, 1 + number % 2))
    return found


def truth(scale=1.0):
    grid = Grid(0, 0, int(WIDTH / scale), int(HEIGHT / scale), (scale, scale))
    return rasterise(shapes(), grid)[0]


def oracle(images):
    distance = np.abs(images[..., None, :].astype(np.int16) - COLOURS).sum(-1)
    return np.eye(3, dtype=np.float32)[distance.argmin(-1)]


def write(folder, corner):
    """The slide, and its annotation as a tool wrote it that counts from `corner`."""
    slides = folder / "slides"
    slides.mkdir()
    write_generic(slides / "a.tif", COLOURS[truth()].astype(np.uint8), levels=3)
    features = [
        {
            "type": "Feature",
            "geometry": shapely.geometry.mapping(
                shapely.transform(polygon, lambda p: p - np.asarray(corner))
            ),
            "properties": {"classification": {"name": NAMES[label]}},
        }
        for polygon, label in shapes()
    ]
    (slides / "a.geojson").write_text(json.dumps(features))
    (folder / "sites.csv").write_text("slide,site,patient,split\na,north,p,train\n")
    return slides


@pytest.mark.parametrize("corner", [(0, 0), (64, 48)], ids=["file", "bounds"])
@pytest.mark.parametrize("mpp", [0.5, 1.0])
def test_an_oracle_gives_the_annotation_again(corner, mpp, tmp_path, monkeypatch):
    bounds = Bounds(*corner, WIDTH - 100, HEIGHT - 100)
    if any(corner):
        monkeypatch.setattr(TiffPyramid, "bounds", property(lambda self: bounds))
    slides = write(tmp_path, corner)
    from_bounds = any(corner)
    recipe = Recipe(
        mpp=mpp,
        tile_size=32,
        class_names=NAMES,
        classes=CLASSES,
        unannotated="background",
        origin="bounds" if from_bounds else "file",
        tissue="none",
    )
    monkeypatch.setattr("fedjax_dp.preparation.each_in_a_process", here)
    (report,) = prepare_store(
        read_slide_list(tmp_path / "sites.csv", slides), tmp_path / "store", recipe
    )
    assert not report.error
    check_store(tmp_path / "store", report.record, mpp)
    with open_slide(slides / "a.tif") as slide:
        labels, fields = segment(
            slide, oracle, everywhere(slide), WindowPlan(mpp=mpp, window=64), tmp_path / "w",
            num_classes=3, identity={},
        )  # fmt: skip
        settings = Exports(NAMES, mpp, "annotation", from_bounds=from_bounds)
        export(tmp_path / "out", slide, labels, fields, settings)
        labels.close()
    read = open_labels(
        tmp_path / "out" / "objects.geojson",
        table=ClassTable.from_text(CLASSES),
        dimensions=(WIDTH, HEIGHT),
        unannotated="background",
        offset=corner,
    )
    found = read.label_region(0, 0, WIDTH, HEIGHT, 1, 1)
    expected = truth()
    for label in (1, 2):
        both = ((found == label) & (expected == label)).sum()
        either = ((found == label) | (expected == label)).sum()
        assert both / either >= 0.98, (label, both / either)
    marker = np.s_[100:440, 880:1200]
    assert (found[marker] == expected[marker]).mean() > 0.98
    # The check has power: a corner forgotten, or the wrong one, is seen.
    moved = np.roll(found, (48, 64), (0, 1))
    assert ((moved == 1) & (expected == 1)).sum() / ((moved == 1) | (expected == 1)).sum() < 0.8


def here(function, jobs, workers):
    """In this process, where the patched bounds are."""
    from fedjax_dp.data.slide_workers import Outcome

    return [Outcome(number, function(job), "") for number, job in enumerate(jobs)]


def check_store(folder, record, mpp):
    """Every tile's labels are those of its place, and its pixels show them."""
    images, labels = stored_pixels(folder, [record], 32)
    scale = mpp / 0.5
    for image, label, row in zip(images, labels, tile_rows(folder, record), strict=True):
        grid = Grid(float(row["x"]), float(row["y"]), 32, 32, (scale, scale))
        expected = rasterise(shapes(), grid)[0]
        seen = label != 255
        assert (label == expected)[seen].all()
        assert (oracle(image[None])[0].argmax(-1) == label)[seen].mean() > 0.8
    assert record.pixels[1] * scale**2 == pytest.approx((truth() == 1).sum(), rel=0.02)
