"""The drawn federation: reproducible, independent tile by tile, exact masks, unlike sites."""

import numpy as np
import pytest
from scipy import ndimage

from fedjax_dp.data.synthetic import synthetic_federation, wide_tiles
from fedjax_dp.data.synthetic_nuclei import epithelial
from fedjax_dp.data.synthetic_paint import paint
from fedjax_dp.data.synthetic_style import Style
from fedjax_dp.data.synthetic_texture import Grid
from fedjax_dp.data.synthetic_tile import TileId, TileSpec
from fedjax_dp.data.synthetic_workers import draw_tiles

SMALL = {
    "patients_per_site": 2,
    "tiles_per_patient": 2,
    "tile_size": 48,
    "evaluation_patients_per_site": 1,
    "num_external_sites": 1,
    "num_training_sites": 2,
    "num_workers": 1,
}
SPLITS = ("train", "validation", "test", "external")


@pytest.fixture(scope="module")
def federation():
    return synthetic_federation(
        patients_per_site=10, tiles_per_patient=2, evaluation_patients_per_site=3, num_workers=1
    )


def tiles_by_name(federation):
    """(patient's name, number of the tile) -> image and label."""
    found = {}
    for split in SPLITS:
        table = getattr(federation, split)
        for index, patient in enumerate(table.patient):
            name = table.patients[patient]
            number = sum(key[0] == name for key in found)
            found[name, number] = table.images[index], table.labels[index]
    return found


def optical_density(images):
    return -np.log(np.maximum(images.astype(np.float64), 1) / 255)


def red_contrast(images, inside):
    """How much more red light nuclei absorb than the rest: hematoxylin takes red, eosin hardly."""
    red = optical_density(images)[..., 0]
    return red[inside].mean() - red[~inside].mean()


def test_same_seed_same_tiles_and_another_seed_others():
    first, again = (synthetic_federation(seed=3, **SMALL) for _ in range(2))
    other = synthetic_federation(seed=4, **SMALL)
    for split in SPLITS:
        np.testing.assert_array_equal(getattr(first, split).images, getattr(again, split).images)
        np.testing.assert_array_equal(getattr(first, split).labels, getattr(again, split).labels)
    same = (first.train.images == other.train.images).all((1, 2, 3))
    assert not same.any()


@pytest.mark.parametrize("variation", ["sites", "wide"])
def test_no_two_tiles_are_alike(variation):
    # With "wide" no site has a style of its own: only the random stream tells sites apart.
    federation = synthetic_federation(**SMALL, variation=variation)
    images = np.concatenate([getattr(federation, split).images for split in SPLITS])
    assert len({image.tobytes() for image in images}) == len(images)


def test_a_tile_does_not_depend_on_what_else_is_drawn():
    many = tiles_by_name(synthetic_federation(**SMALL))
    few = {**SMALL, "patients_per_site": 1, "tiles_per_patient": 1, "num_training_sites": 1}
    alone = tiles_by_name(synthetic_federation(**{**few, "num_external_sites": 0}))
    assert len(alone) == 3
    for name, (image, label) in alone.items():
        np.testing.assert_array_equal(image, many[name][0])
        np.testing.assert_array_equal(label, many[name][1])


def test_processes_change_nothing():
    in_process = synthetic_federation(**SMALL)
    in_two = synthetic_federation(**{**SMALL, "num_workers": 2})
    for split in SPLITS:
        one, two = getattr(in_process, split), getattr(in_two, split)
        np.testing.assert_array_equal(one.images, two.images)
        np.testing.assert_array_equal(one.labels, two.labels)


def test_a_failing_worker_is_an_error(capfd):
    spec = TileSpec(seed=0, task="nuclei", tile_size=32, mpp=0.5, variation="sites")
    nowhere = [TileId(10_000, 0, 0)] * 2
    with pytest.raises(RuntimeError, match="num_workers=1"):
        draw_tiles(spec, nowhere, num_workers=2)
    assert "IndexError" in capfd.readouterr().err


@pytest.mark.parametrize("num_workers", [1, 2])
def test_progress_reaches_the_end(num_workers):
    seen = []
    synthetic_federation(
        **{**SMALL, "num_workers": num_workers}, progress=lambda *counts: seen.append(counts)
    )
    assert seen[-1] == (18, 18)
    assert seen == sorted(seen)


def test_patients_are_distinct_between_sites_and_splits(federation):
    names = [name for split in SPLITS for name in getattr(federation, split).patients]
    assert len(names) == len(set(names)) == 5 * (10 + 3 + 3) + 2 * 3
    for split in SPLITS:
        table = getattr(federation, split)
        assert len({(p, s) for p, s in zip(table.patient, table.site, strict=True)}) == len(
            table.patients
        )
        assert (np.bincount(table.patient) == 2).all()
        for index in range(len(table)):
            site = table.sites[table.site[index]]
            assert table.patients[table.patient[index]].startswith(site + "-")
            assert table.slides[table.slide[index]].startswith(site + "-")
    assert not set(federation.train.sites) & set(federation.external.sites)
    assert federation.is_public
    assert not federation.tiles_overlap


def test_without_evaluation_patients_the_other_splits_are_empty():
    federation = synthetic_federation(**{**SMALL, "evaluation_patients_per_site": 0})
    assert len(federation.train) == 8
    assert [len(getattr(federation, split)) for split in SPLITS[1:]] == [0, 0, 0]


@pytest.mark.parametrize("variation", ["sites", "wide"])
def test_both_tasks_label_the_same_images(variation):
    nuclei = synthetic_federation(**SMALL, task="nuclei", variation=variation)
    tissue = synthetic_federation(**SMALL, task="tissue", variation=variation)
    np.testing.assert_array_equal(nuclei.train.images, tissue.train.images)
    # A nucleus is never in glass or lumen.
    assert (tissue.train.labels[nuclei.train.labels == 1] > 0).all()


def test_labels_are_in_the_table_and_plausible(federation):
    assert federation.class_names == ("background", "nucleus")
    assert set(np.unique(federation.train.labels)) == {0, 1}
    fractions = federation.train.labels.mean((1, 2))
    assert 0.12 < fractions.mean() < 0.40
    assert fractions.max() < 0.75
    for site in federation.train.sites:
        assert 0.08 < fractions[federation.train.of_site(site)].mean() < 0.5


def test_every_tissue_class_occurs_and_none_rules():
    federation = synthetic_federation(
        task="tissue", patients_per_site=20, tiles_per_patient=1, tile_size=64, mpp=1.0,
        evaluation_patients_per_site=0, num_external_sites=0, num_workers=1,
    )  # fmt: skip
    counts = (
        np.bincount(federation.train.labels.ravel(), minlength=5) / federation.train.labels.size
    )
    assert len(counts) == len(federation.class_names) == 5
    assert (counts > 0.01).all(), counts
    assert counts.max() < 0.7, counts


def test_nuclei_absorb_more_red_than_their_surroundings(federation):
    contrasts = [
        red_contrast(image, label == 1)
        for image, label in zip(federation.train.images, federation.train.labels, strict=True)
        if label.mean() > 0.03
    ]
    assert len(contrasts) > 80
    assert np.mean(contrasts) > 0.3
    assert np.mean(np.asarray(contrasts) > 0.1) > 0.95


def test_masks_lie_exactly_on_the_nuclei(federation):
    """A mask moved by one pixel fits worse, in every direction: there is no offset."""
    images, inside = federation.train.images, federation.train.labels == 1
    exact = red_contrast(images, inside)
    for axis in (1, 2):
        for step in (-1, 1):
            assert red_contrast(images, np.roll(inside, step, axis)) < 0.985 * exact


@pytest.mark.parametrize("mpp", [0.25, 0.5])
def test_outlines_have_the_stated_size_at_any_scale(mpp):
    rng = np.random.default_rng(0)
    grid = Grid(round(320 / mpp), mpp)
    style = Style(diameter_um=9.0, pleomorphism=0.0)
    lattice = np.arange(-140, 141, 28.0)
    centres = np.stack(np.meshgrid(lattice, lattice, indexing="ij"), -1).reshape(-1, 2)
    density = np.zeros((grid.size, grid.size), np.float32)
    owner = paint(rng, grid, epithelial(rng, style, centres, 2), 0.0, density, density.copy())
    areas = np.bincount(owner[owner >= 0], minlength=len(centres)) * mpp**2
    # No spread of diameters: the mean area is the circle's, but for the wobble of the outline.
    assert areas.mean() == pytest.approx(np.pi * 4.5**2, rel=0.05)
    assert (areas > 0).all()
    # Each lies on its own centre.
    rows, columns = np.nonzero(owner == 0)
    middle = (np.array([rows.mean(), columns.mean()]) - (grid.size - 1) / 2) * mpp
    np.testing.assert_allclose(middle, centres[0], atol=0.6)


def test_twice_the_resolution_shows_a_quarter_of_the_nuclei():
    def nuclei_per_tile(mpp):
        table = synthetic_federation(
            patients_per_site=12,
            tiles_per_patient=1,
            evaluation_patients_per_site=0,
            num_external_sites=0,
            mpp=mpp,
            num_workers=1,
        ).train
        return np.mean([ndimage.label(label)[1] for label in table.labels])

    # More than a quarter: the tile's border cuts relatively more of them.
    assert 0.2 < nuclei_per_tile(0.25) / nuclei_per_tile(0.5) < 0.55


def site_and_patient_spread(table):
    """Standard deviation of mean colours: between sites, and between patients of one site."""
    tiles = optical_density(table.images).mean((1, 2))
    patients = np.stack([tiles[table.patient == p].mean(0) for p in range(len(table.patients))])
    site = np.array([table.site[table.patient == p][0] for p in range(len(table.patients))])
    means = np.stack([patients[site == s].mean(0) for s in range(len(table.sites))])
    within = np.sqrt(np.mean((patients - means[site]) ** 2))
    return means.std(0).mean(), within


def test_sites_differ_more_than_their_patients(federation):
    between, within = site_and_patient_spread(federation.train)
    assert between > within > 0
    # Chance alone: patients dealt to sites at random.
    shuffled = np.random.default_rng(0).permutation(len(federation.train.patients))
    table = federation.train
    dealt = type(table)(**{**vars(table), "site": (shuffled[table.patient] % 5).astype(np.int32)})
    between, within = site_and_patient_spread(dealt)
    assert between < within


def test_wide_variation_is_wider_than_that_of_the_sites(federation):
    images, labels = wide_tiles(100, mpp=0.5, num_workers=1)
    sites = optical_density(federation.train.images).mean((1, 2))
    wide = optical_density(images).mean((1, 2))
    hue = lambda colour: colour / np.linalg.norm(colour, axis=1, keepdims=True)  # noqa: E731
    assert (hue(wide).std(0) > 0.9 * hue(sites).std(0)).all()
    assert hue(wide).std(0).prod() > 1.4 * hue(sites).std(0).prod()
    assert 0.1 < labels.mean() < 0.45


def test_a_patient_has_one_look_unless_the_variation_is_wide():
    def hue_spread(variation):
        table = synthetic_federation(
            patients_per_site=4, tiles_per_patient=6, evaluation_patients_per_site=0,
            num_external_sites=0, num_training_sites=2, variation=variation, num_workers=1,
        ).train  # fmt: skip
        colour = optical_density(table.images).mean((1, 2))
        hue = colour / np.linalg.norm(colour, axis=1, keepdims=True)
        return np.mean([hue[table.patient == p].std(0).mean() for p in range(8)])

    assert hue_spread("wide") > 1.5 * hue_spread("sites")


def test_the_stream_is_the_same_however_it_is_cut():
    images, labels = wide_tiles(6, tile_size=32, num_workers=1)
    tail_images, tail_labels = wide_tiles(2, first=4, tile_size=32, num_workers=1)
    np.testing.assert_array_equal(tail_images, images[4:])
    np.testing.assert_array_equal(tail_labels, labels[4:])


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("seed", -1),
        ("task", "glands"),
        ("variation", "none"),
        ("patients_per_site", 0),
        ("tiles_per_patient", 0),
        ("tile_size", 8),
        ("evaluation_patients_per_site", -1),
        ("num_external_sites", 5),
        ("num_training_sites", 6),
        ("mpp", 5.0),
        ("num_workers", 0),
    ],
)
def test_errors_name_the_argument_and_show_the_value(argument, value):
    with pytest.raises(ValueError, match=rf"{argument}.*{value}"):
        synthetic_federation(**{**SMALL, argument: value})


@pytest.mark.parametrize("tile_size", [16, 17, 33, 128])
@pytest.mark.parametrize("mpp", [0.1, 2.0])
def test_any_allowed_size_and_scale_can_be_drawn(tile_size, mpp):
    images, labels = wide_tiles(3, tile_size=tile_size, mpp=mpp, num_workers=1)
    assert images.shape == (3, tile_size, tile_size, 3)
    assert labels.shape == (3, tile_size, tile_size)
