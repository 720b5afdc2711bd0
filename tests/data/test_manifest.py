"""The manifest: everything wrong at once, each with the row an editor shows."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from fedjax_dp.data.inspection import check_manifest, inspect, to_labels
from fedjax_dp.data.manifest import ManifestError, read_manifest


class Folder:
    """Writes images, masks and a manifest below a temporary folder."""

    def __init__(self, path):
        self.path = path
        self.count = 0

    def image(self, name, *, size=(40, 40), seed=None):
        self.count += 1
        rng = np.random.default_rng(self.count if seed is None else seed)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(self.path / name)

    def mask(self, name, *, size=(40, 40), values=(0, 1)):
        labels = np.resize(np.asarray(values), size)
        dtype = np.uint8 if max(values) < 256 else np.uint16
        Image.fromarray(labels.astype(dtype)).save(self.path / name)

    def pairs(self, count):
        for i in range(count):
            self.image(f"i{i}.png")
            self.mask(f"m{i}.png", values=(0, 1, *[0] * i))

    def manifest(self, text, encoding="utf-8"):
        (self.path / "manifest.csv").write_bytes(text.encode(encoding))
        return read_manifest(self.path / "manifest.csv")


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


HEADER = "image,mask,site,patient,split,mpp\n"
GOOD = HEADER + "i0.png,m0.png,a,p0,train,.25\ni1.png,m1.png,a,p1,test,.25\n"
GOOD += "i2.png,m2.png,b,,validation,.25\n"


def _errors(findings):
    return [f for f in findings if f.level == "error"]


def _only(findings, level="error"):
    (finding,) = [f for f in findings if f.level == level]
    return finding


def test_a_good_manifest_has_no_finding(folder):
    folder.pairs(3)
    manifest = folder.manifest(GOOD)
    assert check_manifest(manifest, tile_size=32) == []
    assert [row.line for row in manifest.rows] == [2, 3, 4]
    assert manifest.rows[0].mpp == 0.25
    assert manifest.rows[2].patient == ""
    assert manifest.has_split


@pytest.mark.parametrize(
    "change",
    [
        lambda t: "\ufeff" + t,
        lambda t: t.replace(",", ";"),
        lambda t: t.replace(",", "\t"),
        lambda t: t.replace("\n", "\r\n"),
        lambda t: t.replace("image,mask", "Image, MASK "),
        lambda t: t.replace("train", "Train"),
        lambda t: "\n".join(f"{line},x" for line in t.splitlines()),
    ],
    ids=["bom", "semicolon", "tab", "crlf", "header case", "split case", "unknown column"],
)
def test_ways_to_write_the_same(folder, change):
    folder.pairs(3)
    manifest = folder.manifest(change(GOOD))
    assert check_manifest(manifest) == []
    assert [dataclasses.replace(r) for r in manifest.rows] == list(folder.manifest(GOOD).rows)


def test_rows_are_numbered_as_an_editor_shows_them(folder):
    text = 'image,mask,site,note\n\n"a","b","s","two\nlines"\n,,,\nc,d,,x\n'
    manifest = folder.manifest(text)
    assert [row.line for row in manifest.rows] == [3]
    finding = _only(manifest.findings)
    assert finding.rows == (6,)
    assert "site is empty" in finding.message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("\n \n", "empty"),
        ("image,mask\na,b\n", "No column site"),
        ("path,mask,centre\na,b,c\n", "No column image, site"),
        ("image,mask,site,site\na,b,c,d\n", "occurs 2 times"),
        ("image,mask,site\n", "No row"),
        ('image,mask,site\na,"b,c\n', "quote"),
    ],
)
def test_broken_tables(folder, text, says):
    manifest = folder.manifest(text)
    assert manifest.rows == ()
    findings = check_manifest(manifest)
    assert says in " ".join(f.message for f in _errors(findings))
    assert len(_errors(findings)) == 1


def test_files_that_are_no_text(folder):
    with pytest.raises(ManifestError, match="Cannot open"):
        read_manifest(folder.path / "none.csv")
    with pytest.raises(ManifestError, match="UTF-8"):
        folder.manifest(GOOD, encoding="utf-16")


def test_values_are_checked_row_by_row(folder):
    folder.pairs(6)
    manifest = folder.manifest(
        HEADER
        + "i0.png,m0.png,a,,train,.25\n"
        + "i1.png,m1.png,a,,training,.25\n"
        + 'i2.png,m2.png,a,,test,"0,25"\n'
        + "i3.png,m3.png,a,,validation,25\n"
        + "i4.png,m4.png,a,,,nan\n"
        + "i5.png,m5.png,a,,train\n"
        + "i0.png,m0.png,a,,train,.25\n"
    )
    errors = {f.rows: f.message for f in _errors(manifest.findings)}
    assert "'training'" in errors[3,]
    assert "'0,25'" in errors[4,]
    assert "'25'" in errors[5,]
    assert "5 fields" in errors[7,]
    assert "i0.png is listed 2 times" in errors[2, 8]
    assert len(errors) == 6
    (folder.path / "i1.png").unlink()
    messages = [f.message for f in _errors(check_manifest(manifest)) if f.rows == (3,)]
    assert any("Cannot open" in m for m in messages)  # a wrong split hides no other fault
    both = [f.message for f in manifest.findings if f.rows == (6,)]
    assert any("'nan'" in m for m in both)
    assert any("split is empty" in m for m in both)


def test_everything_wrong_is_reported_at_once(folder):
    folder.pairs(10)
    (folder.path / "i1.png").unlink()
    folder.mask("m2.png", size=(40, 41))
    folder.mask("m3.png", values=(0, 1, 2, 7))
    folder.mask("m4.png", values=(0,))
    (folder.path / "i5.png").write_bytes((folder.path / "i5.png").read_bytes()[:500])
    (folder.path / "m6.png").write_bytes(b"no image")
    folder.image("i8.png", seed=77)
    folder.image("i9.png", seed=77)
    lines = [f"i{i}.png,m{i}.png,a,p{i},train,.25\n" for i in range(7)]
    lines += ["i7.png,m7.png,b,p0,train,.25\n"]
    lines += ["i8.png,m8.png,b,p8,validation,.25\n", "i9.png,m9.png,b,p9,validation,.25\n"]
    findings = check_manifest(folder.manifest(HEADER + "".join(lines)))
    errors = {f.rows: f.message for f in _errors(findings)}
    assert "Cannot open" in errors[3,]
    assert "40 x 40 pixels, its mask m2.png 41 x 40" in errors[4,]
    assert "labels 2, 7 outside" in errors[5,]
    assert "truncated" in errors[7,]
    assert "m6.png" in errors[8,]
    assert "'p0'" in errors[2, 9]
    assert "'a' and 'b'" in errors[2, 9]
    assert "identical images: i8.png, i9.png" in errors[10, 11]
    assert "split 'test'" in errors[()]
    assert len(errors) == 8
    assert _only(findings, "warning").rows == (6,)
    assert "background only" in _only(findings, "warning").message
    assert [f.level for f in findings] == ["error"] * 8 + ["warning"]


def test_a_patient_who_trains_may_not_measure(folder):
    folder.pairs(3)
    text = HEADER + "i0.png,m0.png,a,p,train,\ni1.png,m1.png,a,p,test,\ni2.png,m2.png,a,q,test,\n"
    finding = _only(check_manifest(folder.manifest(text)))
    assert finding.rows == (2, 3)
    assert "train and test" in finding.message
    excluded = text.replace("a,p,test", "a,p,excluded")
    assert _errors(check_manifest(folder.manifest(excluded))) == []


@pytest.mark.parametrize(
    ("splits", "level", "says"),
    [
        ("test test validation", "error", "'train'"),
        ("train train validation", "error", "'test'"),
        ("train external validation", "warning", "'test'"),
        ("train test test", "warning", "'validation'"),
    ],
)
def test_empty_splits(folder, splits, level, says):
    folder.pairs(3)
    lines = [f"i{i}.png,m{i}.png,s{i},,{split},\n" for i, split in enumerate(splits.split())]
    finding = _only(check_manifest(folder.manifest(HEADER + "".join(lines))), level)
    assert says in finding.message


def test_mixed_and_missing_resolutions_are_warnings(folder):
    folder.pairs(3)
    text = GOOD.replace("a,p1,test,.25", "c,p1,test,.5").replace("validation,.25", "validation,")
    findings = check_manifest(folder.manifest(text))
    assert [f.level for f in findings] == ["warning", "warning"]
    assert "a 0.25, c 0.5" in findings[0].message
    assert "not stated for b" in findings[1].message


def test_excluded_rows_may_be_broken(folder):
    folder.pairs(3)
    text = GOOD + "gone.png,gone.png,a,p1,excluded,.25\n"
    findings = check_manifest(folder.manifest(text))
    assert {f.level for f in findings} == {"warning"}
    assert all(f.rows == (5,) for f in findings)


def test_overlapping_images(folder):
    folder.pairs(4)
    field = np.random.default_rng(9).integers(0, 256, (80, 80, 3), np.uint8)
    Image.fromarray(field[:40, :40]).save(folder.path / "i0.png")
    Image.fromarray(field[10:50, :40]).save(folder.path / "i1.png")
    Image.fromarray(field[:40, 40:]).save(folder.path / "i3.png")

    def findings(first, second):
        text = HEADER + f"i0.png,m0.png,a,p0,{first},\ni1.png,m1.png,a,p1,{second},\n"
        text += "i2.png,m2.png,a,p2,train,\ni3.png,m3.png,a,p3,validation,\n"
        found = check_manifest(folder.manifest(text))
        return [f for f in found if "same tissue" in f.message]

    for first, second, level in (
        ("train", "train", "error"),
        ("train", "test", "error"),
        ("test", "test", "warning"),
        ("external", "test", "warning"),
    ):
        finding = _only(findings(first, second), level)
        assert finding.rows == (2, 3)
    assert findings("excluded", "test") == []


def test_binary_masks_written_as_255(folder):
    """In a class map 255 means ignore: nothing would be learned, and nothing would say so."""
    folder.pairs(3)
    for i in range(3):
        folder.mask(f"m{i}.png", values=(0, 255, *[0] * i))
    findings = check_manifest(folder.manifest(GOOD))
    assert {f.rows for f in _errors(findings)} == {(2, 3), (4,)}
    assert "label_mode=instance" in findings[0].message
    assert _errors(check_manifest(folder.manifest(GOOD), label_mode="instance")) == []
    folder.mask("m0.png", values=(0, 1, 255))
    folder.mask("m2.png", values=(0, 1, 255))
    assert _errors(check_manifest(folder.manifest(GOOD))) == []


def test_labels_of_both_modes():
    mask = np.array([[0, 1, 255, 256, 65535]], np.uint16)
    np.testing.assert_array_equal(
        to_labels(mask, label_mode="instance", num_classes=2), [[0, 1, 1, 1, 1]]
    )
    with pytest.raises(ValueError, match=r"labels 256, 65535 outside the class table 0\.\.1"):
        to_labels(mask, label_mode="class", num_classes=2)
    kept = to_labels(mask[:, :3], label_mode="class", num_classes=2)
    assert kept.dtype == np.uint8
    np.testing.assert_array_equal(kept, [[0, 1, 255]])
    with pytest.raises(ValueError, match="labels -1 outside"):
        to_labels(np.array([[-1]], np.int32), label_mode="class", num_classes=2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"label_mode": "binary"}, "label_mode"),
        ({"class_names": ("background",)}, "class names"),
        ({"class_names": ("a", "a")}, "class names"),
    ],
)
def test_bad_arguments(folder, arguments, says):
    folder.pairs(3)
    with pytest.raises(ValueError, match=says):
        check_manifest(folder.manifest(GOOD), **arguments)


def test_small_images_warn(folder):
    folder.pairs(3)
    findings = check_manifest(folder.manifest(GOOD), tile_size=64)
    assert [(f.level, f.rows) for f in findings] == [("warning", (i,)) for i in (2, 3, 4)]


def test_paths_outside_the_folder_absolute_and_from_windows(folder):
    folder.pairs(3)
    (folder.path / "sub").mkdir()
    text = GOOD.replace("i0.png", "sub\\..\\i0.png").replace("i1.png", str(folder.path / "i1.png"))
    assert check_manifest(folder.manifest(text)) == []
    below = folder.path / "sub" / "manifest.csv"
    below.write_text(GOOD.replace("i", "../i").replace("m0", "../m0").replace(",m", ",../m"))
    text = HEADER + "".join(
        f"../i{i}.png,../m{i}.png,a,,{s},\n" for i, s in enumerate(("train", "test", "validation"))
    )
    below.write_text(text)
    assert check_manifest(read_manifest(below)) == []


def test_every_image_is_opened_once_and_visited_in_place(folder, monkeypatch):
    from fedjax_dp.data import inspection

    folder.pairs(3)
    opened = []
    read = inspection.read_image
    monkeypatch.setattr(
        inspection, "read_image", lambda path: (opened.append(path.name), read(path))[1]
    )
    seen = inspect(
        folder.manifest(GOOD),
        splits=("train", "", "test"),
        visit=lambda row, split, image, labels, mask: (row.line, split, image.shape, mask.dtype),
    )
    assert sorted(opened) == ["i0.png", "i2.png"]
    assert seen.visited == (
        (2, "train", (40, 40, 3), np.uint8),
        None,
        (4, "test", (40, 40, 3), np.uint8),
    )


def test_real_consep_patches_are_flagged_with_their_rows(real_data, tmp_path):
    source = real_data / "formats/06_consep_uhcw_patches"
    lines = [
        f"{source}/images/train_1_{i:03d}.jpg,{source}/seg_mask/train_1_{i:03d}.png,uhcw,,"
        f"{'train' if i < 8 else 'test'},.25\n"
        for i in range(12)
    ]
    (tmp_path / "m.csv").write_text(HEADER + "".join(lines))
    names = ("background", "other", "inflammatory", "epithelial", "spindle")
    findings = check_manifest(read_manifest(tmp_path / "m.csv"), class_names=names)
    assert [f.rows for f in _errors(findings)] == [(8, 11), (9, 12)]
    shared = [f.rows for f in findings if f.level == "warning" and "same tissue" in f.message]
    assert shared == [(10, 13)]
    assert any("outside the class table" in f.message for f in check_manifest(
        read_manifest(tmp_path / "m.csv")))  # fmt: skip
