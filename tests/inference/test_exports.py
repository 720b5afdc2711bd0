"""What leaves a segmented slide: read again by other readers, it is the label map."""

import csv
import json
import re

import numpy as np
import pytest
import shapely
import tifffile
from PIL import Image

from fedjax_dp.data.annotations.classes import ClassTable
from fedjax_dp.data.annotations.reading import open_labels
from fedjax_dp.data.slides import Bounds, open_slide
from fedjax_dp.inference import label_pyramid, qupath
from fedjax_dp.inference.areas import area_table
from fedjax_dp.inference.exports import Exports, export
from fedjax_dp.inference.overview import default_colours
from fedjax_dp.inference.sliding_window import Field
from tests.inference.test_polygons import Array, blobs
from tests.slide_files import write_generic
from tests.test_preparation import tissue_picture

NAMES = ("background", "tumour", "stroma")
TABLE = ClassTable.from_text("; ".join(NAMES))
SIZE = (640, 512)


@pytest.fixture
def slide(tmp_path):
    with open_slide(write_generic(tmp_path / "a.tif", tissue_picture(), levels=2)) as opened:
        yield opened


@pytest.fixture
def labels():
    """Of one micrometre: half the slide's size. An asymmetric marker is off the centre."""
    made = blobs(3, 256, 320, smooth=5)
    made[200:210, 20:24] = 1
    made[210:214, 20:40] = 1
    made[195:200, 10:60] = made[214:220, 10:60] = 0
    made[195:220, 10:20] = made[195:210, 24:60] = 0
    made[:, :5] = 255
    return made


FIELDS = [Field(10.0 * i, 5.0, 512, 512, 0.1 * i) for i in range(14)]


def exported(folder, slide, labels, **settings):
    plain = {"class_names": NAMES, "mpp": 1.0, "kind": "annotation"}
    return export(folder, slide, Array(labels), FIELDS, Exports(**{**plain, **settings}))


def test_geojson_read_again_is_the_label_map(slide, labels, tmp_path):
    """Through the reader of annotations: level-0 pixels, corners, holes and classes."""
    summary = exported(tmp_path / "out", slide, labels)
    path = tmp_path / "out" / "objects.geojson"
    read = open_labels(path, table=TABLE, dimensions=SIZE, unannotated="background")
    again = read.label_region(0, 0, 320, 256, 2.0, 2.0)
    assert (again == np.where(labels == 255, 0, labels)).all()
    assert read.findings.sentences() == ()
    marker = read.label_region(0, 0, 640, 512, 1.0, 1.0)[380:440, 20:120]
    expected = np.where(labels == 255, 0, labels)[190:220, 10:60]
    assert (marker == np.repeat(np.repeat(expected, 2, 0), 2, 1)).all()
    value = json.loads(path.read_text())
    assert value["type"] == "FeatureCollection"
    assert len(value["features"]) == summary["objects"]
    feature = value["features"][0]
    assert set(feature) == {"type", "id", "geometry", "properties"}
    assert feature["properties"]["objectType"] == "annotation"
    assert feature["properties"]["classification"]["name"] in NAMES
    assert len(feature["properties"]["classification"]["color"]) == 3
    polygon = shapely.geometry.shape(feature["geometry"])
    area = feature["properties"]["measurements"]["Area um^2"]
    assert area == pytest.approx(polygon.area * 0.25)
    identities = [f["id"] for f in value["features"]]
    assert len(set(identities)) == len(identities)


def test_exports_are_reproducible_and_follow_the_bounds(slide, labels, tmp_path):
    for name in ("a", "b"):
        exported(tmp_path / name, slide, labels)
    first = (tmp_path / "a" / "objects.geojson").read_bytes()
    assert first == (tmp_path / "b" / "objects.geojson").read_bytes()
    slide.bounds = Bounds(30, 20, 600, 480)
    exported(tmp_path / "c", slide, labels, from_bounds=True)
    read = open_labels(
        tmp_path / "c" / "objects.geojson",
        table=TABLE,
        dimensions=SIZE,
        unannotated="background",
        offset=(30, 20),
    )
    assert (read.label_region(0, 0, 320, 256, 2.0, 2.0) == np.where(labels == 255, 0, labels)).all()


def test_small_objects_and_detections(slide, labels, tmp_path):
    whole = exported(tmp_path / "a", slide, labels)["objects"]
    fewer = exported(tmp_path / "b", slide, labels, min_area_um2=50.0, kind="detection")["objects"]
    assert 0 < fewer < whole
    value = json.loads((tmp_path / "b" / "objects.geojson").read_text())
    areas = [f["properties"]["measurements"]["Area um^2"] for f in value["features"]]
    assert min(areas) >= 50
    assert {f["properties"]["objectType"] for f in value["features"]} == {"detection"}
    with pytest.raises(ValueError, match="min_area"):
        exported(tmp_path / "c", slide, labels, min_area_um2=-1.0)
    with pytest.raises(ValueError, match="kind"):
        exported(tmp_path / "c", slide, labels, kind="cell")


def test_the_label_pyramid(slide, tmp_path):
    labels = blobs(4, 1300, 1111, smooth=20)
    exported(tmp_path, slide, labels)
    with tifffile.TiffFile(tmp_path / "labels.ome.tif") as tiff:
        assert tiff.is_ome
        assert tiff.is_bigtiff
        levels = tiff.series[0].levels
        assert [level.shape for level in levels] == [(1300, 1111), (650, 556), (325, 278)]
        page = tiff.pages.first
        assert (page.tilewidth, page.tilelength) == (512, 512)
        assert len(page.subifds) == 2
        assert page.compression.name == "ADOBE_DEFLATE"
        for number, level in enumerate(levels):
            step = 2**number
            assert (level.asarray() == labels[::step, ::step]).all()
        assert 'PhysicalSizeX="1.0"' in tiff.ome_metadata
        assert "µm" in tiff.ome_metadata
    with open_slide(tmp_path / "colours.ome.tif") as coloured:
        assert coloured.mpp == (1.0, 1.0)
        assert len(coloured.levels) == 3
        found = coloured.read_region(0, 0, 1111, 1300)
    colours = default_colours(3)
    for label in range(3):
        assert (found[labels == label] == colours[label]).all()
    assert (found[labels == 255] == 245).all()


def test_areas(slide, labels, tmp_path):
    summary = exported(tmp_path, slide, labels)
    table = area_table(Array(labels), NAMES, (1.0, 2.0))
    assert table[1].mm2 == pytest.approx((labels == 1).sum() * 2e-6)
    assert sum(area.pixels for area in table[:3]) == table[3].pixels
    assert table[3].pixels + table[4].pixels == labels.size
    assert sum(area.fraction for area in table[:3]) == pytest.approx(1.0)
    with (tmp_path / "areas.csv").open(newline="") as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert float(rows["stroma"]["mm2"]) == pytest.approx(summary["mm2"]["stroma"], abs=1e-6)
    assert list(rows) == [*NAMES, "analysed", "not analysed"]


def test_the_overlay_shows_the_labels(slide, labels, tmp_path):
    exported(tmp_path, slide, labels)
    with Image.open(tmp_path / "overlay.png") as image:
        picture = np.asarray(image)
    assert picture.shape[1] >= 600
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100


def test_the_script_for_qupath(slide, labels, tmp_path):
    exported(tmp_path, slide, labels)
    text = (tmp_path / "open_in_qupath.groovy").read_text()
    assert "'objects.geojson'" in text
    assert "PathIO.readObjects" in text
    assert f"getWidth() != {SIZE[0]}" in text
    rows = re.findall(r"^    \[(.+)\]", text, re.MULTILINE)
    assert len(rows) == 10
    assert [float(row.split(", ")[-1]) for row in rows] == [
        round(0.1 * i, 4) for i in range(13, 3, -1)
    ]
    assert "@" not in text
    for opening, closing in ("()", "[]", "{}"):
        assert text.count(opening) == text.count(closing)


def test_names_of_files_cannot_leave_their_quotes(tmp_path):
    name = "a'); new File('x').delete(); ('\n\\"
    qupath.write_groovy(tmp_path / "s.groovy", name, FIELDS, dimensions=SIZE)
    line = next(
        l for l in (tmp_path / "s.groovy").read_text().splitlines() if l.startswith("def name")
    )
    inside = line.removeprefix("def name = '").removesuffix("'")
    assert re.fullmatch(r"(?:[^'\\]|\\.)*", inside)
    assert "\\u000a" in line


def test_a_full_disk_leaves_nothing_half_written(slide, labels, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    for module in (label_pyramid, qupath):
        monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        label_pyramid.write_labels(tmp_path / "labels.ome.tif", Array(labels), mpp=(1.0, 1.0))
    with pytest.raises(OSError, match="No space"):
        qupath.write_geojson(
            tmp_path / "o.geojson", [], class_names=NAMES, colours=default_colours(3),
            scale=(1, 1), mpp=(1, 1),
        )  # fmt: skip
    assert [p.name for p in tmp_path.iterdir() if p.name != "a.tif"] == []


class Generated:
    """A label map of 20,000 x 20,000 pixels that is never held."""

    height = width = 20_000
    largest = 0

    def read(self, y, x, height, width):
        self.largest = max(self.largest, height * width)
        rows, columns = np.arange(y, y + height) // 700 % 2, np.arange(x, x + width) // 900 % 2
        return (rows[:, None] & columns[None]).astype(np.uint8)


@pytest.mark.slow
def test_large_maps_are_read_in_parts(tmp_path):
    big = Generated()
    label_pyramid.write_labels(tmp_path / "l.tif", big, mpp=(0.5, 0.5))
    assert big.largest <= 2048**2
    with tifffile.TiffFile(tmp_path / "l.tif") as tiff:
        assert len(tiff.series[0].levels) == 7
        assert (
            tiff.series[0].levels[6].asarray() == big.read(0, 0, 20_000, 20_000)[::64, ::64]
        ).all()
