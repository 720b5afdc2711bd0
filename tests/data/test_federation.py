"""From a manifest to tiles with owners, and the units of privacy that the data can honour."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from fedjax_dp.data.federation import (
    Federation,
    check_unit,
    effective_splits,
    federation_from_manifest,
    fingerprint,
    largest_known_unit,
    site_sources,
    unit_index,
)
from fedjax_dp.data.manifest import ManifestError, read_manifest
from fedjax_dp.data.sources import Holding, holdings
from fedjax_dp.data.splits import split_of
from fedjax_dp.data.synthetic import synthetic_federation
from fedjax_dp.data.tiles import IGNORE_INDEX

ROWS = [  # image, site, patient, split
    ("a0", "a", "p0", "train"),
    ("b0", "b", "", "train"),
    ("a1", "a", "p1", "train"),
    ("a2", "a", "p0", "train"),
    ("b1", "b", "", "train"),
    ("a3", "a", "p2", "validation"),
    ("b2", "b", "", "test"),
    ("c0", "c", "q0", "external"),
    ("d0", "d", "r0", "external"),
    ("d1", "d", "r1", "excluded"),
]


@pytest.fixture
def write(tmp_path):
    """Writes a manifest of `rows` with images of 40 x 24 pixels; returns its path."""

    def write(rows=ROWS, *, with_split=True, name="m.csv"):
        lines = ["image,mask,site,patient" + ",split" * with_split]
        for image, site, patient, split in rows:
            path = tmp_path / f"{image}.png"
            if not path.exists():
                rng = np.random.default_rng(list(image.encode()))
                Image.fromarray(rng.integers(0, 256, (24, 40, 3), np.uint8)).save(path)
                mask = rng.integers(0, 2, (24, 40), np.uint8)
                Image.fromarray(mask).save(tmp_path / f"{image}_mask.png")
            lines.append(
                f"{image}.png,{image}_mask.png,{site},{patient}" + f",{split}" * with_split
            )
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return tmp_path / name

    return write


def _counts(federation: Federation):
    names = ("train", "validation", "test", "external")
    return {name: sorted(getattr(federation, name).slides) for name in names}


def test_the_manifests_own_split_and_owners(write):
    federation = federation_from_manifest(write(), tile_size=16)
    table = federation.train
    assert table.sites == ("a", "b")
    assert table.slides == ("a0.png", "b0.png", "a1.png", "a2.png", "b1.png")
    assert table.patients == ("p0", "p1")
    assert len(table) == 5 * 6  # 24 x 40 in tiles of 16: 2 x 3
    assert table.patient.tolist() == [0] * 6 + [-1] * 6 + [1] * 6 + [0] * 6 + [-1] * 6
    assert federation.validation.slides == ("a3.png",)
    assert federation.test.slides == ("b2.png",)
    assert federation.external.slides == ("c0.png", "d0.png")
    assert federation.class_names == ("background", "nucleus")
    assert not federation.tiles_overlap
    assert not federation.is_public


def test_tiles_hold_the_images_pixels_once(write, tmp_path):
    federation = federation_from_manifest(write(), tile_size=16)
    mask = np.asarray(Image.open(tmp_path / "b2_mask.png"))
    labels = federation.test.labels
    assert (labels != IGNORE_INDEX).sum() == mask.size
    assert (labels == 1).sum() == mask.sum()
    image = np.asarray(Image.open(tmp_path / "b2.png"))
    np.testing.assert_array_equal(federation.test.images[1], image[:16, 16:32])


def test_stride_overlaps_training_tiles_only(write):
    federation = federation_from_manifest(write(), tile_size=16, stride=8)
    assert federation.tiles_overlap
    assert len(federation.train) == 5 * 2 * 4
    assert len(federation.test) == 6


def test_tissue_thins_training_only_and_never_what_is_annotated(write, tmp_path):
    path = write()
    Image.fromarray(np.full((24, 40, 3), 250, np.uint8)).save(tmp_path / "a0.png")
    Image.fromarray(np.full((24, 40, 3), 251, np.uint8)).save(tmp_path / "b2.png")
    empty = np.zeros((24, 40), np.uint8)
    empty[0, 0] = 1
    for name in ("a0", "b2"):
        Image.fromarray(empty).save(tmp_path / f"{name}_mask.png")
    federation = federation_from_manifest(path, tile_size=16, min_tissue=0.5)
    slide = federation.train.slides.index("a0.png")
    assert (federation.train.slide == slide).sum() == 1
    assert len(federation.test) == 6


def test_a_site_without_any_tissue_is_named(write, tmp_path):
    path = write()
    for i, name in enumerate(("b0", "b1")):
        Image.fromarray(np.full((24, 40, 3), 250 + i, np.uint8)).save(tmp_path / f"{name}.png")
        Image.fromarray(np.zeros((24, 40), np.uint8)).save(tmp_path / f"{name}_mask.png")
    with pytest.raises(ManifestError, match=r"no training tile at b\."):
        federation_from_manifest(path, tile_size=16, min_tissue=0.5)


def test_without_split_the_keyed_hash_decides(write):
    rows = [(f"x{i}", "ab"[i % 2], f"p{i // 2 * 2 + i % 2}", "") for i in range(24)]
    path = write(rows, with_split=False)
    tables = _counts(federation_from_manifest(path, tile_size=16))
    for image, _, patient, _ in rows:
        assert f"{image}.png" in tables[split_of(patient=patient, image="")]
    other = _counts(federation_from_manifest(path, tile_size=16, split_key=b"k2"))
    assert other != tables
    fewer = _counts(
        federation_from_manifest(write(rows[1:], with_split=False, name="n.csv"), tile_size=16)
    )
    for name, slides in tables.items():
        assert fewer[name] == [slide for slide in slides if slide != "x0.png"]


def test_sites_by_name_override_the_split(write):
    manifest = read_manifest(write())
    names = [row.image[:2] for row in manifest.rows]

    def splits(**arguments):
        found = effective_splits(manifest, **arguments)
        return {n: s for n, s in zip(names, found, strict=True) if s}

    own = {row[0]: row[3] for row in ROWS}
    assert splits() == own
    only_a = splits(train_sites=("a",))
    assert only_a == {n: s for n, s in own.items() if n[0] != "b"}
    only_c = splits(external_sites=("c",))
    assert only_c == {n: s for n, s in own.items() if n != "d0"}
    b_outside = splits(external_sites=("b",))
    assert {n: s for n, s in b_outside.items() if s == "external"} == dict.fromkeys(
        ("b0", "b1", "b2"), "external"
    )
    c_trains = splits(train_sites=("a", "c"), external_sites=("b",))
    assert c_trains["c0"] == split_of(patient="q0", image="c0.png")
    assert c_trains["d1"] == "excluded"
    assert "d0" not in c_trains


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"train_sites": ("a", "z")}, "a, b, c, d; got unknown z"),
        ({"external_sites": ("y",)}, "external_sites"),
        ({"train_sites": ("a",), "external_sites": ("a",)}, "both"),
        ({"train_sites": "a"}, "string"),
        ({"stride": 17}, "stride"),
        ({"stride": 0}, "stride"),
        ({"min_tissue": -0.1}, "min_tissue"),
        ({"split_key": b""}, "split_key"),
        ({"label_mode": "other"}, "label_mode"),
    ],
)
def test_bad_arguments(write, arguments, says):
    path = write(with_split="split_key" not in arguments)
    with pytest.raises(ValueError, match=says):
        federation_from_manifest(path, **{"tile_size": 16, **arguments})


def test_a_site_that_is_excluded_cannot_be_asked_for(write):
    rows = [*ROWS[:-1], ("e0", "e", "", "excluded")]
    with pytest.raises(ValueError, match="excluded"):
        federation_from_manifest(write(rows), tile_size=16, external_sites=("e",))


def test_all_errors_are_raised_together(write, tmp_path):
    path = write()
    (tmp_path / "a0.png").unlink()
    (tmp_path / "b2_mask.png").write_bytes(b"")
    with pytest.raises(ManifestError) as caught:
        federation_from_manifest(path, tile_size=16)
    assert [f.rows for f in caught.value.findings] == [(2,), (8,)]
    assert "row 2" in str(caught.value)
    assert "row 8" in str(caught.value)
    assert "2 errors" in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_units_partition_the_tiles_of_a_site(write):
    table = federation_from_manifest(write(), tile_size=16).train
    for site, expected in (("a", {"tile": 18, "slide": 3, "patient": 2}), ("b", {"slide": 2})):
        for unit, count in expected.items():
            index = unit_index(table, site, unit)
            assert len(index) == count
            tiles = np.concatenate(index.tiles)
            assert tiles.dtype == np.int32
            np.testing.assert_array_equal(np.sort(tiles), table.of_site(site))
    patients = unit_index(table, "a", "patient").tiles
    assert [len(tiles) for tiles in patients] == [12, 6]
    for tiles in patients:
        assert len(set(table.patient[tiles])) == 1
    assert len(unit_index(table, "nowhere", "tile")) == 0
    assert len(unit_index(table, "nowhere", "patient")) == 0


def test_unknown_patients_are_no_unit(write):
    federation = federation_from_manifest(write(), tile_size=16)
    assert largest_known_unit(federation.train) == "slide"
    with pytest.raises(ValueError, match="at b"):
        unit_index(federation.train, "b", "patient")
    with pytest.raises(ValueError, match=r"at b\. .*unit='slide'"):
        check_unit(federation, "patient")
    check_unit(federation, "slide")
    check_unit(federation, "tile")
    known = federation_from_manifest(write(), tile_size=16, train_sites=("a",))
    assert largest_known_unit(known.train) == "patient"
    check_unit(known, "patient")


def test_every_site_with_unknown_patients_is_named(write):
    rows = [*ROWS, ("e0", "e", "", "train"), ("e1", "e", "s", "train")]
    federation = federation_from_manifest(write(rows), tile_size=16)
    with pytest.raises(ValueError, match="at b, e"):
        check_unit(federation, "patient")


def test_overlapping_tiles_are_no_unit(write):
    federation = federation_from_manifest(write(), tile_size=16, stride=8)
    with pytest.raises(ValueError, match="stride"):
        check_unit(federation, "tile")
    check_unit(federation, "slide")


@pytest.mark.parametrize("unit", ["client", "", "Tile"])
def test_other_units_are_refused(write, unit):
    federation = federation_from_manifest(write(), tile_size=16)
    with pytest.raises(ValueError, match="unit"):
        check_unit(federation, unit)
    with pytest.raises(ValueError, match="unit"):
        unit_index(federation.train, "a", unit)


def test_fingerprint_knows_training_data_and_owners_only(write):
    federation = federation_from_manifest(write(), tile_size=16)
    same = fingerprint(federation_from_manifest(write(), tile_size=16))
    assert fingerprint(federation) == same
    table = federation.train
    changes = {}
    for name in ("images", "labels", "site", "slide", "patient"):
        values = getattr(table, name).copy()
        values.flat[0] ^= 1
        changes[name] = dataclasses.replace(table, **{name: values})
    changes["sites"] = dataclasses.replace(table, sites=("a", "c"))
    changes["patients"] = dataclasses.replace(table, patients=("p", "0p1"))
    prints = {
        name: fingerprint(dataclasses.replace(federation, train=changed))
        for name, changed in changes.items()
    }
    assert len({*prints.values(), same}) == len(prints) + 1
    elsewhere = dataclasses.replace(federation, test=federation.validation, name="other")
    assert fingerprint(elsewhere) == same


def _sources(path, **arguments):
    return site_sources(federation_from_manifest(path, **{"tile_size": 16} | arguments))


def test_a_source_is_its_training_images_however_they_are_cut(write, tmp_path):
    path = write()
    found = _sources(path)
    assert list(found) == ["a", "b"]
    assert len({value for source in found.values() for value in source[1:]}) == 4
    for arguments in (
        {"tile_size": 8},
        {"tile_size": 32},  # larger than an image is high
        {"stride": 8},
        {"min_tissue": 0.1},
        {"class_names": ("background", "epithelial", "other")},
        {"label_mode": "instance"},
        {"external_sites": ("c",)},
    ):
        assert _sources(path, **arguments) == found, arguments
    for site in "ab":
        assert _sources(path, train_sites=(site,)) == {site: found[site]}
    renamed = [(image, site.upper(), patient, split) for image, site, patient, split in ROWS]
    again = _sources(write(renamed[::-1], name="renamed.csv"))
    assert {site.lower(): source[1:] for site, source in again.items()} == {
        site: source[1:] for site, source in found.items()
    }
    Image.fromarray(np.ones((24, 40), np.uint8)).save(tmp_path / "a0_mask.png")
    assert _sources(path) == found


def test_one_pixel_of_a_training_image_makes_another_source(write, tmp_path):
    path = write()
    found = _sources(path)
    for name, site in (("a2", "a"), ("a3", ""), ("b2", ""), ("c0", "")):
        image = np.array(Image.open(tmp_path / f"{name}.png"))
        image[-1, -1, -1] ^= 1
        Image.fromarray(image).save(tmp_path / f"{name}.png")
        now = _sources(path)
        assert {s for s in found if now[s].fingerprint != found[s].fingerprint} == {*site}, name
        found = now
    Image.open(tmp_path / "b0.png").save(tmp_path / "b0.tif")  # stored otherwise, same pixels
    (tmp_path / "b0.tif").rename(tmp_path / "b0.png")
    assert _sources(path) == found


def test_images_that_come_or_go_make_another_source(write):
    found = _sources(write())
    fewer = _sources(write([row for row in ROWS if row[0] != "b1"], name="fewer.csv"))
    assert fewer["a"] == found["a"]
    assert fewer["b"].fingerprint != found["b"].fingerprint


def test_whose_an_image_is_does_not_change_the_source_but_its_patients(write):
    found = _sources(write())

    def with_patients(**patients):
        rows = [(i, site, patients.get(i, patient), split) for i, site, patient, split in ROWS]
        return _sources(write(rows, name="other.csv"))

    assert with_patients(a0="p7", a2="p7") == found  # only the name is another
    for patients in ({"a2": "p7"}, {"a1": "p0"}, {"a1": ""}, {"a0": "", "a2": ""}):
        other = with_patients(**patients)
        assert other["a"].fingerprint == found["a"].fingerprint
        assert other["a"].patients != found["a"].patients
        assert other["b"] == found["b"]


def test_tiles_of_unknown_origin_are_their_own_source(write):
    made = federation_from_manifest(write(), tile_size=16)
    bare = dataclasses.replace(made, sources=())
    found = site_sources(bare)
    assert list(found) == ["a", "b"]
    order = np.arange(len(made.train))[::-1]
    columns = ("images", "labels", "site", "slide", "patient")
    mixed = {name: getattr(made.train, name)[order] for name in columns}
    assert (
        site_sources(dataclasses.replace(bare, train=dataclasses.replace(made.train, **mixed)))
        == found
    )
    images = made.train.images.copy()
    images[made.train.of_site("b")[0], 0, 0, 0] ^= 1
    changed = dataclasses.replace(bare, train=dataclasses.replace(made.train, images=images))
    assert site_sources(changed)["a"] == found["a"]
    assert site_sources(changed)["b"].fingerprint != found["b"].fingerprint
    foreign = dataclasses.replace(made, train=dataclasses.replace(made.train, sites=("a", "z")))
    with pytest.raises(ValueError, match=r"none of z .*sources=\(\)"):
        site_sources(foreign)


def test_a_drawn_source_is_all_that_its_pixels_depend_on():
    small = {
        "patients_per_site": 2, "tiles_per_patient": 1, "tile_size": 16, "num_workers": 1,
        "evaluation_patients_per_site": 0, "num_external_sites": 0, "num_training_sites": 2,
    }  # fmt: skip

    def drawn(**changes):
        return site_sources(synthetic_federation(**small | changes))

    found = drawn()
    assert len({source.fingerprint for source in found.values()}) == 2
    for same in ({"task": "tissue"}, {"patients_per_site": 3}, {"tiles_per_patient": 2}):
        assert drawn(**same) == found
    for other in ({"seed": 1}, {"mpp": 0.25}, {"tile_size": 24}, {"variation": "wide"}):
        assert not {s.fingerprint for s in drawn(**other).values()} & {
            s.fingerprint for s in found.values()
        }, other


def test_what_clients_hold_that_are_not_the_sites(write):
    rows = [*ROWS, ("e0", "e", "s", "train"), ("e1", "e", "s", "train")]
    federation = federation_from_manifest(write(rows), tile_size=16)
    sources, table = site_sources(federation), federation.train
    same = holdings(table, table, sources)
    assert same == {
        "a": Holding((sources["a"],), is_whole=True, is_patient=False),
        "b": Holding((sources["b"],), is_whole=True, is_patient=False),
        "e": Holding((sources["e"],), is_whole=True, is_patient=True),
    }
    zeros = np.zeros_like(table.site)
    pooled = dataclasses.replace(table, sites=("all",), site=zeros)
    assert holdings(table, pooled, sources) == {
        "all": Holding(tuple(sources.values()), is_whole=True, is_patient=False)
    }
    known = np.flatnonzero(table.patient >= 0)  # b does not know its patients
    only = {name: getattr(table, name)[known] for name in ("images", "labels", "slide", "patient")}
    by_site = dataclasses.replace(table, **only, site=table.site[known])
    by_patient = dataclasses.replace(by_site, sites=table.patients, site=by_site.patient)
    assert holdings(by_site, by_patient, sources) == {
        "p0": Holding((sources["a"],), is_whole=False, is_patient=True),
        "p1": Holding((sources["a"],), is_whole=False, is_patient=True),
        "s": Holding((sources["e"],), is_whole=True, is_patient=True),
    }
    halves = dataclasses.replace(table, sites=("x", "y"), site=np.arange(len(table)) % 2)
    assert not any(h.is_whole or h.is_patient for h in holdings(table, halves, sources).values())
    with pytest.raises(ValueError, match="same tiles"):
        holdings(table, by_site, sources)


def test_the_real_federation(real_data):
    """No error in it; images as its description counts them; every evaluation pixel once."""
    path = real_data / "federation/manifest.csv"
    federation = federation_from_manifest(path)
    train = federation.train
    assert {site: len(unit_index(train, site, "slide")) for site in train.sites} == {
        "uhcw": 19, "curie": 21, "emory": 25, "tcga-g9": 3, "tcga-b0": 3, "tcga-he": 3,
    }  # fmt: skip
    sizes = {"validation": 16, "test": 21, "external": 40}
    assert {name: len(getattr(federation, name).slides) for name in sizes} == sizes
    pixels = {  # 1000 x 1000 for uhcw and MoNuSeg, else 512 x 512
        "validation": (3 + 1) * 1000**2 + (8 + 4) * 512**2,
        "test": (5 + 1) * 1000**2 + (8 + 7) * 512**2,
        "external": 16 * 1000**2 + 24 * 512**2,
    }
    for name, count in pixels.items():
        assert (getattr(federation, name).labels != IGNORE_INDEX).sum() == count
    with pytest.raises(ValueError, match="emory, uhcw"):
        check_unit(federation, "patient")
    assert len(unit_index(train, "curie", "patient")) > 1
