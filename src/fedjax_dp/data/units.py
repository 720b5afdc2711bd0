"""Units of privacy: which training tiles change together when one tile, slide or patient leaves."""

import dataclasses

import numpy as np

from fedjax_dp.data.tiles import UNKNOWN_PATIENT, TileTable

UNITS = ("tile", "slide", "patient")


@dataclasses.dataclass(frozen=True)
class UnitIndex:
    """The units of one site.

    Attributes:
        tiles: for each unit, the indices int32 [n] of its tiles in the training table.
    """

    tiles: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.tiles)


def unit_index(table: TileTable, site: str, unit: str) -> UnitIndex:
    """Units of `site`, in the order of their first tile; every tile is in exactly one.

    Args:
        table: training tiles of all sites.
        site: name of the site; one that has no tiles has no units.
        unit: "tile", "slide" or "patient".

    Returns:
        The tiles of each unit, as indices into `table`.

    Raises:
        ValueError: an unknown unit, or unit = patient where a tile's patient is unknown.
    """
    _check_name(unit)
    tiles = table.of_site(site)
    if unit == "tile":
        return UnitIndex(tuple(np.split(tiles, len(tiles)) if len(tiles) else ()))
    owner = (table.patient if unit == "patient" else table.slide)[tiles]
    if unit == "patient" and (owner == UNKNOWN_PATIENT).any():
        raise ValueError(_unknown_patients((site,)))
    _, first, inverse = np.unique(owner, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    return UnitIndex(tuple(tiles[inverse == number] for number in order))


def sites_without_patients(table: TileTable) -> tuple[str, ...]:
    """Names of the sites of which at least one tile's patient is unknown."""
    numbers = np.unique(table.site[table.patient == UNKNOWN_PATIENT])
    return tuple(table.sites[number] for number in numbers)


def largest_known_unit(table: TileTable) -> str:
    """The unit "patient" where every tile's patient is known, else "slide" (the source image)."""
    return "slide" if sites_without_patients(table) else "patient"


def check_unit(
    table: TileTable, unit: str, *, tiles_overlap: bool, slides_decide: bool = False
) -> None:
    """Refuses a unit of privacy that the data cannot honour, at all sites at once.

    Args:
        table: training tiles of all sites.
        unit: "tile", "slide" or "patient".
        tiles_overlap: whether two tiles may share pixels.
        slides_decide: whether a slide as a whole decides which of its tiles are there.

    Raises:
        ValueError: an unknown unit, unknown patients (naming the sites), overlapping tiles, or
            tiles that decide about each other.
    """
    _check_name(unit)
    if unit == "patient" and (sites := sites_without_patients(table)):
        raise ValueError(_unknown_patients(sites))
    if unit == "tile" and tiles_overlap:
        raise ValueError(
            "Expected tiles that share no pixel for unit='tile', got a stride below the tile size: "
            "one piece of tissue would then be in several units. Set stride = tile_size, or use "
            "unit='slide' or unit='patient'."
        )
    if unit == "tile" and slides_decide:
        raise ValueError(
            "Expected tiles that are chosen one by one for unit='tile', got those of a threshold "
            "fitted to whole slides (tissue=otsu): one tile moves it for all others. Prepare the "
            "store with --tissue=saturation, or use unit='slide' or unit='patient'."
        )


def _check_name(unit: str) -> None:
    if unit not in UNITS:
        raise ValueError(f"Expected unit in {UNITS}, got {unit!r}.")


def _unknown_patients(sites: tuple[str, ...]) -> str:
    return (
        f"Expected known patients for unit='patient', got unknown ones at {', '.join(sites)}. Fill "
        "the manifest's column patient, leave these sites out of training, or use unit='slide' "
        "(the source image), the largest unit that is known there."
    )
