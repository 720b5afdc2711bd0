"""Annotations of every tool, with their real semantics, and hostile ones."""

import gzip
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from fedjax_dp.data.annotations.classes import ClassTable, table_text
from fedjax_dp.data.annotations.reading import open_labels, read_polygons
from fedjax_dp.data.annotations.shapes import AnnotationError

TABLE = ClassTable.from_text("background; tumour = Tumor, Carcinoma; stroma; ignore = Artefact")
SIZE = (40, 30)
REAL = pathlib.Path(__file__).parents[4] / "shared" / "data" / "formats"


def box(x0, y0, x1, y1):
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def feature(coordinates, name="Tumor", kind="Polygon", **properties):
    if name is not None:
        properties["classification"] = {"name": name, "color": [200, 0, 0]}
    properties.setdefault("objectType", "annotation")
    geometry = {"type": kind, "coordinates": coordinates}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def labels(path, **settings):
    plain = {"table": TABLE, "dimensions": SIZE, "unannotated": "background"}
    return open_labels(path, **{**plain, **settings})


def whole(path, **settings):
    return labels(path, **settings).label_region(0, 0, *SIZE, 1, 1)


def write(folder, value, name="a.geojson"):
    path = folder / name
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def filled(label, x0, y0, x1, y1, background=0):
    expected = np.full(SIZE[::-1], background, np.uint8)
    expected[y0:y1, x0:x1] = label
    return expected


# --- QuPath

ONE = feature([box(5, 6, 15, 20)])


@pytest.mark.parametrize(
    "value",
    [
        {"type": "FeatureCollection", "features": [ONE]},
        [ONE],
        ONE,
        [feature([box(5, 6, 15, 20)], "carcinoma")],
        [feature([box(5, 6, 15, 20)], "Tumor: Positive")],
        [feature([[[*point, 3.0] for point in box(5, 6, 15, 20)]])],
        [feature([[box(5, 6, 10, 20)], [box(10, 6, 15, 20)]], kind="MultiPolygon")],
        [{**ONE, "properties": {"classification": "Tumor"}}],
        [{**ONE, "properties": {"classification": {"names": ["Tumor", "Positive"]}}}],
        [{**ONE, "properties": {"classification": {"name": "Tumor", "colorRGB": -377282}}}],
        [{**ONE, "properties": {**ONE["properties"], "objectType": "cell"}, "nucleusGeometry": {}}],
    ],
)
def test_every_form_of_geojson(value, tmp_path):
    assert (whole(write(tmp_path, value)) == filled(1, 5, 6, 15, 20)).all()


def test_packed_and_with_a_byte_order_mark(tmp_path):
    text = json.dumps([ONE]).encode()
    for data in (gzip.compress(text), b"\xef\xbb\xbf" + text):
        assert (whole(write(tmp_path, data)) == filled(1, 5, 6, 15, 20)).all()


def test_holes(tmp_path):
    path = write(tmp_path, [feature([box(5, 6, 15, 20), box(8, 9, 12, 15)])])
    expected = filled(1, 5, 6, 15, 20)
    expected[9:15, 8:12] = 0
    assert (whole(path) == expected).all()


def test_classes_that_only_begin_like_regions_are_classes(tmp_path):
    table = ClassTable.from_text("background; Regional metastasis; Ignored vessel")
    path = write(
        tmp_path,
        [
            feature([box(0, 0, 9, 9)], "Regional metastasis"),
            feature([box(9, 0, 18, 9)], "Ignored vessel"),
            feature([box(18, 0, 27, 9)], "ignore"),
        ],
    )
    found = whole(path, table=table)
    assert [found[4, x] for x in (4, 12, 20, 30)] == [1, 2, 255, 0]


def test_a_hole_outside_its_polygon_is_no_part_of_it(tmp_path):
    path = write(tmp_path, [feature([box(5, 6, 15, 20), box(20, 6, 30, 20)])])
    assert (whole(path) == filled(1, 5, 6, 15, 20)).all()
    path = write(tmp_path, [feature([box(5, 6, 15, 20), box(10, 6, 25, 20)])])
    assert (whole(path) == filled(1, 5, 6, 10, 20)).all()


def test_ignore_and_regions_of_interest(tmp_path):
    path = write(
        tmp_path,
        [
            feature([box(2, 2, 30, 25)], "Region*"),
            feature([box(5, 6, 15, 20)], "Stroma"),
            feature([box(10, 6, 20, 20)], "Ignore*"),
            feature([box(0, 0, 4, 4)], "Tumor"),
        ],
    )
    expected = filled(0, 2, 2, 30, 25, background=255)
    expected[2:25, 2:30] = 0
    expected[6:20, 5:10] = 2
    expected[6:20, 10:20] = 255
    expected[2:4, 2:4] = 1
    found = labels(path, unannotated=None)
    assert (found.label_region(0, 0, *SIZE, 1, 1) == expected).all()
    assert found.findings["pixels claimed by two classes"] == 0  # to be ignored is no class


def test_overlaps_follow_the_table_and_not_the_file(tmp_path):
    shapes = [feature([box(5, 5, 15, 15)], "Stroma"), feature([box(10, 5, 20, 15)], "Tumor")]
    for order in (shapes, shapes[::-1]):
        found = labels(write(tmp_path, order))
        expected = filled(1, 10, 5, 20, 15)
        expected[5:15, 5:15] = 2
        assert (found.label_region(0, 0, *SIZE, 1, 1) == expected).all()
        assert found.findings["pixels claimed by two classes"] == 50


def test_nothing_said_about_the_rest_is_an_error(tmp_path):
    path = write(tmp_path, [ONE])
    with pytest.raises(AnnotationError, match="--unannotated=background"):
        labels(path, unannotated=None)
    with pytest.raises(AnnotationError, match="--unannotated"):
        labels(None, unannotated=None)
    assert (whole(path, unannotated="ignore") == filled(1, 5, 6, 15, 20, background=255)).all()
    assert (whole(None) == 0).all()


def test_unknown_classes_are_listed_or_ignored(tmp_path):
    path = write(
        tmp_path, [feature([box(5, 6, 15, 20)], "Nerve"), feature([box(0, 0, 2, 2)], None)]
    )
    with pytest.raises(AnnotationError, match=r"'\(no class\)' \(1\), 'Nerve' \(1\).*--unknown"):
        labels(path)
    found = labels(path, unknown="ignore")
    assert (found.label_region(0, 0, *SIZE, 1, 1)[6:20, 5:15] == 255).all()
    assert "1 shapes of the unknown class 'Nerve', ignored" in found.findings.sentences()


def test_points_and_lines_are_skipped_and_counted(tmp_path):
    shapes = [ONE, feature([3, 4], kind="Point"), feature([[1, 1], [5, 5]], kind="LineString")]
    found = labels(write(tmp_path, shapes))
    assert found.findings["points and lines, skipped"] == 2


def test_a_bow_tie_is_repaired_and_counted(tmp_path):
    path = write(tmp_path, [feature([[[5, 5], [15, 15], [15, 5], [5, 15], [5, 5]]])])
    found = labels(path)
    assert found.findings["polygons that cross themselves, repaired"] == 1
    area = (found.label_region(0, 0, *SIZE, 1, 1) == 1).sum()
    assert 40 <= area <= 60


def test_origin_of_the_slides_bounds(tmp_path):
    path = write(tmp_path, [feature([box(0, 0, 10, 10)])])
    assert (whole(path, offset=(7, 3)) == filled(1, 7, 3, 17, 13)).all()


def test_shapes_outside_hint_at_the_origin(tmp_path):
    far = [feature([box(500 + i, 500, 510 + i, 510)]) for i in range(3)]
    with pytest.raises(AnnotationError, match=r"3 of 4 shapes .* --origin=bounds"):
        labels(write(tmp_path, [*far, ONE]))
    with pytest.raises(AnnotationError, match="--origin=file"):
        labels(write(tmp_path, [*far, ONE]), offset=(5, 5))
    found = labels(write(tmp_path, [far[0], ONE, feature([box(35, 20, 60, 60)])]))
    assert found.findings["shapes outside the slide, skipped"] == 1
    assert found.findings["shapes that reach beyond the slide"] == 1


def test_any_scale_and_place(tmp_path):
    path = write(tmp_path, [feature([box(8, 4, 20, 16)])])
    found = labels(path)
    assert (found.label_region(0, 0, 20, 15, 2, 2) == filled(1, 4, 2, 10, 8)[:15, :20]).all()
    assert (found.label_region(8, 4, 24, 24, 0.5, 0.5) == 1).all()
    assert (found.label_region(-100, -100, 5, 5, 1, 1) == 0).all()


# --- ImageScope


def aperio(*layers):
    return "<Annotations MicronsPerPixel='0.25'>" + "".join(layers) + "</Annotations>"


def layer(name, *regions):
    inner = f"<Regions>{''.join(regions)}</Regions>"
    return f'<Annotation Id="1" Name="{name}" LineColor="65280">{inner}</Annotation>'


def region(points, kind=0, negative=0):
    vertices = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in points)
    return (
        f'<Region Type="{kind}" NegativeROA="{negative}"><Vertices>{vertices}</Vertices></Region>'
    )


def test_aperio_regions_and_holes(tmp_path):
    text = aperio(
        layer("Tumor", region(box(5, 6, 15, 20)[:4]), region(box(8, 9, 12, 15)[:4], negative=1)),
        layer("Stroma", region([(20, 5), (30, 15)], kind=1)),
    )
    expected = filled(1, 5, 6, 15, 20)
    expected[9:15, 8:12] = 0
    expected[5:15, 20:30] = 2
    assert (whole(write(tmp_path, text, "a.xml")) == expected).all()


def test_aperio_ellipses_rulers_and_lonely_holes(tmp_path):
    text = aperio(
        layer(
            "Tumor",
            region([(5, 5), (25, 25)], kind=2),
            region([(0, 0), (30, 20)], kind=4),
            region([(0, 0), (3, 2)], kind=3),
            region(box(35, 1, 38, 4)[:4], negative=1),
            region([(1, 1), (2, 2)]),
        )
    )
    found = labels(write(tmp_path, text, "a.xml"))
    area = (found.label_region(0, 0, *SIZE, 1, 1) == 1).sum()
    assert area == pytest.approx(np.pi * 100, rel=0.03)
    assert found.findings["rulers, skipped"] == 1
    assert found.findings["arrows, skipped"] == 1
    assert found.findings["holes outside every region of their layer, skipped"] == 1
    assert found.findings["shapes without area, skipped"] == 1


def test_aperio_classes_by_attribute_and_by_colour(tmp_path):
    named = '<Annotation LineColor="255"><Attributes><Attribute Name="Tumor" Id="0"/></Attributes>'
    regions = f"<Regions>{region(box(5, 6, 15, 20)[:4])}</Regions></Annotation>"
    assert (
        whole(write(tmp_path, aperio(named + regions), "a.xml")) == filled(1, 5, 6, 15, 20)
    ).all()
    described = named.replace('Name="Tumor"', 'Name="Description" Value="Tumor"')
    assert (whole(write(tmp_path, aperio(described + regions), "c.xml")) == 1).sum() == 140
    text = aperio(f'<Annotation LineColor="255">{regions}')
    with pytest.raises(AnnotationError, match="#ff0000"):
        labels(write(tmp_path, text, "b.xml"))
    by_colour = ClassTable.from_text("background; tumour = #FF0000")
    assert (whole(tmp_path / "b.xml", table=by_colour) == filled(1, 5, 6, 15, 20)).all()


def test_the_real_aperio_file():
    path = REAL / "11_monusac_svs" / "A9K0_1.xml"
    if not path.exists():
        pytest.skip("real annotations are absent")
    table = ClassTable.from_text(
        "background; nucleus = Epithelial, Lymphocyte, Macrophage, Neutrophil"
    )
    found = open_labels(path, table=table, dimensions=(1307, 1153), unannotated="background")
    painted = found.label_region(0, 0, 1307, 1153, 1, 1)
    assert 0.05 < (painted == 1).mean() < 0.6


# --- ASAP


def asap(*annotations):
    return f"<ASAP_Annotations><Annotations>{''.join(annotations)}</Annotations></ASAP_Annotations>"


def outline(points, group="Tumor", kind="Polygon", order=None):
    order = order or range(len(points))
    coordinates = "".join(
        f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>'
        for i, (x, y) in zip(order, points, strict=True)
    )
    return (
        f'<Annotation Name="A" Type="{kind}" PartOfGroup="{group}">'
        f"<Coordinates>{coordinates}</Coordinates></Annotation>"
    )


def test_asap_takes_points_by_their_order(tmp_path):
    corners = box(5, 6, 15, 20)[:4]
    shuffled = [corners[i] for i in (2, 0, 3, 1)]
    path = write(tmp_path, asap(outline(shuffled, order=(2, 0, 3, 1))), "a.xml")
    assert (whole(path) == filled(1, 5, 6, 15, 20)).all()


def test_asap_splines_and_points(tmp_path):
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    circle = [(20 + 10 * np.cos(a), 15 + 10 * np.sin(a)) for a in angles]
    text = asap(outline(circle, kind="Spline"), outline([(3, 3)], kind="Dot"))
    found = labels(write(tmp_path, text, "a.xml"))
    area = (found.label_region(0, 0, *SIZE, 1, 1) == 1).sum()
    assert area == pytest.approx(np.pi * 100, rel=0.03)
    assert found.findings["splines, drawn as Catmull-Rom curves"] == 1
    assert found.findings["points and lines, skipped"] == 1


# --- masks


def test_mask_images_by_nearest(tmp_path):
    mask = np.zeros((15, 20), np.uint8)
    mask[3:9, 4:10], mask[10:, 10:] = 1, 255
    Image.fromarray(mask).save(tmp_path / "a.png")
    expected = np.repeat(np.repeat(mask, 2, 0), 2, 1)
    assert (whole(tmp_path / "a.png") == expected).all()
    beyond = labels(tmp_path / "a.png").label_region(-4, -4, 10, 10, 1, 1)
    assert (beyond[:4] == 255).all()
    assert (beyond[4:, 4:] == expected[:6, :6]).all()


def test_masks_that_do_not_fit(tmp_path):
    Image.fromarray(np.zeros((15, 30), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(AnnotationError, match="in proportion"):
        labels(tmp_path / "a.png")
    Image.fromarray(np.full((15, 20), 7, np.uint8)).save(tmp_path / "b.png")
    with pytest.raises(AnnotationError, match=r"7 \(300 pixels\)"):
        labels(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    with pytest.raises(AnnotationError, match=r"c\.png"):
        labels(tmp_path / "c.png")


# --- hostile files

BOMB = (
    '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">'
    + "".join(
        f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + "]><Annotations><Annotation>&i;</Annotation></Annotations>"
)
OUTSIDE = (
    '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
    "<Annotations><Annotation>&a;</Annotation></Annotations>"
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"   \n", "is empty"),
        (b"\x00\x01\x02", "neither GeoJSON nor XML"),
        (b"{", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"type": "Polygon", "coordinates": []}', "no GeoJSON of features"),
        (b"[1, 2, 3]", "no GeoJSON of features"),
        (b"[\xff\xff]", "no UTF-8"),
        (b"<Annotations>", "no well-formed XML"),
        (b"<html></html>", "neither ASAP nor ImageScope"),
        (BOMB.encode(), "can harm"),
        (OUTSIDE.encode(), "can harm"),
        (b"\x1f\x8bnonsense", "Cannot read"),
        (gzip.compress(b"[" * 999)[:14] + b"\xff" * 9, "Cannot read"),
    ],
)
def test_no_annotations_at_all(content, message, tmp_path):
    path = write(tmp_path, content, "ein übler name.xml")
    with pytest.raises(AnnotationError, match=message) as caught:
        labels(path)
    assert "ein übler name.xml" in str(caught.value)
    with pytest.raises(AnnotationError):
        read_polygons(path)


@pytest.mark.parametrize(
    "coordinates",
    [
        [[[0, 0], [float("nan"), 5], [5, 5]]],
        [[[0, 0], [1e300, 5], [5, 5]]],
        [[["a", 0], [5, 5], [0, 5]]],
        [[[0], [5, 5], [0, 5]]],
        [[[0, 0], [5, 5]]],
        [[]],
        [],
        None,
        7,
        [[[0, 0], [5, 0], [9, 0]]],
        [[{"x": 1}, {"x": 2}, {"x": 3}]],
    ],
)
def test_shapes_that_are_none_are_skipped_and_counted(coordinates, tmp_path):
    found = labels(write(tmp_path, [ONE, feature(coordinates)]))
    assert (found.label_region(0, 0, *SIZE, 1, 1) == filled(1, 5, 6, 15, 20)).all()
    assert "skipped" in found.findings.sentences()[-1]


def test_too_large_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fedjax_dp.data.annotations.reading.MAX_BYTES", 1000)
    path = write(tmp_path, gzip.compress(b"[" + b" " * 5000 + b"]"))
    assert path.stat().st_size < 1000
    with pytest.raises(AnnotationError, match="at most 1,000 bytes"):
        labels(path)


def test_a_million_vertices(tmp_path):
    angle = np.linspace(0, 2 * np.pi, 1_000_000, endpoint=False)
    points = np.stack([np.cos(angle), np.sin(angle)], -1) * 10 + (20, 15)
    path = write(tmp_path, [feature([[*points.tolist(), points[0].tolist()]])])
    area = (whole(path) == 1).sum()
    assert area == pytest.approx(np.pi * 100, rel=0.03)


def test_missing_files(tmp_path):
    with pytest.raises(AnnotationError, match="Cannot read"):
        labels(tmp_path / "no.xml")


def test_outlines_of_tissue(tmp_path):
    path = write(tmp_path, [feature([box(0, 0, 5, 5)], None), feature([box(5, 0, 9, 5)], "x")])
    outlines = read_polygons(path, (1.0, 2.0))
    assert outlines.area == 45
    assert outlines.bounds == (1, 2, 10, 7)
    with pytest.raises(AnnotationError, match="got none"):
        read_polygons(write(tmp_path, []))


# --- the table of classes


def test_tables_of_classes(tmp_path):
    assert TABLE.names == ("background", "tumour", "stroma")
    assert TABLE.label("TUMOR") == 1
    assert TABLE.label("artefact") == 255
    assert TABLE.label("Stroma: low: x") == 2
    assert TABLE.label("nothing") is None
    path = tmp_path / "classes.txt"
    path.write_text("background\ntumour = Tumor, Carcinoma\nstroma\nignore = Artefact\n")
    assert ClassTable.from_text(table_text(str(path))) == TABLE
    for text in ("", "background", "a; b; b", "a; b = x; c = X"):
        with pytest.raises(AnnotationError, match="Expected"):
            ClassTable.from_text(text)
