"""From slides to a store: what is kept, in which order, and that nothing leaves by accident."""

import csv
import json
import os
import stat

import numpy as np
import pytest
import tifffile

from fedjax_dp import preparation
from fedjax_dp.data.federation import check_unit
from fedjax_dp.data.slide_list import read_slide_list
from fedjax_dp.data.slides import Slide, SlideError
from fedjax_dp.data.store import layout
from fedjax_dp.data.store.layout import Recipe, StoreError
from fedjax_dp.data.store.reading import stored_pixels
from fedjax_dp.data.stored_federation import federation_from_store
from fedjax_dp.preparation import prepare_store
from tests.slide_files import write_generic, write_ome, write_svs

SIDE = 32
CLASSES = "background; tumour = Tumor; stroma"
PEOPLE = ("Erika Mustermann", "1961-07-24", "S19-004711")


def tissue_picture(height=512, width=640, seed=0):
    """Glass, with eosin from (128, 96) to (448, 512), x and y in pixels of half a micrometre."""
    rng = np.random.default_rng(seed)
    image = np.array((243, 241, 244)) + rng.normal(0, 2, (height, width, 3))
    image[96:448, 128:512] = np.array((220, 150, 185)) + rng.normal(0, 6, (352, 384, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def box(name, x0, y0, x1, y1):
    ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"objectType": "annotation", "classification": {"name": name}},
    }


@pytest.fixture
def folder(tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    for number, write in enumerate((write_generic, write_svs, write_ome)):
        path = slides / f"{PEOPLE[2]}-{number}.tif"
        write(path, tissue_picture(seed=number), levels=2)
        shapes = [box("Tumor", 160, 128, 224, 192), box("Stroma", 10, 10, 20, 20)]
        path.with_suffix(".geojson").write_text(json.dumps(shapes))
    sites = ("north", "north", "south")
    splits = ("train", "test", "train")
    rows = [f"{PEOPLE[2]}-{n},{sites[n]},{PEOPLE[0]} {n},{splits[n]}" for n in range(3)]
    table(tmp_path, rows)
    return tmp_path


def table(folder, rows):
    text = "\n".join(["slide,site,patient,split", *rows]) + "\n"
    (folder / "sites.csv").write_text(text)


def recipe(**settings):
    plain = {
        "mpp": 0.5,
        "tile_size": SIDE,
        "class_names": ("background", "tumour", "stroma"),
        "classes": CLASSES,
        "unannotated": "background",
    }
    return Recipe(**{**plain, **settings})


def prepare(folder, name="store", with_overview=False, workers=1, prune=False, **settings):
    rows = read_slide_list(folder / "sites.csv", folder / "slides")
    return prepare_store(
        rows,
        folder / name,
        recipe(**settings),
        workers=workers,
        with_overview=with_overview,
        prune=prune,
    )


def files(folder):
    """Name -> bytes of what does not depend on the key or on where the slides lie."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "private" not in path.parts
    }


def test_tissue_and_annotated_tiles_are_kept(folder):
    reports = prepare(folder)
    assert [report.error for report in reports] == [""] * 3
    assert [report.record.tiles for report in reports] == [11 * 12 + 1] * 3
    store = folder / "store"
    with (store / "index.csv").open(newline="") as file:
        index = list(csv.DictReader(file))
    assert len(index) == 3 * 133
    corners = {(float(row["x"]), float(row["y"])) for row in index}
    assert min(x for x, _ in corners) == 0  # the annotated tile on glass
    assert (128.0, 96.0) in corners
    assert (512.0, 96.0) not in corners
    record = layout.read_records(store)[0]
    images, labels = stored_pixels(store, [record], SIDE)
    rows = [row for row in index if row["slide"] == record.slide]
    at = [i for i, row in enumerate(rows) if (row["x"], row["y"]) == ("160.000", "128.000")]
    assert (labels[at[0]] == 1).all()
    assert 200 < images[at[0]][..., 0].mean() < 240
    assert record.pixels == (133 * SIDE**2 - 64 * 64 - 100, 64 * 64, 100, 0)
    assert record.tissue_mm2 == pytest.approx(352 * 384 * 0.25e-6, rel=0.05)


def test_pixels_are_the_slides(folder):
    report = prepare(folder)[0]
    images, _ = stored_pixels(folder / "store", [report.record], SIDE)
    with tifffile.TiffFile(report.row.slide) as tiff:
        whole = tiff.pages.first.asarray()
    with (folder / "store" / "slides" / report.slide / "tiles.csv").open(newline="") as file:
        corners = [(int(float(r["x"])), int(float(r["y"]))) for r in csv.DictReader(file)]
    for image, (x, y) in zip(images, corners, strict=True):
        assert (image == whole[y : y + SIDE, x : x + SIDE]).all()


def test_another_scale_keeps_labels_in_their_place(folder):
    report = prepare(folder, mpp=1.0, tile_size=16)[0]
    assert report.record.pixels[1] == 32 * 32
    assert report.record.tiles == 133


def test_the_number_of_workers_changes_nothing(folder):
    prepare(folder, "one", workers=1)
    key = (folder / "one" / "private" / "pseudonyms.key").read_text()
    private = folder / "three" / "private"
    layout.claim(folder / "three", recipe())
    private.mkdir()
    (private / "pseudonyms.key").write_text(key)
    prepare(folder, "three", workers=3)
    assert files(folder / "one") == files(folder / "three")


def test_a_broken_slide_is_skipped_and_the_rest_goes_on(folder):
    bad = folder / "slides" / f"{PEOPLE[2]}-1.tif"
    bad.write_bytes(bad.read_bytes()[:20_000])
    reports = prepare(folder, workers=2)
    assert [bool(report.error) for report in reports] == [False, True, False]
    assert "truncated" in reports[1].error
    assert len(layout.read_records(folder / "store")) == 2
    private = (folder / "store" / "private" / "report.csv").read_text()
    assert "truncated" in private


def test_a_slide_that_changes_meanwhile_is_an_error(folder, monkeypatch):
    """While it is cut, and while its bytes are read again for their digest."""
    rows = read_slide_list(folder / "sites.csv", folder / "slides")
    layout.claim(folder / "store", recipe())
    job = preparation.SlideJob(folder / "store", recipe(), rows[0], "a" * 16, "", False)

    def grow(*_):
        with rows[0].slide.open("ab") as file:
            file.write(b"more")

    digest = preparation.file_digest
    monkeypatch.setattr(preparation, "file_digest", lambda path: (grow(), digest(path))[1])
    with pytest.raises(StoreError, match="changed while"):
        preparation._prepare(job)
    monkeypatch.setattr(preparation, "file_digest", digest)
    read = Slide.read_region
    monkeypatch.setattr(Slide, "read_region", lambda *a, **k: (grow(), read(*a, **k))[1])
    with pytest.raises(SlideError, match="changed while"):
        preparation._prepare(job._replace(slide="b" * 16))
    assert not (folder / "store" / "slides" / ("b" * 16)).exists()


def test_a_second_call_does_only_what_is_missing(folder):
    bad = folder / "slides" / f"{PEOPLE[2]}-1.tif"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:20_000])
    first = prepare(folder)
    bad.write_bytes(whole)
    second = prepare(folder)
    assert [report.is_old for report in second] == [True, False, True]
    assert [report.error for report in second] == [""] * 3
    assert second[0].record == first[0].record
    assert [report.is_old for report in prepare(folder)] == [True] * 3


def test_changed_files_are_prepared_anew(folder):
    prepare(folder)
    drawn = folder / "slides" / f"{PEOPLE[2]}-0.geojson"
    drawn.write_text(json.dumps([box("Tumor", 160, 128, 192, 160)]))
    reports = prepare(folder)
    assert [report.is_old for report in reports] == [False, True, True]
    assert reports[0].record.pixels[1] == 32 * 32


def test_a_slide_that_breaks_later_leaves_nothing_behind(folder):
    reports = prepare(folder, with_overview=True)
    bad = reports[1].row.slide
    bad.write_bytes(bad.read_bytes()[:9000])
    assert prepare(folder)[1].error
    store = folder / "store"
    assert not [path for path in store.rglob("*") if reports[1].slide in path.name]
    assert reports[1].slide not in (store / "private" / "sources.csv").read_text()


def test_a_changed_table_needs_no_new_pixels(folder):
    prepare(folder)
    rows = [f"{PEOPLE[2]}-{n},east,{PEOPLE[0]} {n},train" for n in range(3)]
    table(folder, rows)
    reports = prepare(folder)
    assert [report.is_old for report in reports] == [True] * 3
    assert {record.site for record in layout.read_records(folder / "store")} == {"east"}
    assert "east" in (folder / "store" / "index.csv").read_text()


def test_a_slide_that_is_listed_no_more_is_not_trained_on(folder):
    """Its patient may have withdrawn: silence would go on using it."""
    reports = prepare(folder, with_overview=True)
    table(folder, [f"{PEOPLE[2]}-{n},north,{PEOPLE[0]} {n},train" for n in (0, 2)])
    with pytest.raises(StoreError, match=rf"1 slides .*{PEOPLE[2]}-1.*--prune"):
        prepare(folder)
    prepare(folder, prune=True)
    store, gone = folder / "store", reports[1].slide
    assert len(federation_from_store(store, tile_size=SIDE).train) == 2 * 133
    assert not [path for path in store.rglob("*") if gone in path.name]
    for name in ("index.csv", "report.csv", "private/sources.csv"):
        assert gone not in (store / name).read_text()


def test_a_killed_call_leaves_nothing_that_is_used(folder):
    store = folder / "store"
    layout.claim(store, recipe())
    partial = store / "slides" / ".0123.77.partial"
    (partial / "images").mkdir(parents=True)
    prepare(folder)
    assert not partial.exists()
    assert len(layout.read_records(store)) == 3


def test_two_calls_at_once_are_refused(folder):
    import fcntl

    prepare(folder)
    with (folder / "store" / "private" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="Another call"):
            prepare(folder)


def test_a_slide_without_tissue_gives_no_tile(folder):
    rng = np.random.default_rng(0)
    blank = np.clip(rng.normal(242, 2, (256, 256, 3)), 0, 255).astype(np.uint8)
    write_generic(folder / "slides" / "blank.tif", blank, levels=1)
    table(folder, ["blank,north,p,train", f"{PEOPLE[2]}-0,north,q,train"])
    reports = prepare(folder)
    assert [report.record.tiles for report in reports] == [0, 133]
    assert len(federation_from_store(folder / "store", tile_size=SIDE).train) == 133


def test_outlines_of_tissue_instead(folder):
    (folder / "slides" / "outline.geojson").write_text(json.dumps([box("x", 0, 0, 64, 64)]))
    (folder / "sites.csv").write_text(f"slide,site,tissue\n{PEOPLE[2]}-0,north,outline.geojson\n")
    (report,) = prepare(folder)
    assert report.record.tiles == 4 + 4  # of the outline, and the annotated ones


def test_overviews_are_drawn(folder):
    reports = prepare(folder, with_overview=True)
    pictures = sorted((folder / "store" / "overview").iterdir())
    assert [path.stem for path in pictures] == sorted(report.slide for report in reports)
    assert all(path.stat().st_size > 10_000 for path in pictures)


def plant(path):
    """A name, a date and a barcode in every text of a slide that tifffile can write."""
    image = tissue_picture()
    planted = " ".join(PEOPLE)
    text = f"Aperio {planted}\n640x512 (64x64)|AppMag = 20|MPP = 0.5|Patient = {planted}"
    label = np.zeros((90, 100, 3), np.uint8)
    extra = [(code, "s", 0, planted, True) for code in (269, 271, 272, 285, 315, 316, 33432, 37510)]
    with tifffile.TiffWriter(path) as writer:
        for level, tile in ((image, (64, 64)), (label, None)):
            writer.write(
                level,
                tile=tile,
                photometric="rgb",
                compression="zlib",
                description=text,
                software=planted,
                datetime="1961:07:24 10:11:12",
                extratags=extra,
                metadata=None,
            )


def test_nothing_that_names_anybody_leaves(folder):
    """Every file of the store outside `private`, and every byte of it."""
    path = folder / "slides" / f"{PEOPLE[2]}-0.tif"
    plant(path)
    planted = " ".join(PEOPLE)
    shapes = [box("Tumor", 160, 128, 224, 192), box(f"Nerve of {planted}", 10, 10, 20, 20)]
    shapes[0]["properties"]["name"] = planted
    path.with_suffix(".geojson").write_text(json.dumps(shapes))
    reports = prepare(folder, unknown="ignore", with_overview=True)
    assert [report.error for report in reports] == [""] * 3
    words = [*PEOPLE, "1961:07:24", "Mustermann", str(folder), "geojson"]
    seen = {}
    for name, data in files(folder / "store").items():
        for word in words:
            if word.encode() in data or word in name:
                seen[name] = word
    assert seen == {}
    private = (folder / "store" / "private" / "sources.csv").read_bytes()
    assert all(word.encode() in private for word in (PEOPLE[0], PEOPLE[2], str(folder)))


def test_private_files_are_the_owners_alone(folder):
    prepare(folder)
    private = folder / "store" / "private"
    assert stat.S_IMODE(os.stat(private).st_mode) == 0o700
    for name in ("sources.csv", "pseudonyms.key", "report.csv"):
        assert stat.S_IMODE(os.stat(private / name).st_mode) == 0o600, name


# --- the federation of a store


def test_the_federation_of_a_store(folder):
    reports = prepare(folder)
    federation = federation_from_store(folder / "store", tile_size=SIDE)
    assert federation.class_names == ("background", "tumour", "stroma")
    assert len(federation.train) == 2 * 133
    assert len(federation.test) == 133
    assert set(federation.train.sites) == {"north", "south"}
    assert set(federation.train.patients) == {reports[0].record.patient, reports[2].record.patient}
    assert [source.site for source in federation.sources] == list(federation.train.sites)
    outline = federation_from_store(folder / "store", tile_size=SIDE, with_pixels=False)
    assert outline.train.images.shape == (266, 0, 0, 3)
    assert (outline.train.site == federation.train.site).all()


def test_sources_are_the_slides_and_not_their_tiles(folder):
    prepare(folder, "fine")
    prepare(folder, "coarse", mpp=1.0)
    fine, coarse = (
        federation_from_store(folder / name, tile_size=SIDE).sources for name in ("fine", "coarse")
    )
    assert sorted(fine) == sorted(coarse)
    for path in (folder / "coarse" / "private").iterdir():
        path.unlink()
    unknown = federation_from_store(folder / "coarse", tile_size=SIDE).sources
    assert sorted(unknown) != sorted(fine)


def test_sites_may_be_chosen(folder):
    prepare(folder)
    store = folder / "store"
    federation = federation_from_store(store, tile_size=SIDE, train_sites=("north",))
    assert federation.train.sites == ("north",)
    federation = federation_from_store(store, tile_size=SIDE, external_sites=("south",))
    assert (federation.train.sites, federation.external.sites) == (("north",), ("south",))
    with pytest.raises(StoreError, match="unknown nowhere"):
        federation_from_store(store, tile_size=SIDE, train_sites=("nowhere",))
    with pytest.raises(StoreError, match="both"):
        federation_from_store(
            store, tile_size=SIDE, train_sites=("south",), external_sites=("south",)
        )


def test_wrong_tile_sizes_and_no_training_tiles(folder):
    prepare(folder)
    with pytest.raises(StoreError, match="tile_size=32"):
        federation_from_store(folder / "store", tile_size=64)
    with pytest.raises(StoreError, match="got none"):
        federation_from_store(folder / "store", tile_size=SIDE, external_sites=("north", "south"))


def test_tiles_of_an_otsu_store_are_no_unit(folder):
    prepare(folder, tissue="otsu")
    federation = federation_from_store(folder / "store", tile_size=SIDE)
    with pytest.raises(ValueError, match="tissue=saturation"):
        check_unit(federation, "tile")
    check_unit(federation, "slide")
    check_unit(federation, "patient")
    prepare(folder, "plain")
    check_unit(federation_from_store(folder / "plain", tile_size=SIDE), "tile")


def test_a_patient_on_both_sides_is_refused(folder):
    prepare(folder)
    store = folder / "store"
    (of_test,) = [r for r in layout.read_records(store) if r.split == "test"]
    (other,) = [r for r in layout.read_records(store) if r.site == "south"]
    path = store / "slides" / of_test.slide
    layout.write_record(path, layout.dataclasses.replace(of_test, patient=other.patient))
    with pytest.raises(StoreError, match="one site and in one split"):
        federation_from_store(store, tile_size=SIDE)
