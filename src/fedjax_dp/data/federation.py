"""A federation: sites with training tiles, and the splits that measure what they learn."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

from fedjax_dp.data import sources, units
from fedjax_dp.data.inspection import DEFAULT_CLASS_NAMES, default_splits, inspect
from fedjax_dp.data.manifest import Finding, Manifest, ManifestError, Row, read_manifest
from fedjax_dp.data.sources import SiteSource
from fedjax_dp.data.splits import (
    EXCLUDED,
    EXTERNAL,
    SPLIT_KEY,
    TEST,
    TRAIN,
    VALIDATION,
    split_of,
)
from fedjax_dp.data.tiles import TileTable, concatenate, cut
from fedjax_dp.data.units import UnitIndex, largest_known_unit, unit_index


@dataclasses.dataclass(frozen=True, kw_only=True)
class Federation:
    """Training tiles of every site, and validation, test and external tiles.

    Attributes:
        name: what the data is, for reports ("synthetic nuclei", the manifest's file name).
        class_names: K names, the index is the label; class 0 is the background.
        train: tiles of the training sites; one site is one client.
        validation: tiles of the training sites' validation patients; may be empty.
        test: tiles of the training sites' test patients; may be empty.
        external: tiles of hospitals that do not train; may be empty.
        tiles_overlap: whether two training tiles may share pixels (then "tile" is no unit).
        slides_decide: whether a slide as a whole decides which of its tiles are there (Otsu's
            threshold); then "tile" is no unit either.
        mpp: micrometres per pixel of all tiles; None where it is not known or not one.
        is_public: whether the tiles are free of people (synthetic), so pictures of them are free.
        sources: what each site's training tiles were cut from, see `site_sources`; empty where
            nobody tells. Whoever puts other tiles into `train` empties it.
    """

    name: str
    class_names: tuple[str, ...]
    train: TileTable
    validation: TileTable
    test: TileTable
    external: TileTable
    tiles_overlap: bool = False
    slides_decide: bool = False
    mpp: float | None = None
    is_public: bool = False
    sources: tuple[SiteSource, ...] = ()


def federation_from_manifest(
    path: str | pathlib.Path,
    *,
    tile_size: int = 128,
    stride: int | None = None,
    min_tissue: float = 0.0,
    label_mode: str = "class",
    class_names: Sequence[str] = DEFAULT_CLASS_NAMES,
    train_sites: Sequence[str] = (),
    external_sites: Sequence[str] = (),
    split_key: bytes = SPLIT_KEY,
) -> Federation:
    """Reads, checks and cuts all images of a manifest; each is opened once.

    The manifest's `split` decides where it has one, else a keyed hash of the patient (see
    `splits.split_of`). Sites named here override it:

    * `train_sites`: only these train. Their rows marked external get the keyed hash instead; other
      sites' train, validation and test rows are left out.
    * `external_sites`: the external table holds all images of these sites, and of no other.

    Excluded rows stay out in any case.

    Guarantees: validation, test and external images are covered by tiles of stride `tile_size`,
    so every pixel is counted exactly once and none is left out for lack of tissue; one table per
    split names only the sites, slides and patients that have tiles in it.

    Args:
        path: the manifest (see `manifest.read_manifest`).
        tile_size: side of a tile, in pixels.
        stride: distance of neighbouring training tiles, in pixels; None is `tile_size`. A smaller
            one makes training tiles overlap, and then a tile is no unit of privacy.
        min_tissue: training tiles without annotation and with less tissue are left out.
        label_mode: "class" or "instance" (every number but 0 is class 1).
        class_names: K names, background first.
        train_sites: names of the sites that train; empty = as the split says.
        external_sites: names of the sites that only measure; empty = as the split says.
        split_key: 1 to 64 bytes, for a manifest without split.

    Returns:
        The federation, named after the manifest's file and folder.

    Raises:
        ManifestError: (a ValueError) with all errors of the manifest and its images.
        ValueError: an argument out of range, or an unknown site.
    """
    path = pathlib.Path(path)
    stride = tile_size if stride is None else stride
    if tile_size < 1 or not 1 <= stride <= tile_size:
        raise ValueError(f"Expected 1 <= stride <= tile_size, got {stride=} and {tile_size=}.")
    if not 0.0 <= min_tissue <= 1.0:
        raise ValueError(f"Expected 0 <= min_tissue <= 1, got {min_tissue=}.")
    manifest = read_manifest(path)
    splits = effective_splits(manifest, train_sites, external_sites, split_key)

    def visit(
        row: Row, split: str, image: np.ndarray, labels: np.ndarray, mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        del row, mask
        trains = split == TRAIN
        return cut(
            image,
            labels,
            tile_size=tile_size,
            stride=stride if trains else tile_size,
            min_tissue=min_tissue if trains else 0.0,
        )

    inspected = inspect(
        manifest,
        label_mode=label_mode,
        class_names=class_names,
        tile_size=tile_size,
        splits=splits,
        visit=visit,
    )
    errors = [finding for finding in inspected.findings if finding.level == "error"]
    if errors:
        raise ManifestError(path, errors)
    tiles, digests = list(inspected.visited), inspected.digests
    del inspected
    tables = {}
    for split in (TRAIN, VALIDATION, TEST, EXTERNAL):
        members = [i for i, name in enumerate(splits) if name == split]
        owners = [
            (manifest.rows[i].site, manifest.rows[i].image, manifest.rows[i].patient)
            for i in members
        ]
        tables[split] = concatenate([tiles[i] for i in members], owners, tile_size)
        for i in members:
            tiles[i] = None  # the table holds a copy: free ours before the next split
    wanted = dict.fromkeys(r.site for r, s in zip(manifest.rows, splits, strict=True) if s == TRAIN)
    bare = [site for site in wanted if site not in tables[TRAIN].sites]
    if bare:
        message = f"{min_tissue=} leaves no training tile at {', '.join(bare)}. Lower it."
        raise ManifestError(path, [Finding("error", (), message)])
    return Federation(
        name=f"{path.parent.resolve().name}/{path.name}",
        class_names=tuple(class_names),
        train=tables[TRAIN],
        validation=tables[VALIDATION],
        test=tables[TEST],
        external=tables[EXTERNAL],
        tiles_overlap=stride < tile_size,
        mpp=_common_mpp([r for r, s in zip(manifest.rows, splits, strict=True) if s == TRAIN]),
        sources=sources.from_images(
            (row.site, row.patient, digest)
            for row, split, digest in zip(manifest.rows, splits, digests, strict=True)
            if split == TRAIN
        ),
    )


def _common_mpp(rows: Sequence[Row]) -> float | None:
    """The resolution of all rows, None where one does not say or another differs by 1 %."""
    stated = [row.mpp for row in rows if row.mpp is not None]
    if len(stated) < len(rows) or max(stated) > 1.01 * min(stated):
        return None
    return stated[0]


def effective_splits(
    manifest: Manifest,
    train_sites: Sequence[str] = (),
    external_sites: Sequence[str] = (),
    split_key: bytes = SPLIT_KEY,
) -> tuple[str, ...]:
    """Split of each row after the sites named by the user; "" for a row that is left out.

    Raises:
        ValueError: an unknown site, one named twice, or one of which every row is excluded.
    """
    if isinstance(train_sites, str) or isinstance(external_sites, str):
        raise ValueError("Expected tuples of site names, got a string. Write ('a', 'b').")
    known = tuple(dict.fromkeys(row.site for row in manifest.rows))
    for name, sites in (("train_sites", train_sites), ("external_sites", external_sites)):
        unknown = [site for site in sites if site not in known]
        if unknown and known:
            raise ValueError(
                f"Expected {name} among the manifest's sites {', '.join(known)}; got unknown "
                f"{', '.join(unknown)}."
            )
    both = sorted(set(train_sites) & set(external_sites))
    if both:
        raise ValueError(f"Expected a site to train or to be external, got both: {both}.")
    splits = []
    for row, split in zip(manifest.rows, default_splits(manifest, split_key), strict=True):
        if split == EXCLUDED:
            splits.append(split)
        elif row.site in external_sites:
            splits.append(EXTERNAL)
        elif split == EXTERNAL and row.site in train_sites:
            splits.append(split_of(patient=row.patient, image=row.image, split_key=split_key))
        elif split == EXTERNAL:
            splits.append("" if external_sites else EXTERNAL)
        else:
            splits.append(split if not train_sites or row.site in train_sites else "")
    for site in (*train_sites, *external_sites):
        of_site = {s for row, s in zip(manifest.rows, splits, strict=True) if row.site == site}
        if of_site == {EXCLUDED}:
            raise ValueError(
                f"Expected images of {site}, but the manifest marks all of them as excluded. "
                "Change their split, or leave the site out."
            )
    return tuple(splits)


def check_unit(federation: Federation, unit: str) -> None:
    """Refuses a unit of privacy that the training data cannot honour, at all sites at once.

    Args:
        federation: with its training table.
        unit: "tile", "slide" or "patient".

    Raises:
        ValueError: an unknown unit, unknown patients (naming the sites), or overlapping tiles.
    """
    units.check_unit(
        federation.train,
        unit,
        tiles_overlap=federation.tiles_overlap,
        slides_decide=federation.slides_decide,
    )


def fingerprint(federation: Federation) -> str:
    """BLAKE2b, in hex, of the training tiles, their labels and whose they are.

    Two federations with the same fingerprint train on the same tiles: a run that goes on needs
    that. Validation, test and external tiles do not enter. Whose privacy losses add up is told by
    `site_sources`, which other tiles of the same images do not change.
    """
    digest = hashlib.blake2b(digest_size=32)
    table = federation.train
    for pixels in (table.images, table.labels):
        digest.update(repr(pixels.shape).encode())
        for tile in () if table.digest else pixels:  # one at a time: the table may fill the memory
            digest.update(tile.tobytes())
    digest.update(table.digest)
    for numbers, names in (
        (table.site, table.sites),
        (table.slide, table.slides),
        (table.patient, table.patients),
    ):
        digest.update(np.ascontiguousarray(numbers, "<i4").tobytes())
        for name in names:
            digest.update(len(name.encode()).to_bytes(8, "little") + name.encode())
        digest.update(len(names).to_bytes(8, "little"))
    return digest.hexdigest()


def site_sources(federation: Federation) -> dict[str, SiteSource]:
    """What each site trains on, under a fingerprint by which the losses of its runs add up.

    Guarantees: the fingerprint of a site of a manifest is one of the decoded pixels of its training
    images, and of nothing else. Tile size, stride, tissue threshold, classes, masks, names, other
    sites and evaluation images do not enter. That of a drawn site is one of all its pixels depend
    on; how many patients and tiles are drawn does not enter, for fewer are part of more. Tiles of
    unknown origin are their own source.

    Limit: sites that share some of their images and not all have unlike fingerprints, and so has a
    site with one image more than before, or saved anew with loss. Their losses add up for what they
    share all the same. Keep a site's training images as they are, or count such runs by hand.

    Args:
        federation: with sites as they are, before other clients take their place.

    Returns:
        Training site -> its source.

    Raises:
        ValueError: the federation tells the sources of other sites than those it trains on.
    """
    known = federation.sources or sources.from_tiles(federation.train)
    found = {source.site: source for source in known}
    missing = [site for site in federation.train.sites if site not in found]
    if missing:
        raise ValueError(
            f"Expected the sources of all training sites, got none of {', '.join(missing)} in "
            f"{federation.name}. Ask before other clients take the place of sites; a federation "
            "with other tiles than its own has sources=()."
        )
    return {site: found[site] for site in federation.train.sites}


__all__ = [
    "Federation",
    "SiteSource",
    "UnitIndex",
    "check_unit",
    "effective_splits",
    "federation_from_manifest",
    "fingerprint",
    "largest_known_unit",
    "site_sources",
    "unit_index",
]
