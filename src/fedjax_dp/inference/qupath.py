"""What QuPath reads: objects as GeoJSON, and a script that opens them with a list to review.

The form is that of QuPath 0.4 and later. The script uses the scripting interface of 0.5 and later;
it was never run within QuPath here.
"""

import json
import os
import pathlib
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import shapely

from fedjax_dp.data.store.layout import write_text
from fedjax_dp.inference.polygons import Region
from fedjax_dp.inference.sliding_window import Field

_NAMESPACE = uuid.UUID("5d9f5c3e-6c43-4a57-9c84-0c6a1d0f2b11")
"""Of the identifiers of objects: the same object has the same one in every export."""


def write_geojson(
    path: pathlib.Path,
    regions: Iterable[Region],
    *,
    class_names: Sequence[str],
    colours: np.ndarray,
    scale: tuple[float, float],
    mpp: tuple[float, float],
    offset: tuple[float, float] = (0.0, 0.0),
    kind: str = "annotation",
) -> int:
    """Writes regions as a FeatureCollection, one after the other as they come.

    Args:
        path: of the GeoJSON; it appears whole or not at all.
        regions: of `polygons.trace`.
        class_names: K names.
        colours: uint8 [K, 3].
        scale: (x, y), level-0 pixels per pixel of the regions.
        mpp: (x, y), micrometres per level-0 pixel, for the areas that are told.
        offset: added to level-0 coordinates: minus the corner of the slide's bounds where the
            viewer counts from there.
        kind: "annotation" (few, can be edited) or "detection" (many, light).

    Returns:
        The number of objects.

    Raises:
        OSError: the disk is full.
        ValueError: an unknown kind.
    """
    if kind not in ("annotation", "detection"):
        raise ValueError(f"Expected kind annotation or detection, got {kind!r}.")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    count = 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write('{"type": "FeatureCollection", "features": [')
            for region in regions:
                placed = shapely.transform(
                    region.polygon, lambda p: p * np.asarray(scale) + np.asarray(offset)
                )
                feature = _feature(
                    placed,
                    class_names[region.label],
                    colours[region.label],
                    kind,
                    placed.area * mpp[0] * mpp[1],
                )
                file.write(",\n" if count else "\n")
                json.dump(feature, file, ensure_ascii=False)
                count += 1
            file.write("\n]}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _feature(
    polygon: shapely.Polygon, name: str, colour: np.ndarray, kind: str, area_um2: float
) -> dict[str, Any]:
    rings = [polygon.exterior, *polygon.interiors]
    coordinates = [[[_short(x), _short(y)] for x, y in ring.coords] for ring in rings]
    identity = json.dumps([kind, name, coordinates])
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_NAMESPACE, identity)),
        "geometry": {"type": "Polygon", "coordinates": coordinates},
        "properties": {
            "objectType": kind,
            "classification": {"name": name, "color": [int(c) for c in colour]},
            "isLocked": False,
            "measurements": {"Area um^2": round(area_um2, 3)},
        },
    }


def _short(value: float) -> float | int:
    """A coordinate in thousandths of a pixel, whole ones without a point."""
    rounded = round(float(value), 3)
    return int(rounded) if rounded == int(rounded) else rounded


def write_groovy(
    path: pathlib.Path,
    geojson_name: str,
    fields: Sequence[Field],
    *,
    dimensions: tuple[int, int],
    offset: tuple[float, float] = (0.0, 0.0),
    count: int = 10,
) -> None:
    """Writes a script for QuPath: imports the objects and lists the most uncertain fields.

    Args:
        path: of the script.
        geojson_name: of the GeoJSON beside it.
        fields: of `sliding_window.segment`.
        dimensions: (width, height) of the slide; the script warns where the open image differs.
        offset: as of `write_geojson`.
        count: fields that are listed.
    """
    chosen = sorted(fields, key=lambda field: -field.uncertainty)[:count]
    rows = ",\n".join(
        f"    [{f.x + offset[0]:.1f}, {f.y + offset[1]:.1f}, {f.width:.1f}, {f.height:.1f}, "
        f"{f.uncertainty:.4f}]"
        for f in chosen
    )
    # A name in single quotes is plain text in Groovy, once quotes and backslashes are escaped.
    name = geojson_name.replace("\\", "\\\\").replace("'", "\\'")
    name = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in name)
    text = _SCRIPT.replace("@NAME@", name).replace("@FIELDS@", rows)
    text = text.replace("@WIDTH@", str(dimensions[0])).replace("@HEIGHT@", str(dimensions[1]))
    write_text(path, text)


_SCRIPT = """\
// Opens the segmentation of a slide in QuPath 0.5 or later: open the slide, then Automate >
// Script editor > Run. The objects can be edited as any others; the fields of which the model
// was least sure are annotations of the class Review, the most uncertain first.
import qupath.fx.dialogs.FileChoosers
import qupath.lib.io.PathIO
import qupath.lib.objects.PathObjects
import qupath.lib.objects.classes.PathClass
import qupath.lib.regions.ImagePlane
import qupath.lib.roi.ROIs

def name = '@NAME@'
def fields = [
@FIELDS@
]

def server = getCurrentServer()
if (server.getWidth() != @WIDTH@ || server.getHeight() != @HEIGHT@)
    print 'WARNING: the open image is ' + server.getWidth() + ' x ' + server.getHeight() +
        ' pixels, the segmented one @WIDTH@ x @HEIGHT@'

// A script does not know where it lies: choose the file beside it, or write its path here.
def path = ''
def file = path ? new File(path) : FileChoosers.promptForFile(
    'Choose ' + name, FileChoosers.createExtensionFilter('GeoJSON', '*.geojson'))
if (file == null)
    return

def objects = PathIO.readObjects(file)
addObjects(objects)
def review = PathClass.fromString('Review')
fields.eachWithIndex { field, index ->
    def roi = ROIs.createRectangleROI(
        field[0] as double, field[1] as double, field[2] as double, field[3] as double,
        ImagePlane.getDefaultPlane())
    def annotation = PathObjects.createAnnotationObject(roi, review)
    annotation.setName('Review ' + (index + 1) + ' (entropy ' + field[4] + ')')
    annotation.setLocked(true)
    addObject(annotation)
}
fireHierarchyUpdate()
print objects.size() + ' objects, ' + fields.size() + ' fields to review'
"""
