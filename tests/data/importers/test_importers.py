"""Published layouts: real samples where they are present, files of the same form everywhere."""

import csv
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import scipy.io
from PIL import Image
from scipy import ndimage

from fedjax_dp.data.federation import federation_from_manifest
from fedjax_dp.data.images import read_mask
from fedjax_dp.data.importers import bcss, consep, glas, monuseg
from fedjax_dp.data.importers.regions import LayoutError, SourceRegion
from fedjax_dp.data.importers.writing import write_manifest

REAL = pathlib.Path(__file__).parents[4] / "shared" / "data" / "formats"


def real(name):
    if not (REAL / name).exists():
        pytest.skip(f"real data are absent: {name}")
    return REAL / name


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), np.uint8)


def save(array, *path):
    path = pathlib.Path(*path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


# --- BCSS

BARCODES = ("TCGA-A2-A0T2-DX1", "TCGA-E2-A14X-DX1", "TCGA-BH-A0BG-DX1")


def write_bcss(root):
    codes = np.arange(22, dtype=np.uint8).repeat(8)[None].repeat(40, 0)
    for number, barcode in enumerate(BARCODES):
        name = f"{barcode}_xmin100_ymin200_MPP-0.2500.png"
        save(picture(40, 176, number), root, "images", name)
        save(codes, root, "masks", name)
    return codes


def test_bcss_groups_sites_and_splits(tmp_path):
    codes = write_bcss(tmp_path)
    data = bcss.read_bcss(tmp_path)
    assert data.class_names == ("other", "tumour", "stroma", "lymphocytic", "necrosis")
    assert [region.site for region in data.regions] == ["tcga-a2", "tcga-bh", "tcga-e2"]
    assert [region.split for region in data.regions] == ["", "", "external"]
    assert data.regions[0].patient == "TCGA-A2-A0T2"
    assert {region.mpp for region in data.regions} == {0.25}
    _, labels = data.regions[0].load()
    groups = {255: (0, 7), 1: (1, 19, 20), 2: (2,), 3: (3, 10, 11), 4: (4,)}
    for label, members in groups.items():
        assert (labels[np.isin(codes, members)] == label).all()
    rest = ~np.isin(codes, [code for members in groups.values() for code in members])
    assert (labels[rest] == 0).all()


def test_a_bad_bcss_region_is_left_out_and_the_rest_goes_on(tmp_path):
    write_bcss(tmp_path / "source")
    name = f"{BARCODES[0]}_xmin100_ymin200_MPP-0.2500.png"
    save(np.full((40, 176), 99, np.uint8), tmp_path, "source", "masks", name)
    (tmp_path / "source" / "masks" / f"{BARCODES[1]}_xmin100_ymin200_MPP-0.2500.png").unlink()
    data = bcss.read_bcss(tmp_path / "source")
    errors = write_manifest(data, tmp_path / "out")
    assert len(errors) == 2
    assert "codes 0 to 21" in errors[0]
    assert "Cannot open" in errors[1]
    with (tmp_path / "out" / "manifest.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["site"] == "tcga-bh"


def test_a_manifest_of_bcss_trains(tmp_path):
    write_bcss(tmp_path / "source")
    data = bcss.read_bcss(tmp_path / "source")
    regions = [
        SourceRegion(**{**vars(region), "split": split})
        for region, split in zip(data.regions, ("train", "test", "external"), strict=True)
    ]
    data = type(data)(regions=tuple(regions), class_names=data.class_names)
    assert write_manifest(data, tmp_path / "out") == ()
    federation = federation_from_manifest(
        tmp_path / "out" / "manifest.csv", tile_size=32, class_names=data.class_names
    )
    assert federation.train.sites == ("tcga-a2",)
    assert federation.external.sites == ("tcga-e2",)
    assert set(np.unique(federation.train.labels)) == {0, 1, 2, 3, 4, 255}
    assert federation.mpp == 0.25


# --- MoNuSeg


def test_real_monuseg_is_the_published_masks_without_their_rim():
    """Those masks count pixels whose centre lies on or just outside the outline."""
    data = monuseg.read_monuseg(real("01_monuseg_tcga"))
    assert {region.site for region in data.regions} == {"tcga-b0"}
    for region in data.regions:
        image, labels = region.load()
        assert image.shape == (1000, 1000, 3)
        folder = REAL / "01_monuseg_tcga"
        filled = read_mask(folder / "masks_binary_LA" / f"{region.name}.png") > 0
        instances = read_mask(folder / "masks_instance16" / f"{region.name}.png") > 0
        nuclei = labels == 1
        assert (nuclei & filled).sum() > 0.99 * nuclei.sum()
        assert (
            ndimage.binary_dilation(nuclei, np.ones((3, 3))) & filled
        ).sum() > 0.99 * filled.sum()
        assert nuclei.sum() == pytest.approx(instances.sum(), rel=0.001)


def test_monuseg_as_published(tmp_path):
    vertices = "".join(
        f'<Vertex X="{x}" Y="{y}"/>' for x, y in ((5, 5), (15, 5), (15, 20), (5, 20))
    )
    region = f'<Region Id="1"><Vertices>{vertices}</Vertices></Region>'
    layer = f'<Annotation Name="" LineColor="65535"><Regions>{region}</Regions></Annotation>'
    name = "TCGA-18-5592-01Z-00-DX1"
    save(picture(30, 40), tmp_path, "Tissue Images", f"{name}.tif")
    save(picture(30, 40), tmp_path, "Tissue Images", "TCGA-18-0000-01Z-00-DX1.tif")
    drawn = tmp_path / "Annotations" / f"{name}.xml"
    drawn.parent.mkdir()
    drawn.write_text(f"<Annotations>{layer}</Annotations>")
    without, found = monuseg.read_monuseg(tmp_path).regions
    with pytest.raises(ValueError, match="Cannot read"):
        without.load()
    _, labels = found.load()
    assert (labels[5:20, 5:15] == 1).all()
    assert labels.sum() == 150


# --- GlaS


def test_real_glas_knows_its_patients():
    data = glas.read_glas(real("02_glas_uhcw"))
    assert len(data.regions) >= 20
    patients = {region.name: region.patient for region in data.regions}
    assert patients["testA_4"] == "9"
    assert all(patients.values())
    for region in data.regions[:4]:
        image, labels = region.load()
        assert image.shape[:2] == labels.shape
        binary = read_mask(REAL / "02_glas_uhcw" / "masks_binary" / f"{region.name}.png")
        assert (labels == (binary > 0)).all()


def test_glas_as_published(tmp_path):
    save(picture(30, 40), tmp_path, "train_1.bmp")
    mask = np.zeros((30, 40), np.uint8)
    mask[3:9, 4:8], mask[20:25, 30:33] = 1, 2
    save(mask, tmp_path, "train_1_anno.bmp")
    (tmp_path / "Grade.csv").write_text("name, patient ID, grade (GlaS)\ntrain_1, 3, benign\n")
    (region,) = glas.read_glas(tmp_path).regions
    assert region.patient == "3"
    _, labels = region.load()
    assert (labels == (mask > 0)).all()


def test_masks_that_do_not_fit_their_images(tmp_path):
    for number, shape in ((1, (30, 41)), (2, (30, 40))):
        save(picture(30, 40), tmp_path, f"train_{number}.bmp")
        save(np.zeros(shape, np.uint8), tmp_path, f"train_{number}_anno.bmp")
    (tmp_path / "train_2.bmp").write_bytes(b"BM damaged")
    save(picture(30, 40), tmp_path, "train_3.bmp")
    errors = write_manifest(glas.read_glas(tmp_path), tmp_path / "out")
    assert [error.partition(":")[0] for error in errors] == ["train_1", "train_2", "train_3"]
    assert "of the image's size" in errors[0]


# --- CoNSeP


def test_real_consep_patches_are_put_together():
    data = consep.read_consep(real("06_consep_uhcw_patches"))
    image, labels = data.regions[0].load()
    assert image.shape == (1000, 1000, 3)
    assert (labels != 255).mean() > 0.5
    assert 0.02 < (labels == 1).mean() < 0.6


def write_patches(root, image, mask, names=range(16)):
    for number in names:
        y, x = consep.corners()[number]
        box = np.s_[y : y + 256, x : x + 256]
        save(image[box], root, "images", f"train_7_{number:03d}.png")
        save(mask[box], root, "seg_mask", f"train_7_{number:03d}.png")


def test_patches_come_out_once_and_whole(tmp_path):
    image = picture(1000, 1000)
    mask = (picture(1000, 1000, 1)[..., 0] > 128).astype(np.uint8)
    write_patches(tmp_path, image, mask)
    (region,) = consep.read_consep(tmp_path).regions
    found, labels = region.load()
    assert (found == image).all()
    assert (labels == mask).all()
    assert (region.split, region.patient) == ("train", "")


def test_missing_patches_are_ignored_pixels(tmp_path):
    mask = np.ones((1000, 1000), np.uint8)
    write_patches(tmp_path, picture(1000, 1000), mask, range(9))
    (region,) = consep.read_consep(tmp_path).regions
    _, labels = region.load()
    assert (labels[:768, :768] == 1).all()
    assert (labels[768:] == 255).all()


def test_patches_of_another_order_are_noticed(tmp_path):
    mask = (picture(1000, 1000, 1)[..., 0] > 128).astype(np.uint8)
    write_patches(tmp_path, picture(1000, 1000), mask)
    first, last = (tmp_path / "seg_mask" / f"train_7_{n:03d}.png" for n in (0, 15))
    first_bytes = first.read_bytes()
    first.write_bytes(last.read_bytes())
    last.write_bytes(first_bytes)
    (region,) = consep.read_consep(tmp_path).regions
    with pytest.raises(LayoutError, match="disagree"):
        region.load()


def test_consep_as_published(tmp_path):
    instances = np.zeros((50, 60), np.float64)
    instances[5:9, 6:12] = 3
    save(picture(50, 60), tmp_path, "Train", "Images", "train_1.png")
    (tmp_path / "Train" / "Labels").mkdir()
    scipy.io.savemat(tmp_path / "Train" / "Labels" / "train_1.mat", {"inst_map": instances})
    save(picture(50, 60), tmp_path, "Test", "Images", "test_1.png")
    data = consep.read_consep(tmp_path)
    assert [region.split for region in data.regions] == ["train", "test"]
    _, labels = data.regions[0].load()
    assert labels.sum() == 24
    with pytest.raises(LayoutError, match="inst_map"):
        data.regions[1].load()


def test_by_command(tmp_path):
    write_bcss(tmp_path / "source")
    words = [sys.executable, "-W", "error", "-m", "experiments.import_dataset", "--layout=bcss"]
    words += [f"--source={tmp_path / 'source'}", f"--output={tmp_path / 'out'}"]
    root = pathlib.Path(__file__).parents[3]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 images in" in done.stdout
    again = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "empty folder" in again.stderr


@pytest.mark.parametrize(
    "read", [bcss.read_bcss, monuseg.read_monuseg, glas.read_glas, consep.read_consep]
)
def test_other_folders_are_told(read, tmp_path):
    with pytest.raises(LayoutError, match="Expected"):
        read(tmp_path)
