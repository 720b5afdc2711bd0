"""One dictionary for the shapes of all drawing tools."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

Role = Literal["class", "ignore", "region"]

MAX_COORDINATE = 1e8
"""Pixels; whatever lies farther out is no point of a slide."""


class AnnotationError(ValueError):
    """An annotation that cannot be used; the message names the file and the remedy."""


@dataclasses.dataclass(frozen=True)
class Annotation:
    """One drawn shape.

    Attributes:
        geometry: polygon or multipolygon, in pixels of level 0 as the file counts them: x to the
            right, y down, whole numbers are corners of pixels.
        name: of its class as written; empty where it has none.
        role: "class", "ignore" (nothing may be learnt there) or "region" (a region of interest:
            what is outside all of them is not annotated).
    """

    geometry: BaseGeometry
    name: str
    role: Role = "class"


class Findings:
    """What was skipped, repaired or odd in one annotation, counted."""

    def __init__(self) -> None:
        self._counts: collections.Counter[str] = collections.Counter()

    def add(self, what: str, count: int = 1) -> None:
        """Counts one more of a kind."""
        self._counts[what] += count

    def __getitem__(self, what: str) -> int:
        return self._counts[what]

    def sentences(self) -> tuple[str, ...]:
        """One for each kind, "3 points skipped"."""
        return tuple(f"{count:,} {what}" for what, count in self._counts.items() if count)


_ROLE = re.compile(r"(ignore|region)\*?(:.*)?", re.IGNORECASE)


def role_of(name: str) -> Role:
    """QuPath's convention: the class Ignore* is left out, Region* is a region of interest."""
    found = _ROLE.fullmatch(name.strip())
    if found is None:
        return "class"
    return "ignore" if found[1].casefold() == "ignore" else "region"


def ring_points(points: Iterable[Sequence[Any]]) -> np.ndarray:
    """float64 [n, 2] of points, given as numbers or as text.

    Raises:
        AnnotationError: coordinates that are no numbers, or no pixels of any slide.
    """
    try:
        found = np.asarray([(float(point[0]), float(point[1])) for point in points], np.float64)
    except (TypeError, ValueError, IndexError, KeyError, OverflowError) as error:
        raise AnnotationError("with points that are no pairs of numbers") from error
    if not (np.abs(found) < MAX_COORDINATE).all():  # also where it is not a number
        raise AnnotationError("with points that are not finite, or beyond any slide")
    return found.reshape(-1, 2)


def ring(points: Iterable[Sequence[Any]]) -> np.ndarray | None:
    """float64 [n, 2] of a closed line, without its repeated end; None where it encloses nothing.

    Raises:
        AnnotationError: as `ring_points`.
    """
    found = ring_points(points)
    if len(found) and (found[0] == found[-1]).all():
        found = found[:-1]
    return found if len(found) >= 3 else None


def polygon(
    outer: np.ndarray, holes: Sequence[np.ndarray], findings: Findings
) -> BaseGeometry | None:
    """A valid polygon of an outer ring and holes; None where nothing is left of it.

    Lines that cross themselves are repaired by shapely's `make_valid`, and counted.
    """
    made: BaseGeometry | None = shapely.Polygon(outer, holes)
    if made is not None and not made.is_valid:
        findings.add("polygons that cross themselves, repaired")
        # Hole by hole: one that lies outside its polygon must not become a part of it.
        whole = shapely.make_valid(shapely.Polygon(outer))
        missing = shapely.union_all([shapely.make_valid(shapely.Polygon(hole)) for hole in holes])
        made = surface(shapely.difference(whole, missing))
    if made is None or made.is_empty or made.area == 0:
        findings.add("shapes without area, skipped")
        return None
    return made


def surface(geometry: BaseGeometry) -> BaseGeometry | None:
    """The polygons of a geometry, without its lines and points."""
    parts = [
        part
        for part in shapely.get_parts(geometry, return_index=False)
        if part.geom_type in ("Polygon", "MultiPolygon", "GeometryCollection")
    ]
    flat: list[BaseGeometry] = []
    for part in parts:
        if part.geom_type == "Polygon":
            flat.append(part)
        elif (inner := surface(part)) is not None:
            flat.extend(shapely.get_parts(inner))
    if not flat:
        return None
    return flat[0] if len(flat) == 1 else shapely.MultiPolygon(flat)
