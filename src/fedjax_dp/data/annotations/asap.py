"""Annotations of ASAP: a list of outlines, each in a group that names its class."""

from typing import Any

import numpy as np

from fedjax_dp.data.annotations.shapes import (
    Annotation,
    AnnotationError,
    Findings,
    polygon,
    ring,
    ring_points,
    role_of,
)
from fedjax_dp.data.annotations.xml_text import name_of

_SPLINE_STEPS = 8


def is_asap(root: Any) -> bool:
    """Whether an XML document is of ASAP."""
    return name_of(root) == "ASAP_Annotations"


def read_asap(root: Any, findings: Findings) -> list[Annotation]:
    """The outlines. Their points are taken by their `Order`, whatever their order in the file.

    Splines become the closed Catmull-Rom curve through their points, counted; points enclose
    nothing and are skipped.

    Args:
        root: of the document.
        findings: counts what is skipped or repaired.
    """
    found = []
    for element in root.iter():
        if name_of(element) != "Annotation":
            continue
        kind = (element.get("Type") or "").casefold()
        if kind in ("dot", "pointset", "point"):
            findings.add("points and lines, skipped")
            continue
        try:
            outer = ring(_points(element))
        except AnnotationError as error:
            findings.add(f"polygons {error}, skipped")
            continue
        if outer is not None and kind == "spline":
            findings.add("splines, drawn as Catmull-Rom curves")
            outer = _spline(outer)
        made = None if outer is None else polygon(outer, [], findings)
        if outer is None:
            findings.add("shapes without area, skipped")
        if made is not None:
            group = (element.get("PartOfGroup") or "").strip()
            name = "" if group.casefold() == "none" else group
            found.append(Annotation(made, name, role_of(name)))
    return found


def _points(annotation: Any) -> np.ndarray:
    """float64 [n, 2], in the order that the points themselves name."""
    points = [element for element in annotation.iter() if name_of(element) == "Coordinate"]
    orders = ring_points((p.get("Order", index), 0) for index, p in enumerate(points))[:, 0]
    found = ring_points((p.get("X"), p.get("Y")) for p in points)
    return found[np.argsort(orders, kind="stable")]


def _spline(points: np.ndarray) -> np.ndarray:
    """float64 [8 n, 2] on the closed Catmull-Rom curve through n points."""
    before, after, beyond = (np.roll(points, shift, 0) for shift in (1, -1, -2))
    t = (np.arange(_SPLINE_STEPS) / _SPLINE_STEPS)[None, :, None]
    p0, p1, p2, p3 = (p[:, None] for p in (before, points, after, beyond))
    curve = 0.5 * (
        2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2
        + (3 * p1 - p0 - 3 * p2 + p3) * t**3
    )  # fmt: skip
    return curve.reshape(-1, 2)
