"""Tissue: what is stained stays; glass, ink, black fill and edges go, by rules of the place."""

import numpy as np
import pytest
import shapely

from fedjax_dp.data.slides import open_slide
from fedjax_dp.data.tissue import (
    TissueMask,
    everywhere,
    is_local,
    tissue_from_outlines,
    tissue_mask,
)
from tests.slide_files import write_generic

SIDE = 400  # pixels of 8 micrometres
GLASS = (243, 241, 244)
EOSIN, HAEMATOXYLIN = (226, 160, 190), (120, 80, 150)


def slide_of(image, folder):
    path = folder / "a.tif"
    write_generic(path, image, levels=1, resolution=(1e4 / 8, 1e4 / 8), compression="zlib")
    return open_slide(path)


def glass(seed=0, colour=GLASS, noise=2.0):
    rng = np.random.default_rng(seed)
    return np.clip(np.array(colour) + rng.normal(0, noise, (SIDE, SIDE, 3)), 0, 255).astype(
        np.uint8
    )


def with_patch(image, colour, where, noise=8.0, seed=1):
    rng = np.random.default_rng(seed)
    shape = image[where].shape
    image = image.copy()
    image[where] = np.clip(np.array(colour) + rng.normal(0, noise, shape), 0, 255)
    return image


MIDDLE = np.s_[100:300, 100:300]


def found(image, folder, **settings):
    with slide_of(image, folder) as slide:
        return tissue_mask(slide, **settings).mask


@pytest.mark.parametrize("colour", [GLASS, (255, 255, 255), (236, 232, 240), (228, 230, 222)])
def test_blank_glass_is_no_tissue(colour, tmp_path):
    assert found(glass(colour=colour), tmp_path).mean() < 0.001


def test_otsu_calls_tinted_blank_glass_tissue(tmp_path):
    """Its known weakness, clamped as it is: it always finds two kinds of pixels."""
    assert found(glass(), tmp_path, method="otsu").mean() < 0.001
    assert found(glass(colour=(236, 232, 240)), tmp_path, method="otsu").mean() > 0.5


@pytest.mark.parametrize("colour", [EOSIN, HAEMATOXYLIN, (238, 205, 220), (90, 60, 120)])
def test_stained_tissue_is_found(colour, tmp_path):
    mask = found(with_patch(glass(), colour, MIDDLE), tmp_path)
    assert mask[MIDDLE].mean() > 0.98
    mask[95:305, 95:305] = False
    assert not mask.any()


@pytest.mark.parametrize("ink", [(20, 40, 160), (30, 140, 60), (15, 15, 18), (10, 120, 150)])
def test_pen_marks_are_no_tissue(ink, tmp_path):
    image = with_patch(glass(), EOSIN, MIDDLE)
    image = with_patch(image, ink, np.s_[20:60, 20:380], noise=3.0)
    mask = found(image, tmp_path)
    assert not mask[:90].any()
    assert mask[MIDDLE].mean() > 0.97


def test_a_dot_of_ink_within_tissue_is_no_tissue(tmp_path):
    image = with_patch(glass(), EOSIN, MIDDLE)
    image = with_patch(image, (20, 40, 160), np.s_[195:203, 195:203], noise=3.0)
    mask = found(image, tmp_path)
    assert not mask[195:203, 195:203].any()
    assert mask[110:180, 110:290].all()


def test_fat_keeps_its_borders(tmp_path):
    """Empty cells of a fifth of a millimetre, their walls four pixels thick."""
    image = with_patch(glass(), EOSIN, MIDDLE)
    for y in range(104, 296, 24):
        for x in range(104, 296, 24):
            image[y : y + 20, x : x + 20] = GLASS
    mask = found(image, tmp_path)
    assert 0.2 < mask[MIDDLE].mean() < 0.6
    assert mask[124:128, 104:296].mean() > 0.9


def test_black_fill_is_no_tissue(tmp_path):
    image = with_patch(glass(), EOSIN, MIDDLE)
    image[:, 330:] = 0
    mask = found(image, tmp_path)
    assert not mask[:, 315:].any()
    assert mask[MIDDLE].mean() > 0.98


def test_a_coverslips_edge_is_no_tissue(tmp_path):
    image = with_patch(glass(), EOSIN, MIDDLE)
    image[:, 40:43] = (120, 122, 125)
    image[350:352] = (90, 92, 100)
    mask = found(image, tmp_path)
    assert not mask[:, :90].any()
    assert not mask[320:].any()


def test_specks_go_and_small_holes_are_filled(tmp_path):
    image = with_patch(glass(), EOSIN, MIDDLE)
    image = with_patch(image, EOSIN, np.s_[30:38, 30:38])  # 4,096 square micrometres
    image[150:160, 150:160] = GLASS  # 6,400
    image[200:240, 200:240] = GLASS  # 102,400
    mask = found(image, tmp_path)
    assert not mask[:60, :60].any()
    assert mask[150:160, 150:160].all()
    assert not mask[205:235, 205:235].any()


def test_the_default_looks_at_no_other_place(tmp_path):
    """What lies elsewhere on the slide changes nothing here; with Otsu it does."""
    image = with_patch(glass(), (233, 219, 228), MIDDLE)
    stained = with_patch(image, HAEMATOXYLIN, np.s_[320:380, 20:380])
    for method, is_alike in (("saturation", True), ("otsu", False)):
        first, second = (found(i, tmp_path, method=method)[:300] for i in (image, stained))
        assert (first == second).all() == is_alike
        assert is_local(method) == is_alike
    assert not is_local("unheard of")


def test_otsu_is_clamped(tmp_path):
    with slide_of(with_patch(glass(), HAEMATOXYLIN, np.s_[:, 100:]), tmp_path) as slide:
        assert 8 <= tissue_mask(slide, method="otsu").threshold <= 40
    with slide_of(np.full((SIDE, SIDE, 3), 250, np.uint8), tmp_path) as slide:
        assert not tissue_mask(slide, method="otsu").mask.any()
        with pytest.raises(ValueError, match="method"):
            tissue_mask(slide, method="guess")


def test_fractions_are_areas():
    mask = np.zeros((10, 20), bool)
    mask[2:5, 4:8] = True
    tissue = TissueMask(mask, (10.0, 5.0), "painted")
    assert tissue.fraction(40, 10, 40, 15) == 1.0
    assert tissue.fraction(0, 0, 200, 50) == pytest.approx(12 / 200)
    assert tissue.fraction(35, 10, 10, 5) == pytest.approx(0.5)
    assert tissue.fraction(45, 12.5, 1.0, 1.0) == pytest.approx(1.0)
    assert tissue.fraction(-100, -100, 50, 50) == 0.0
    assert tissue.fraction(-40, -10, 80, 20) == 0.0
    with pytest.raises(ValueError, match="area"):
        tissue.fraction(0, 0, 0, 5)
    assert TissueMask(np.ones((3, 3), bool), (1, 1), "").fraction(2, 0, 2, 3) == pytest.approx(0.5)


def test_regions_are_the_mask_at_any_scale():
    mask = np.zeros((10, 20), bool)
    mask[2:5, 4:8] = True
    tissue = TissueMask(mask, (10.0, 5.0), "painted")
    fine = tissue.region(0, 0, 400, 100, (0.5, 0.5))
    assert (fine == np.repeat(np.repeat(mask, 10, 0), 20, 1)).all()
    assert (tissue.region(-20, -10, 24, 14, (10.0, 5.0))[2:12, 2:22] == mask).all()
    assert not tissue.region(-20, -10, 2, 2, (10.0, 5.0)).any()
    for box, expected in (
        ((40, 10, 1, 1), True),
        ((0, 0, 39, 9), False),
        ((-50, -50, 5, 5), False),
    ):
        assert tissue.touches(*box) == expected


def test_outlines_and_everything(tmp_path):
    with slide_of(glass(), tmp_path) as slide:
        outline = shapely.box(100, 50, 200, 150)
        assert tissue_from_outlines(slide, outline).mask.sum() == 100 * 100
        assert everywhere(slide).fraction(3, 4, 50, 60) == 1.0


def test_strips_change_nothing(tmp_path, monkeypatch):
    image = with_patch(glass(), EOSIN, MIDDLE)
    whole = found(image, tmp_path)
    monkeypatch.setattr("fedjax_dp.data.tissue._STRIP_ROWS", 37)
    assert (found(image, tmp_path) == whole).all()
