"""The picture of a prepared slide: it shows the slide, its tissue and its tiles."""

import numpy as np
import pytest
from PIL import Image

from fedjax_dp.data.slides import open_slide
from fedjax_dp.data.tissue import TissueMask, everywhere, tissue_mask
from fedjax_dp.reporting.slide_overview import save_overview
from tests.slide_files import write_generic
from tests.test_preparation import tissue_picture


@pytest.fixture
def slide(tmp_path):
    with open_slide(write_generic(tmp_path / "a.tif", tissue_picture(), levels=2)) as opened:
        yield opened


def drawn(slide, tissue, path, **settings):
    tiles = [(128.0 + 64 * i, 96.0) for i in range(4)]
    plain = {"tiles_xy": tiles, "tile_size": (64.0, 64.0), "title": "0123"}
    save_overview(path, slide, tissue, **{**plain, **settings})
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def near(picture, colour):
    return (np.abs(picture - np.array(colour)).max(-1) < 60).sum()


def test_tiles_and_tissue_are_drawn(slide, tmp_path):
    tissue = tissue_mask(slide)
    whole = drawn(slide, tissue, tmp_path / "o.png")
    assert whole.shape[1] >= 600
    bare = drawn(slide, everywhere(slide), tmp_path / "b.png", tiles_xy=[])
    blue, green = (0, 114, 178), (0, 158, 115)
    assert near(whole, blue) > near(bare, blue) + 200
    assert near(whole, green) > near(bare, green) + 200


def test_a_large_slide_becomes_a_small_picture(slide, tmp_path):
    assert drawn(slide, tissue_mask(slide), tmp_path / "o.png", max_side=100).shape[1] <= 700


@pytest.mark.parametrize("mask", [np.zeros((4, 5), bool), np.array([[True, False, True]])])
def test_masks_without_an_outline(slide, mask, tmp_path):
    tissue = TissueMask(mask, (640 / mask.shape[1], 512 / mask.shape[0]), "painted")
    assert drawn(slide, tissue, tmp_path / "o.png", tiles_xy=[]).size
