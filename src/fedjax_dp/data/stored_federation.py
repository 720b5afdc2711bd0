"""A federation from a tile store: sites, patients and splits as it was prepared, pixels on disk."""

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedjax_dp.data import sources
from fedjax_dp.data.federation import Federation
from fedjax_dp.data.splits import EXTERNAL, TEST, TRAIN, VALIDATION
from fedjax_dp.data.store import layout
from fedjax_dp.data.store.layout import SlideRecord, StoreError
from fedjax_dp.data.store.reading import stored_pixels
from fedjax_dp.data.store.sources import read_sources
from fedjax_dp.data.tiles import UNKNOWN_PATIENT, TileTable, blank_tiles
from fedjax_dp.data.tissue import is_local


def federation_from_store(
    path: str | pathlib.Path,
    *,
    tile_size: int,
    train_sites: Sequence[str] = (),
    external_sites: Sequence[str] = (),
    with_pixels: bool = True,
) -> Federation:
    """The federation of a store that `experiments.prepare_tiles` made.

    Guarantees: pixels stay on disk until they are asked for, so memory does not grow with the
    store; only slides whose mark is there are used; a patient belongs to one site and one side of
    training, which preparation has seen to and is checked again.

    Args:
        path: of the store.
        tile_size: pixels; must be the store's.
        train_sites: only these train; empty = as the store says.
        external_sites: only these are external; empty = as the store says.
        with_pixels: False for an outline: whose each tile is, and no more.

    Returns:
        The federation, named after the folder.

    Raises:
        StoreError: (a ValueError) no store, another tile size, an unknown site, no training tile.
    """
    path = pathlib.Path(path)
    recipe = layout.read_recipe(path)
    if recipe.tile_size != tile_size:
        raise StoreError(
            f"Expected data.tile_size={recipe.tile_size}, that of the store {path}, got "
            f"{tile_size}. Set it, or prepare the slides with --tile_size={tile_size}."
        )
    records = [record for record in layout.read_records(path) if record.tiles]
    if stale := [record.slide for record in records if record.recipe != recipe.digest()]:
        raise StoreError(f"Slides {stale} of {path} are of another recipe. Prepare them anew.")
    splits = _splits(records, tuple(train_sites), tuple(external_sites))
    _check_patients(records, splits)
    tables = {
        split: _table(
            path,
            [r for r, s in zip(records, splits, strict=True) if s == split],
            tile_size,
            with_pixels=with_pixels,
        )
        for split in (TRAIN, VALIDATION, TEST, EXTERNAL)
    }
    if not len(tables[TRAIN]):
        raise StoreError(f"Expected training tiles in {path}, got none. See its report.csv.")
    trained = [r for r, s in zip(records, splits, strict=True) if s == TRAIN]
    return Federation(
        name=path.resolve().name,
        class_names=recipe.class_names,
        train=tables[TRAIN],
        validation=tables[VALIDATION],
        test=tables[TEST],
        external=tables[EXTERNAL],
        mpp=recipe.mpp,
        slides_decide=not is_local(recipe.tissue),
        sources=_sources(path, trained),
    )


def _splits(
    records: Sequence[SlideRecord], train_sites: tuple[str, ...], external_sites: tuple[str, ...]
) -> list[str]:
    """The split of each slide after the sites that the user names; "" for one left out."""
    known = {record.site for record in records}
    for name, wanted in (("train_sites", train_sites), ("external_sites", external_sites)):
        if unknown := sorted(set(wanted) - known):
            raise StoreError(
                f"Expected data.{name} among {', '.join(sorted(known))}; got unknown "
                f"{', '.join(unknown)}."
            )
    if both := sorted(set(train_sites) & set(external_sites)):
        raise StoreError(f"Expected a site to train or to be external, got both: {both}.")
    found = []
    for record in records:
        split = record.split
        if record.site in external_sites:
            split = EXTERNAL
        elif split == EXTERNAL:
            split = "" if external_sites or record.site in train_sites else EXTERNAL
        elif train_sites and record.site not in train_sites:
            split = ""
        found.append(split)
    return found


def _check_patients(records: Sequence[SlideRecord], splits: Sequence[str]) -> None:
    """One site and one side of training for each patient."""
    held: dict[str, set[tuple[str, str]]] = {}
    for record, split in zip(records, splits, strict=True):
        if record.patient and split:
            held.setdefault(record.patient, set()).add((record.site, split))
    for patient, places in held.items():
        if len({site for site, _ in places}) > 1 or (
            len(places) > 1 and TRAIN in {split for _, split in places}
        ):
            raise StoreError(
                f"Expected patient {patient} at one site and in one split, got "
                f"{sorted(places)}. Correct the table of sites and prepare the store anew."
            )


def _table(
    path: pathlib.Path, records: Sequence[SlideRecord], tile_size: int, *, with_pixels: bool
) -> TileTable:
    counts = [record.tiles for record in records]
    sites = tuple(dict.fromkeys(record.site for record in records))
    patients = tuple(dict.fromkeys(record.patient for record in records if record.patient))
    images: Any
    labels: Any
    if with_pixels:
        images, labels = stored_pixels(path, records, tile_size)
    else:
        images, labels = blank_tiles(sum(counts))

    def each(numbers: list[int]) -> np.ndarray:
        return np.repeat(np.asarray(numbers, np.int32), counts).astype(np.int32)

    digest = hashlib.blake2b("".join(record.content for record in records).encode())
    return TileTable(
        images=images,
        labels=labels,
        site=each([sites.index(record.site) for record in records]),
        slide=each(list(range(len(records)))),
        patient=each(
            [patients.index(r.patient) if r.patient else UNKNOWN_PATIENT for r in records]
        ),
        sites=sites,
        slides=tuple(record.slide for record in records),
        patients=patients,
        digest=digest.digest(),
    )


def _sources(path: pathlib.Path, records: Sequence[SlideRecord]) -> tuple[sources.SiteSource, ...]:
    """What each site trains on: the slides' own bytes where the private list is at hand.

    Without it, the tiles: then other tiles of the same slides count as other data.
    """
    known = read_sources(path) if (path / layout.PRIVATE).is_dir() else {}
    return sources.from_images(
        (
            record.site,
            record.patient,
            bytes.fromhex(known.get(record.slide, {}).get("digest", record.content)),
        )
        for record in records
    )
