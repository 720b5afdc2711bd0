"""What the tiles of a site were cut from: the name under which the privacy losses of runs add up.

A fingerprint is a function of private data. Whoever holds a site's images can tell from it that
these and no others were used, so it stays with who holds the data and enters no statement.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_dp.data.tiles import UNKNOWN_PATIENT, TileTable


class SiteSource(NamedTuple):
    """The training images of one site, however they are cut, labelled and pooled with others.

    Attributes:
        site: its name.
        fingerprint: hex; equal where the images are equal.
        patients: hex; equal where, beside that, the same images are known to be one patient's. Runs
            that know other patients protect other patients.
    """

    site: str
    fingerprint: str
    patients: str


class Holding(NamedTuple):
    """The data of one client, where clients are not the sites.

    Attributes:
        sources: the sites whose images it holds, or some of their images.
        is_whole: whether it holds all training images of these sites.
        is_patient: whether it holds the images of one known patient, all of them and no others.
    """

    sources: tuple[SiteSource, ...]
    is_whole: bool
    is_patient: bool


def holdings(
    by_site: TileTable, by_client: TileTable, sources: Mapping[str, SiteSource]
) -> dict[str, Holding]:
    """What each client holds.

    Args:
        by_site: the training tiles, each with its site.
        by_client: the same in the same order, with clients in the place of sites.
        sources: site -> its source.

    Returns:
        Client -> its holding.

    Raises:
        ValueError: the tables are not of the same tiles.
    """
    if not np.array_equal(by_site.slide, by_client.slide):
        raise ValueError(
            f"Expected the same tiles by site and by client, got {len(by_site)} and "
            f"{len(by_client)} tiles of unlike slides."
        )
    found = {}
    for client in by_client.sites:
        tiles = by_client.of_site(client)
        numbers, owners = np.unique(by_site.site[tiles]), np.unique(by_client.patient[tiles])
        found[client] = Holding(
            sources=tuple(sources[by_site.sites[number]] for number in numbers),
            is_whole=len(tiles) == int(np.isin(by_site.site, numbers).sum()),
            is_patient=len(owners) == 1
            and bool(owners[0] != UNKNOWN_PATIENT)
            and len(tiles) == int((by_client.patient == owners[0]).sum()),
        )
    return found


def from_images(images: Iterable[tuple[str, str, bytes]]) -> tuple[SiteSource, ...]:
    """The sources of all sites from (site, patient, digest of the pixels) of each training image.

    Order, names of files, sites and patients do not enter; an empty patient is unknown.
    """
    of_site: dict[str, list[tuple[str, bytes]]] = {}
    for site, patient, digest in images:
        of_site.setdefault(site, []).append((patient, digest))
    return tuple(
        SiteSource(site, _digest("images", sorted(d for _, d in members)), _patients(members))
        for site, members in of_site.items()
    )


def from_tiles(table: TileTable) -> tuple[SiteSource, ...]:
    """The same from tiles alone, where nobody tells what they were cut from.

    Tiles of another size, or from another corner on, are then other sources, and the losses of
    runs on them are not added up.
    """
    return from_images(
        (
            table.sites[site],
            "" if patient == UNKNOWN_PATIENT else table.patients[patient],
            hashlib.blake2b(tile.tobytes(), digest_size=16).digest(),
        )
        for site, patient, tile in zip(table.site, table.patient, table.images, strict=True)
        if site >= 0
    )


def from_generator(sites: Sequence[str], *arguments: object) -> tuple[SiteSource, ...]:
    """The sources of drawn sites, from all that their pixels depend on beside the site's name."""
    return tuple(
        SiteSource(
            site, _digest("drawn", [repr((site, *arguments)).encode()]), _digest("drawn", [])
        )
        for site in sites
    )


def _patients(members: Sequence[tuple[str, bytes]]) -> str:
    """Digest of which images are one patient's; all others are of unknown patients."""
    groups: dict[str, list[bytes]] = {}
    for patient, digest in members:
        if patient:
            groups.setdefault(patient, []).append(digest)
    known = sorted(bytes.fromhex(_digest("patient", sorted(group))) for group in groups.values())
    return _digest("patients", known)


def _digest(kind: str, parts: Sequence[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16, person=kind.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
