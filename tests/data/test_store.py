"""The tile store: what is written is read, whole or not at all, and in no other order."""

import dataclasses
import json
import os
import pathlib
import stat

import numpy as np
import pytest

from fedjax_dp.data.store import layout, writing
from fedjax_dp.data.store.layout import Recipe, SlideRecord, StoreError
from fedjax_dp.data.store.pseudonyms import Pseudonyms
from fedjax_dp.data.store.reading import stored_pixels, tile_rows
from fedjax_dp.data.store.writing import StoredTile, write_slide

SIDE = 16


def recipe(**settings):
    plain = {"mpp": 0.5, "tile_size": SIDE, "class_names": ("bg", "a", "b"), "classes": "bg,a,b"}
    return Recipe(**{**plain, **settings})


def record(slide="0123456789abcdef", **settings):
    plain = SlideRecord(
        slide=slide,
        patient="p1",
        site="north",
        split="train",
        hospital="",
        tiles=0,
        tissue_mm2=1.5,
        pixels=(),
        mpp=(0.25, 0.25),
        width=1000,
        height=900,
        codec="JPEG",
        warnings=0,
        recipe=recipe().digest(),
        content="",
    )
    return dataclasses.replace(plain, **settings)


def tiles(count, seed=0):
    rng = np.random.default_rng(seed)
    for number in range(count):
        image = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        labels = rng.choice(np.array([0, 1, 2, 255], np.uint8), (SIDE, SIDE))
        yield StoredTile(32.0 * number, 8.0, 0.75, image, labels)


def read(folder, records):
    return stored_pixels(folder, records, SIDE)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(writing, "SHARD_BYTES", 5 * 3 * SIDE * SIDE)


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_what_is_written_is_read(compression, tmp_path, small_shards):
    mine = recipe(compression=compression)
    layout.claim(tmp_path, mine)
    written = write_slide(tmp_path, tiles(13), mine, record())
    images, labels = read(tmp_path, [written])
    assert images.shape == (13, SIDE, SIDE, 3)
    for number, tile in enumerate(tiles(13)):
        assert (images[number] == tile.image).all()
        assert (labels[number] == tile.labels).all()
    counts = np.bincount(labels[:].ravel(), minlength=256)
    assert written.pixels == (*counts[:3], counts[255])
    assert written.tiles == 13
    rows = tile_rows(tmp_path, written)
    assert [float(row["x"]) for row in rows] == [32.0 * number for number in range(13)]
    assert int(rows[4]["pixels_b"]) == (labels[4] == 2).sum()
    assert layout.read_records(tmp_path) == (written,)
    assert layout.read_recipe(tmp_path) == mine


def test_indexing_is_numpys(tmp_path, small_shards):
    layout.claim(tmp_path, recipe())
    names = ("a" * 16, "b" * 16, "c" * 16)
    records = [
        write_slide(tmp_path, tiles(count, seed), recipe(), record(name))
        for seed, (name, count) in enumerate(zip(names, (7, 0, 9), strict=True))
    ]
    images, labels = read(tmp_path, records)
    whole = np.stack([tile.image for seed in (0, 2) for tile in tiles((7, 0, 9)[seed], seed)])
    assert (np.stack(list(images)) == whole).all()
    assert images.nbytes == whole.nbytes
    for index in (slice(None), slice(2, 11, 3), slice(0), [6, 7, 0], np.array([15, -1]), []):
        expected = whole[np.asarray(index, int)] if isinstance(index, list) else whole[index]
        assert (images[index] == expected).all()
        assert images[index].shape == expected.shape
    assert (labels[-1] == labels[15]).all()
    for wrong in (16, [-17], np.zeros((2, 2), int), np.ones(16, bool)):
        with pytest.raises(IndexError):
            images[wrong]


def test_the_same_tiles_give_the_same_bytes(tmp_path, small_shards):
    contents = []
    for name in ("first", "second"):
        folder = tmp_path / name
        layout.claim(folder, recipe())
        write_slide(folder, tiles(8), recipe(), record())
        contents.append(
            {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        )
    assert contents[0] == contents[1]
    other = tmp_path / "other"
    layout.claim(other, recipe())
    assert (
        write_slide(other, tiles(8, 1), recipe(), record()).content
        != json.loads((tmp_path / "first" / "slides" / record().slide / "done.json").read_text())[
            "content"
        ]
    )


class Stopped(BaseException):
    """As a kill, but in this process."""


@pytest.mark.parametrize("error", [RuntimeError, Stopped, StoreError])
def test_a_slide_that_is_stopped_leaves_nothing(error, tmp_path, small_shards):
    layout.claim(tmp_path, recipe())

    def some():
        yield from tiles(12)
        raise error("in the middle")

    with pytest.raises(error):
        write_slide(tmp_path, some(), recipe(), record())
    assert list((tmp_path / "slides").iterdir()) == []
    assert layout.read_records(tmp_path) == ()


def test_a_folder_without_its_mark_is_not_used(tmp_path):
    layout.claim(tmp_path, recipe())
    written = write_slide(tmp_path, tiles(3), recipe(), record())
    (tmp_path / "slides" / written.slide / "done.json").unlink()
    assert layout.read_records(tmp_path) == ()


def test_a_full_disk_is_a_clear_error(tmp_path, monkeypatch):
    layout.claim(tmp_path, recipe())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(layout.os, "fsync", full)
    with pytest.raises(StoreError, match=r"No space left .* Make room"):
        write_slide(tmp_path, tiles(3), recipe(), record())
    assert list((tmp_path / "slides").iterdir()) == []


def test_a_really_full_disk(tmp_path, small_shards):
    """As the operating system says it: files of this process may not grow beyond a limit."""
    import resource
    import signal

    layout.claim(tmp_path, recipe())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(StoreError, match="Make room"):
            write_slide(tmp_path, tiles(12), recipe(compression="none"), record())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / "slides").iterdir()) == []


def test_labels_beyond_the_classes_are_refused(tmp_path):
    layout.claim(tmp_path, recipe())
    wrong = StoredTile(
        0, 0, 1, np.zeros((SIDE, SIDE, 3), np.uint8), np.full((SIDE, SIDE), 7, np.uint8)
    )
    with pytest.raises(StoreError, match=r"below 3 .*\[7\]"):
        write_slide(tmp_path, [wrong], recipe(), record())
    assert list((tmp_path / "slides").iterdir()) == []


def test_a_store_belongs_to_its_recipe(tmp_path):
    layout.claim(tmp_path / "s", recipe())
    layout.claim(tmp_path / "s", recipe())
    with pytest.raises(StoreError, match=r"min_tissue: 0\.5 there, 0\.7 now"):
        layout.claim(tmp_path / "s", recipe(min_tissue=0.7))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("x")
    with pytest.raises(StoreError, match="which is not"):
        layout.claim(tmp_path / "full", recipe())


@pytest.mark.parametrize(
    "settings",
    [{"min_tissue": 1.5}, {"tile_size": 4}, {"tile_size": 2**20}, {"compression": "jpeg"}],
)
def test_recipes_are_checked(settings):
    with pytest.raises(StoreError, match=next(iter(settings))):
        recipe(**settings)


def test_damaged_stores_are_told(tmp_path):
    with pytest.raises(StoreError, match=r"store\.json"):
        layout.read_recipe(tmp_path)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(StoreError, match="no JSON"):
        layout.read_recipe(tmp_path)
    (tmp_path / "store.json").write_text('{"format": "fedjax_dp tile store", "version": 99}')
    with pytest.raises(StoreError, match="version 99"):
        layout.read_recipe(tmp_path)


def test_damaged_slides_are_told(tmp_path):
    layout.claim(tmp_path, recipe())
    written = write_slide(tmp_path, tiles(4), recipe(), record())
    folder = tmp_path / "slides" / written.slide
    shard = next(p for p in (folder / "images").rglob("*") if p.name != "zarr.json" and p.is_file())
    shard.write_bytes(shard.read_bytes()[:500])
    with pytest.raises(StoreError, match=written.slide):
        read(tmp_path, [written])[0][:]
    (folder / "labels" / "zarr.json").write_text("{}")
    with pytest.raises(StoreError, match="prepare it anew"):
        read(tmp_path, [written])[1][0]
    (folder / "done.json").write_text('{"slide": 3}')
    with pytest.raises(StoreError, match="mark"):
        layout.read_records(tmp_path)


def test_pseudonyms_are_keyed_stable_and_private(tmp_path):
    names = Pseudonyms.of_store(tmp_path / "a")
    assert names.of_slide("TCGA-01") == Pseudonyms.of_store(tmp_path / "a").of_slide("TCGA-01")
    assert names.of_slide("TCGA-01") != names.of_slide("TCGA-02")
    assert names.of_slide("TCGA-01") != names.of_patient("TCGA-01")
    assert names.of_patient("") == ""
    other = Pseudonyms.of_store(tmp_path / "b")
    assert other.of_slide("TCGA-01") != names.of_slide("TCGA-01")
    key = tmp_path / "a" / "private" / "pseudonyms.key"
    assert stat.S_IMODE(os.stat(key).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(key.parent).st_mode) == 0o700
    for wrong in ("zz", "00ff"):
        key.write_text(wrong)
        with pytest.raises(StoreError, match="key"):
            Pseudonyms.of_store(tmp_path / "a")


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = pathlib.Path(tmp_path / "a.csv")
    layout.write_text(path, "old")
    monkeypatch.setattr(layout.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layout.write_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]
    assert path.read_text() == "old"
