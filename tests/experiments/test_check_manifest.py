"""The check by command line: rows, table, pictures, exit code."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from experiments.check_manifest import check
from fedjax_dp.reporting.contact_sheet import middle, object_diameters


def _disc(mask, y, x, diameter, value):
    rows, columns = np.ogrid[: mask.shape[0], : mask.shape[1]]
    mask[(rows - y) ** 2 + (columns - x) ** 2 < (diameter / 2) ** 2] = value


@pytest.fixture
def manifest(tmp_path):
    """Two sites of 96 x 120 pixels with discs of 20 pixels; the second has no resolution."""
    lines = ["image,mask,site,patient,split,mpp"]
    for i, (site, split) in enumerate(
        [("north", "train"), ("north", "validation"), ("south/2", "train"), ("south/2", "test")]
    ):
        rng = np.random.default_rng(i)
        Image.fromarray(rng.integers(0, 256, (96, 120, 3), np.uint8)).save(tmp_path / f"{i}.png")
        mask = np.zeros((96, 120), np.uint8)
        for j in range(3):
            _disc(mask, 20 + 25 * j, 30 + 10 * i, 20, 1)
        Image.fromarray(mask).save(tmp_path / f"{i}_mask.png")
        mpp = ".25" if site == "north" else ""
        patient = f"p{i}" if site == "north" else ""
        lines.append(f"{i}.png,{i}_mask.png,{site},{patient},{split},{mpp}")
    path = tmp_path / "m.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_good_manifest(manifest, tmp_path, capsys):
    assert check(manifest, tmp_path / "out", tile_size=64) == 0
    printed = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert "north 2 2 1 1 - - - 0.25 0.079 4.9 µm" in lines
    assert "south/2 2 unknown 1 - 1 - - - 0.079 19.7 px" in lines
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "00_north.png",
        "01_south_2.png",
    ]
    for path in (tmp_path / "out").iterdir():
        pixels = np.asarray(Image.open(path))
        assert pixels.shape[1] == 1400
        assert pixels[..., :3].std() > 20


def test_a_wrong_resolution_is_pointed_out(manifest, capsys):
    manifest.write_text(manifest.read_text().replace(".25", "1.0"))
    assert check(manifest) == 0
    assert "look: the nuclei of north measure 19.7 µm" in capsys.readouterr().out
    assert check(manifest, class_names=("background", "gland")) == 0
    assert "look:" not in capsys.readouterr().out


def test_errors_are_printed_with_their_rows_and_the_rest_is_shown(manifest, tmp_path, capsys):
    (tmp_path / "2.png").unlink()
    assert check(manifest, tmp_path / "out", tile_size=64) == 1
    printed = capsys.readouterr().out
    assert "error: row 4: image: Cannot open" in printed
    assert "4 images, 1 error, 1 warning." in printed
    assert (tmp_path / "out" / "01_south_2.png").exists()


def test_no_manifest(tmp_path, capsys):
    assert check(tmp_path / "none.csv") == 1
    assert "Cannot open" in capsys.readouterr().out


def test_the_module_exits_with_one_on_errors(manifest, tmp_path):
    command = [sys.executable, "-m", "experiments.check_manifest", f"--manifest={manifest}"]
    good = subprocess.run(
        [*command, "--output=", "--class_names=background,cell"], capture_output=True, text=True
    )
    assert good.returncode == 0, good.stderr
    (tmp_path / "0_mask.png").unlink()
    bad = subprocess.run([*command, "--output="], capture_output=True, text=True)
    assert bad.returncode == 1, bad.stderr
    assert "error: row 2: mask: Cannot open" in bad.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("diameter", [8, 20, 33])
@pytest.mark.parametrize("is_instance", [False, True])
def test_diameters_of_discs(diameter, is_instance):
    mask = np.zeros((100, 220), np.uint16)
    for i in range(4):
        _disc(mask, 50, 30 + 50 * i, diameter, 300 + i if is_instance else 1 + i % 2)
    got = object_diameters(mask, is_instance=is_instance)
    assert len(got) == 4
    np.testing.assert_allclose(got, diameter, atol=0.5)  # a pixel at the rim


def test_cut_off_objects_and_specks_have_no_diameter():
    mask = np.zeros((60, 60), np.uint8)
    _disc(mask, 0, 30, 20, 1)
    _disc(mask, 30, 59, 20, 2)
    mask[30, 30] = 1
    mask[40:, 20:30] = 255
    assert len(object_diameters(mask, is_instance=False)) == 0
    assert len(object_diameters(np.zeros((5, 5), np.uint8), is_instance=False)) == 0


def test_touching_instances_are_counted_apart():
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 10:20] = 1
    mask[10:20, 20:30] = 2
    assert len(object_diameters(mask, is_instance=True)) == 2
    assert len(object_diameters((mask > 0).astype(np.uint8), is_instance=False)) == 1


def test_middle_is_a_copy_of_the_middle():
    labels = np.arange(500 * 30).reshape(500, 30).astype(np.uint8)
    image = np.repeat(labels[..., None], 3, axis=2)
    part, part_labels = middle(image, labels)
    assert part.shape == (384, 30, 3)
    np.testing.assert_array_equal(part_labels, labels[58:442])
    assert part_labels.base is None  # a view would keep the whole image in memory
