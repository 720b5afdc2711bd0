"""A federation from headers alone is that from pixels, but for the pixels."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from fedjax_dp.data.federation import federation_from_manifest
from fedjax_dp.data.images import ImageError, image_size, read_image
from fedjax_dp.data.manifest import ManifestError
from fedjax_dp.data.outline import outline_from_manifest
from fedjax_dp.data.synthetic import synthetic_federation

SPLITS = ("train", "validation", "test", "external")
ROWS = [
    ("north", "p1", "train"), ("north", "p1", "train"), ("north", "p2", "train"),
    ("south", "", "train"), ("south", "", "validation"), ("north", "p3", "test"),
    ("far", "p4", "external"), ("south", "", "excluded"),
]  # fmt: skip


@pytest.fixture
def manifest(tmp_path):
    lines = ["image,mask,site,patient,split"]
    rng = np.random.default_rng(0)
    for i, (site, patient, split) in enumerate(ROWS):
        shape = (40 + 13 * i, 100 - 9 * i)
        pixels = rng.integers(0, 256, (*shape, 3), np.uint8)
        if i == 1:
            tifffile.imwrite(tmp_path / f"{i}.img", pixels, photometric="rgb")
        else:
            Image.fromarray(pixels).save(tmp_path / f"{i}.img", "PNG" if i % 2 else "BMP")
        mask = rng.integers(0, 2, shape, np.uint8)
        Image.fromarray(mask).save(tmp_path / f"{i}_mask.png")
        lines.append(f"{i}.img,{i}_mask.png,{site},{patient},{split}")
    path = tmp_path / "m.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def assert_same_but_for_pixels(outline, whole):
    assert (outline.name, outline.class_names) == (whole.name, whole.class_names)
    assert outline.tiles_overlap == whole.tiles_overlap
    for split in SPLITS:
        mine, theirs = getattr(outline, split), getattr(whole, split)
        for name in ("site", "slide", "patient"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
            assert getattr(mine, f"{name}s") == getattr(theirs, f"{name}s")
        assert mine.images.shape == (len(theirs), 0, 0, 3)


@pytest.mark.parametrize(
    "settings",
    [
        {"tile_size": 32},
        {"tile_size": 32, "stride": 16},
        {"tile_size": 128},
        {"tile_size": 32, "train_sites": ("north",), "external_sites": ("far",)},
    ],
)
def test_an_outline_of_a_manifest(manifest, settings):
    assert_same_but_for_pixels(
        outline_from_manifest(manifest, **settings), federation_from_manifest(manifest, **settings)
    )


def test_an_outline_of_the_synthetic_federation():
    settings = {
        "patients_per_site": 3, "tiles_per_patient": 2, "evaluation_patients_per_site": 1,
        "num_training_sites": 2, "num_external_sites": 1, "tile_size": 16,
    }  # fmt: skip
    whole = synthetic_federation(**settings, num_workers=1)
    assert_same_but_for_pixels(synthetic_federation(**settings, with_pixels=False), whole)


def test_what_is_wrong_without_a_look_at_pixels_is_an_error(manifest, tmp_path):
    text = manifest.read_text()
    manifest.write_text(text.replace("south,,validation", "south,p1,validation"))
    (tmp_path / "0.img").unlink()
    (tmp_path / "2.img").write_text("tissue")
    with pytest.raises(ManifestError) as caught:
        outline_from_manifest(manifest, tile_size=32)
    message = str(caught.value)
    for words in ("p1", "row 2: image: Cannot open", "row 4: image: Expected a PNG"):
        assert words in message
    with pytest.raises(ValueError, match="unknown west"):
        outline_from_manifest(manifest, train_sites=("west",))
    with pytest.raises(ValueError, match="stride"):
        outline_from_manifest(manifest, tile_size=32, stride=33)


def test_the_size_of_an_image_is_that_of_its_pixels(manifest, tmp_path):
    for i in range(len(ROWS)):
        assert image_size(tmp_path / f"{i}.img") == read_image(tmp_path / f"{i}.img").shape[:2]
    planes = np.zeros((3, 20, 31), np.uint8)
    tifffile.imwrite(tmp_path / "planes.tif", planes, photometric="rgb", planarconfig="separate")
    assert image_size(tmp_path / "planes.tif") == (20, 31)
    broken = tmp_path / "broken.tif"
    broken.write_bytes((tmp_path / "planes.tif").read_bytes()[:9])
    with pytest.raises(ImageError, match=r"broken\.tif"):
        image_size(broken)


def test_the_real_federation(real_data):
    outline = outline_from_manifest(real_data / "federation" / "manifest.csv")
    counts = dict(zip(outline.train.sites, np.bincount(outline.train.site), strict=True))
    assert counts == {
        "uhcw": 1216, "curie": 336, "emory": 400, "tcga-g9": 192, "tcga-b0": 192, "tcga-he": 192,
    }  # fmt: skip
