"""Annotations of Aperio ImageScope: one layer for each class, and regions in it.

What the numbers in `Type` mean is read from files, not from a specification: 0 a free or polygonal
outline, 1 a rectangle, 2 an ellipse given by its box, 3 an arrow, 4 a ruler, 5 a point.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from fedjax_dp.data.annotations.shapes import (
    Annotation,
    AnnotationError,
    Findings,
    polygon,
    ring,
    ring_points,
    role_of,
    surface,
)
from fedjax_dp.data.annotations.xml_text import name_of

_RECTANGLE, _ELLIPSE = "1", "2"
_WITHOUT_AREA = {"3": "arrows", "4": "rulers", "5": "points"}
_ELLIPSE_POINTS = 128


def is_aperio(root: Any) -> bool:
    """Whether an XML document is of ImageScope."""
    return name_of(root) == "Annotations" and any(name_of(child) == "Annotation" for child in root)


def read_aperio(root: Any, findings: Findings) -> list[Annotation]:
    """The regions of all layers.

    A layer's class is its `Name`, or its attribute "Description", or the name of its first other
    attribute, or its colour as "#rrggbb". A region with `NegativeROA` is a hole in the regions of
    the same layer before it.

    Args:
        root: of the document.
        findings: counts what is skipped or repaired.
    """
    found = []
    for layer in root:
        if name_of(layer) != "Annotation":
            continue
        name = _layer_name(layer)
        regions: list[BaseGeometry] = []
        for region in (element for element in layer.iter() if name_of(element) == "Region"):
            geometry = _region(region, findings)
            if geometry is None:
                continue
            if region.get("NegativeROA") == "1":
                regions = _with_hole(regions, geometry, findings)
            else:
                regions.append(geometry)
        found += [Annotation(geometry, name, role_of(name)) for geometry in regions]
    return found


def _layer_name(layer: Any) -> str:
    if (layer.get("Name") or "").strip():
        return layer.get("Name").strip()
    attributes = {
        (element.get("Name") or "").strip(): (element.get("Value") or "").strip()
        for element in layer.iter()
        if name_of(element) == "Attribute"
    }
    if described := attributes.get("Description"):
        return described
    if others := [name for name in attributes if name and name != "Description"]:
        return others[0]
    try:
        colour = int(layer.get("LineColor") or "")
    except ValueError:
        return ""
    red, green, blue = (colour >> shift & 255 for shift in (0, 8, 16))
    return f"#{red:02x}{green:02x}{blue:02x}"


def _region(region: Any, findings: Findings) -> BaseGeometry | None:
    kind = region.get("Type") or "0"
    if kind in _WITHOUT_AREA:
        findings.add(f"{_WITHOUT_AREA[kind]}, skipped")
        return None
    vertices = [element for element in region.iter() if name_of(element) == "Vertex"]
    try:
        points = ring_points((v.get("X"), v.get("Y")) for v in vertices)
        if kind in (_RECTANGLE, _ELLIPSE) and len(points) >= 2:
            outer: np.ndarray | None = (_box if kind == _RECTANGLE else _ellipse)(points)
        else:
            outer = ring(points)
    except AnnotationError as error:
        findings.add(f"polygons {error}, skipped")
        return None
    if outer is None:
        findings.add("shapes without area, skipped")
        return None
    return polygon(outer, [], findings)


def _box(points: np.ndarray) -> np.ndarray:
    if len(points) > 2:  # its corners; it may be turned
        return points
    (x0, y0), (x1, y1) = points
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def _ellipse(points: np.ndarray) -> np.ndarray:
    low, high = np.min(points, 0), np.max(points, 0)
    angle = 2 * np.pi * np.arange(_ELLIPSE_POINTS) / _ELLIPSE_POINTS
    return (low + high) / 2 + (high - low) / 2 * np.stack([np.cos(angle), np.sin(angle)], -1)


def _with_hole(
    regions: Sequence[BaseGeometry], hole: BaseGeometry, findings: Findings
) -> list[BaseGeometry]:
    """The regions without the hole; one that is cut by nothing is counted."""
    if not any(region.intersects(hole) for region in regions):
        findings.add("holes outside every region of their layer, skipped")
        return list(regions)
    cut = [surface(shapely.difference(region, hole)) for region in regions]
    return [region for region in cut if region is not None]
