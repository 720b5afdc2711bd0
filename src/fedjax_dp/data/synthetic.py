"""A federation of hospitals whose tissue is drawn by the program: public, exact, endless.

Shaped by general knowledge of H&E (sizes of nuclei, stain vectors near those of Macenko et al.,
ISBI 2009), not fitted to any image: nothing about a patient can be in it.
"""

import numpy as np

from fedjax_dp.data import sources
from fedjax_dp.data.federation import Federation
from fedjax_dp.data.synthetic_style import EXTERNAL_SITES, TRAINING_SITES
from fedjax_dp.data.synthetic_tile import (
    CLASS_NAMES,
    SITE_NAMES,
    Task,
    TileId,
    TileSpec,
    Variation,
)
from fedjax_dp.data.synthetic_workers import Progress, draw_tiles
from fedjax_dp.data.tiles import TileTable, blank_tiles

# Patients of the splits are numbered apart, so the size of one split moves nobody in another.
_FIRST_PATIENT = {"train": 0, "validation": 100_000, "test": 200_000, "external": 0}
_STREAM_SITE = 1_000  # no hospital: the tiles of `wide_tiles`


def synthetic_federation(
    *,
    seed: int = 0,
    task: Task = "nuclei",
    patients_per_site: int = 200,
    tiles_per_patient: int = 4,
    tile_size: int = 128,
    evaluation_patients_per_site: int = 10,
    num_external_sites: int = 2,
    num_training_sites: int = 5,
    mpp: float = 0.5,
    variation: Variation = "sites",
    num_workers: int | None = None,
    progress: Progress | None = None,
    with_pixels: bool = True,
) -> Federation:
    """Draws H&E-like tiles of several hospitals, with exact masks.

    Guarantees: the same arguments give the same tiles on the same machine, whatever `num_workers`.
    A tile depends only on (seed, variation, site, patient, its number, tile size, mpp), not on how
    many patients, tiles or sites there are: one patient's absence moves nobody else. Both tasks
    label the same images. Masks are the drawn outlines, before blur.

    Args:
        seed: any non-negative integer.
        task: "nuclei" (background, nucleus) or "tissue" (background, stroma, epithelium,
            lymphocytes, necrosis).
        patients_per_site: training patients of each training site.
        tiles_per_patient: tiles of each patient, all of one slide.
        tile_size: side in pixels, 16..512. A smaller tile shows less tissue, not smaller nuclei.
        evaluation_patients_per_site: validation patients, and as many test patients, of each
            training site; also the patients of each external site.
        num_external_sites: hospitals that never train, 0..4.
        num_training_sites: 1..5.
        mpp: microns per pixel, 0.1..2. Nuclei measure 6-12 microns: 12-24 pixels at 0.5 (20x),
            24-48 at 0.25 (40x). 128 pixels at 0.5 show 64 microns of tissue.
            Choose 0.25 for a network that is to go on with images taken at 40x.
        variation: "sites" gives each site and patient a look of its own; "wide" draws stain, optics
            and nuclei anew for every tile, from far wider ranges, for pretraining.
        num_workers: processes; None for as many as there are cores.
        progress: called with (tiles drawn, tiles in all) now and then.
        with_pixels: False draws nothing: the tables tell whose each tile is, and have 0 x 0 pixels.

    Returns:
        A public federation; tiles do not overlap; patients are distinct between sites and splits.

    Raises:
        ValueError: if an argument is out of range.
    """
    spec = TileSpec(seed=seed, task=task, tile_size=tile_size, mpp=mpp, variation=variation)
    for name, value, low, high in (
        ("patients_per_site", patients_per_site, 1, 100_000),
        ("tiles_per_patient", tiles_per_patient, 1, 1_000_000),
        ("evaluation_patients_per_site", evaluation_patients_per_site, 0, 100_000),
        ("num_external_sites", num_external_sites, 0, len(EXTERNAL_SITES)),
        ("num_training_sites", num_training_sites, 1, len(TRAINING_SITES)),
    ):
        if not low <= value <= high:
            raise ValueError(f"Expected {low} <= {name} <= {high}, got {value}.")
    training = SITE_NAMES[:num_training_sites]
    external = SITE_NAMES[len(TRAINING_SITES) :][:num_external_sites]
    plan = {
        "train": (training, patients_per_site),
        "validation": (training, evaluation_patients_per_site),
        "test": (training, evaluation_patients_per_site),
        "external": (external, evaluation_patients_per_site),
    }
    tile_ids = [
        TileId(SITE_NAMES.index(site), _FIRST_PATIENT[split] + patient, tile)
        for split, (sites, count) in plan.items()
        for site in sites
        for patient in range(count)
        for tile in range(tiles_per_patient)
    ]
    images, labels = blank_tiles(len(tile_ids))
    if with_pixels:
        images, labels = draw_tiles(spec, tile_ids, num_workers=num_workers, progress=progress)
    tables: dict[str, TileTable] = {}
    start = 0
    for split, (sites, count) in plan.items():
        stop = start + len(sites) * count * tiles_per_patient
        first = _FIRST_PATIENT[split]
        tables[split] = _table(sites, first, count, images[start:stop], labels[start:stop])
        start = stop
    name = f"synthetic {task}" + (" (wide variation)" if variation == "wide" else "")
    return Federation(
        name=name,
        class_names=CLASS_NAMES[task],
        train=tables["train"],
        validation=tables["validation"],
        test=tables["test"],
        external=tables["external"],
        mpp=mpp,
        is_public=True,
        # Both tasks label the same images, and a smaller draw is part of a larger one.
        sources=sources.from_generator(training, "synthetic", seed, variation, mpp, tile_size),
    )


def _table(
    sites: tuple[str, ...], first: int, count: int, images: np.ndarray, labels: np.ndarray
) -> TileTable:
    """The tiles of one split: of each site `count` patients, numbered from `first`."""
    patients = tuple(f"{site}-{first + number:06d}" for site in sites for number in range(count))
    tiles_per_patient = len(labels) // max(len(patients), 1)
    patient = np.repeat(np.arange(len(patients), dtype=np.int32), tiles_per_patient)
    return TileTable(
        images=images,
        labels=labels,
        site=np.repeat(np.arange(len(sites), dtype=np.int32), count * tiles_per_patient),
        slide=patient.copy(),
        patient=patient,
        sites=tuple(sites),
        slides=tuple(f"{patient}-slide" for patient in patients),
        patients=patients,
    )


def wide_tiles(
    num_tiles: int,
    *,
    seed: int = 0,
    first: int = 0,
    task: Task = "nuclei",
    tile_size: int = 128,
    mpp: float = 0.25,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """An endless stream of tiles that share no look: for a start that costs no privacy.

    Args:
        num_tiles: how many.
        seed: any non-negative integer.
        first: number of the first tile; the stream is the same however it is cut.
        task: as in `synthetic_federation`.
        tile_size: side in pixels, 16..512.
        mpp: microns per pixel; 0.25 is 40x.
        num_workers: processes; None for as many as there are cores.
        progress: called with (tiles drawn, tiles in all) now and then.

    Returns:
        images uint8 [num_tiles, H, W, 3] and labels uint8 [num_tiles, H, W].

    Raises:
        ValueError: if an argument is out of range.
    """
    if num_tiles < 0 or first < 0:
        raise ValueError(f"Expected num_tiles >= 0 and first >= 0, got {num_tiles=}, {first=}.")
    spec = TileSpec(seed=seed, task=task, tile_size=tile_size, mpp=mpp, variation="wide")
    tile_ids = [TileId(_STREAM_SITE, 0, number) for number in range(first, first + num_tiles)]
    return draw_tiles(spec, tile_ids, num_workers=num_workers, progress=progress)
