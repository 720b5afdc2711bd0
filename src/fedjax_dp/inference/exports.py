"""Everything that is written of a segmented slide, into one folder."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from fedjax_dp.data.slides import Slide
from fedjax_dp.inference.areas import ANALYSED, area_table, write_csv
from fedjax_dp.inference.label_file import LabelMap
from fedjax_dp.inference.label_pyramid import write_colours, write_labels
from fedjax_dp.inference.overview import default_colours, save_overlay
from fedjax_dp.inference.polygons import trace
from fedjax_dp.inference.qupath import write_geojson, write_groovy
from fedjax_dp.inference.sliding_window import Field
from fedjax_dp.reporting.log import write_json

OBJECTS = "objects.geojson"


class Exports(NamedTuple):
    """What the files need to know.

    Attributes:
        class_names: K names.
        mpp: micrometres per pixel of the label map.
        kind: what objects become in QuPath, "annotation" or "detection".
        min_area_um2: smaller objects are left out.
        from_bounds: whether the viewer counts from the slide's bounds.
    """

    class_names: tuple[str, ...]
    mpp: float
    kind: str
    min_area_um2: float = 0.0
    from_bounds: bool = False


def export(
    folder: pathlib.Path,
    slide: Slide,
    labels: LabelMap,
    fields: Sequence[Field],
    settings: Exports,
) -> dict[str, Any]:
    """Writes label map, colours, objects, script, overlay, areas and summary.

    Each file appears whole or not at all; the folder's earlier ones are replaced.

    Args:
        folder: where to.
        slide: open.
        labels: of the whole slide.
        fields: of `sliding_window.segment`.
        settings: see `Exports`.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        OSError: the disk is full.
        ValueError: a negative area.
    """
    if settings.min_area_um2 < 0:
        raise ValueError(f"Expected min_area_um2 >= 0, got {settings.min_area_um2}.")
    folder.mkdir(parents=True, exist_ok=True)
    names, mpp = settings.class_names, (settings.mpp, settings.mpp)
    colours = default_colours(len(names))
    offset = (-slide.bounds.x, -slide.bounds.y) if settings.from_bounds else (0.0, 0.0)
    write_labels(folder / "labels.ome.tif", labels, mpp=mpp)
    write_colours(folder / "colours.ome.tif", labels, mpp=mpp, colours=colours)
    count = write_geojson(
        folder / OBJECTS,
        trace(labels, min_area_px=settings.min_area_um2 / settings.mpp**2),
        class_names=names,
        colours=colours,
        scale=(settings.mpp / slide.mpp[0], settings.mpp / slide.mpp[1]),
        mpp=slide.mpp,
        offset=offset,
        kind=settings.kind,
    )
    write_groovy(
        folder / "open_in_qupath.groovy",
        OBJECTS,
        fields,
        dimensions=slide.bounds[2:] if settings.from_bounds else slide.dimensions,
        offset=offset,
    )
    areas = area_table(labels, names, mpp)
    write_csv(folder / "areas.csv", areas)
    save_overlay(folder / "overlay.png", slide, labels, colours=colours, class_names=names)
    summary = {
        "objects": count,
        "analysed_mm2": next(area.mm2 for area in areas if area.name == ANALYSED),
        "mm2": {area.name: area.mm2 for area in areas[: len(names)]},
        "mpp": settings.mpp,
    }
    write_json(folder / "summary.json", summary)
    return summary
