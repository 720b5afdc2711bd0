"""GeoJSON as QuPath writes it, from version 0.2 on: a collection, a bare list, or one feature."""

import json
from typing import Any

import shapely
from shapely.geometry.base import BaseGeometry

from fedjax_dp.data.annotations.shapes import (
    Annotation,
    AnnotationError,
    Findings,
    polygon,
    ring,
    role_of,
)

_MAX_DEPTH = 8


def read_geojson(text: str, findings: Findings) -> list[Annotation]:
    """Annotations, detections and cells; of a cell its boundary, not its nucleus.

    Objects without `objectType` count as annotations. Points and lines enclose nothing and are
    skipped; coordinates beyond two are ignored.

    Args:
        text: of the file.
        findings: counts what is skipped or repaired.

    Raises:
        AnnotationError: no GeoJSON.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"is no JSON ({error})") from error
    found = []
    for feature in _features(value):
        geometry = _geometry(feature.get("geometry"), findings)
        if geometry is not None:
            name = _class_name(feature.get("properties"))
            found.append(Annotation(geometry, name, role_of(name)))
    return found


def _features(value: Any) -> list[dict[str, Any]]:
    """The features, whatever they are wrapped in."""
    if isinstance(value, dict) and value.get("type") == "FeatureCollection":
        value = value.get("features")
    elif isinstance(value, dict) and value.get("type") == "Feature":
        value = [value]
    if not isinstance(value, list) or not all(
        isinstance(item, dict) and item.get("type") == "Feature" for item in value
    ):
        raise AnnotationError(
            "is no GeoJSON of features. Export it from QuPath: File, Export objects as GeoJSON"
        )
    return value


def _class_name(properties: Any) -> str:
    """The class of a feature; empty where it has none."""
    if not isinstance(properties, dict):
        return ""
    value = properties.get("classification")
    if isinstance(value, dict):
        names = value.get("names")
        if value.get("name") is None and isinstance(names, list):
            return ": ".join(map(str, names))  # as QuPath 0.6 writes derived classes
        value = value.get("name")
    return value.strip() if isinstance(value, str) else ""


def _geometry(value: Any, findings: Findings, depth: int = 0) -> BaseGeometry | None:
    if depth > _MAX_DEPTH or not isinstance(value, dict):
        findings.add("objects without a geometry, skipped")
        return None
    kind, coordinates = value.get("type"), value.get("coordinates")
    if kind == "Polygon":
        return _polygon(coordinates, findings)
    if kind == "MultiPolygon" and isinstance(coordinates, list):
        return _union([_polygon(part, findings) for part in coordinates])
    if kind == "GeometryCollection" and isinstance(value.get("geometries"), list):
        return _union([_geometry(part, findings, depth + 1) for part in value["geometries"]])
    if kind in ("Point", "MultiPoint", "LineString", "MultiLineString"):
        findings.add("points and lines, skipped")
    else:
        findings.add("objects without a geometry, skipped")
    return None


def _polygon(coordinates: Any, findings: Findings) -> BaseGeometry | None:
    if not isinstance(coordinates, list) or not coordinates:
        findings.add("objects without a geometry, skipped")
        return None
    try:
        outer, *holes = (ring(part) for part in coordinates)
    except AnnotationError as error:
        findings.add(f"polygons {error}, skipped")
        return None
    except TypeError:
        findings.add("objects without a geometry, skipped")
        return None
    if outer is None:
        findings.add("shapes without area, skipped")
        return None
    return polygon(outer, [hole for hole in holes if hole is not None], findings)


def _union(parts: list[BaseGeometry | None]) -> BaseGeometry | None:
    there = [part for part in parts if part is not None]
    return shapely.union_all(there) if there else None
