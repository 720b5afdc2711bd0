"""The annotation of one slide, whoever drew it, as labels of any region of pixels."""

import gzip
import pathlib
import zlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import shapely
import shapely.errors
from shapely.geometry.base import BaseGeometry

from fedjax_dp.data.annotations.aperio import is_aperio, read_aperio
from fedjax_dp.data.annotations.asap import is_asap, read_asap
from fedjax_dp.data.annotations.classes import ClassTable
from fedjax_dp.data.annotations.geojson import read_geojson
from fedjax_dp.data.annotations.mask_images import MaskLabels
from fedjax_dp.data.annotations.rasterise import Grid, rasterise
from fedjax_dp.data.annotations.shapes import Annotation, AnnotationError, Findings
from fedjax_dp.data.annotations.xml_text import parse_xml
from fedjax_dp.data.tiles import IGNORE_INDEX

MAX_BYTES = 2**30
"""Of an annotation file, also when it is unpacked."""

_PICTURES = (b"\x89PNG", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"BM", b"\xff\xd8\xff")


class RegionLabels(Protocol):
    """Labels of a slide."""

    @property
    def findings(self) -> Findings:
        """What was skipped, repaired or odd."""
        ...

    def label_region(
        self, x: float, y: float, width: int, height: int, scale_x: float, scale_y: float
    ) -> np.ndarray:
        """Labels of a grid of output pixels.

        Args:
            x: of the grid's corner, level-0 pixels.
            y: likewise.
            width: output pixels.
            height: output pixels.
            scale_x: level-0 pixels per output pixel.
            scale_y: likewise.

        Returns:
            uint8 [height, width], by the output pixels' centres; 255 = ignore.
        """
        ...


def open_labels(
    path: pathlib.Path | None,
    *,
    table: ClassTable,
    dimensions: tuple[int, int],
    unannotated: str | None = None,
    unknown: str = "error",
    offset: tuple[float, float] = (0.0, 0.0),
) -> RegionLabels:
    """Opens an annotation: QuPath GeoJSON, ASAP or Aperio XML, or a mask image, told by content.

    Args:
        path: of the file; None = nobody drew anything, and `unannotated` says what that means.
        table: of classes.
        dimensions: (width, height) of the slide's level 0.
        unannotated: what pixels are that lie in no shape, where no region of interest is drawn:
            "background", "ignore", or None where that is an error.
        unknown: what shapes of a class are that the table does not know: "error" or "ignore".
        offset: what is added to the file's coordinates: the corner of the slide's bounds where the
            tool counted from there, as QuPath does for slides that have bounds.

    Raises:
        AnnotationError: unreadable, unknown classes, nothing said about unannotated pixels, or
            shapes of which most lie outside the slide.
    """
    if unannotated not in (None, "background", "ignore") or unknown not in ("error", "ignore"):
        raise AnnotationError(
            "Expected unannotated None, background or ignore and unknown error or ignore, got "
            f"{unannotated=}, {unknown=}."
        )
    if path is None:
        return _Shapes("no annotation", [], Findings(), table, unannotated)
    data = _bytes(path)
    if data.startswith(_PICTURES):
        return MaskLabels(path, table, dimensions)
    findings = Findings()
    try:
        found = _shapes(data, findings)
    except AnnotationError as error:
        raise AnnotationError(f"The annotation {path} {error}.") from error
    except shapely.errors.ShapelyError as error:
        raise AnnotationError(f"Cannot make polygons of {path}: {error}. Redraw it.") from error
    found = _moved(found, offset, dimensions, path, findings)
    return _Shapes(str(path), found, findings, table, unannotated, unknown)


def read_polygons(path: pathlib.Path, offset: tuple[float, float] = (0.0, 0.0)) -> BaseGeometry:
    """All shapes of a file as one, whatever their classes: a tissue outline, for instance.

    Raises:
        AnnotationError: unreadable, or without a shape.
    """
    try:
        found = _shapes(_bytes(path), Findings())
    except AnnotationError as error:
        raise AnnotationError(f"The annotation {path} {error}.") from error
    if not found:
        raise AnnotationError(f"Expected outlines in {path}, got none.")
    whole = shapely.union_all([annotation.geometry for annotation in found])
    return shapely.transform(whole, lambda points: points + np.asarray(offset))


def _bytes(path: pathlib.Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if data[:2] == b"\x1f\x8b":
            with gzip.open(path) as unpacked:
                data = unpacked.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise AnnotationError(f"Cannot read {path}: {error}.") from error
    if len(data) > MAX_BYTES:
        raise AnnotationError(f"Expected at most {MAX_BYTES:,} bytes, got {path} with more.")
    return data


def _shapes(data: bytes, findings: Findings) -> list[Annotation]:
    text = data.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        raise AnnotationError("is empty")
    if text[:1] in (b"{", b"["):
        try:
            return read_geojson(text.decode("utf-8"), findings)
        except UnicodeDecodeError as error:
            raise AnnotationError(f"is no UTF-8 text ({error.reason})") from error
    if text[:1] == b"<" or data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        root = parse_xml(data)
        if is_asap(root):
            return read_asap(root, findings)
        if is_aperio(root):
            return read_aperio(root, findings)
        raise AnnotationError("is XML of neither ASAP nor ImageScope")
    raise AnnotationError(f"begins with {text[:8]!r}: neither GeoJSON nor XML nor a mask image")


def _moved(
    found: list[Annotation],
    offset: tuple[float, float],
    dimensions: tuple[int, int],
    path: pathlib.Path,
    findings: Findings,
) -> list[Annotation]:
    """The shapes in level-0 pixels, without those that lie outside the slide."""
    slide = shapely.box(0, 0, *dimensions)
    moved, outside = [], 0
    for annotation in found:
        geometry = shapely.transform(
            annotation.geometry, lambda points: points + np.asarray(offset)
        )
        if not slide.intersects(geometry):
            outside += 1
            continue
        if not shapely.box(*geometry.bounds).within(slide):
            findings.add("shapes that reach beyond the slide")
        moved.append(Annotation(geometry, annotation.name, annotation.role))
    if outside > len(moved):
        other = "file" if any(offset) else "bounds"
        raise AnnotationError(
            f"{outside:,} of {len(found):,} shapes of {path} lie outside the slide of "
            f"{dimensions[0]:,} x {dimensions[1]:,} pixels. The tool may count from elsewhere: try "
            f"--origin={other}, or look whether it is another slide's."
        )
    if outside:
        findings.add("shapes outside the slide, skipped", outside)
    return moved


class _Shapes:
    """Drawn shapes, in the order in which they are painted."""

    def __init__(
        self,
        name: str,
        found: Sequence[Annotation],
        findings: Findings,
        table: ClassTable,
        unannotated: str | None,
        unknown: str = "error",
    ) -> None:
        self.findings = findings
        has_region = any(annotation.role == "region" for annotation in found)
        if not has_region and unannotated is None:
            raise AnnotationError(
                f"Nothing says what the pixels outside all shapes are ({name}): no region of "
                "interest is drawn. Pass --unannotated=background where everything was "
                "annotated, --unannotated=ignore where only parts were."
            )
        labelled = [(a.geometry, *_painted(a, table)) for a in found if a.role != "region"]
        _check_known(name, labelled, findings, unknown)
        # The class that stands last in the table is painted last, what is to be ignored after all.
        ordered = sorted(labelled, key=lambda item: item[1])
        self._painted = [(geometry, label) for geometry, label, _ in ordered]
        self._tree = shapely.STRtree([geometry for geometry, _ in self._painted])
        regions = [(a.geometry, 1) for a in found if a.role == "region"]
        self._regions = regions
        self._region_tree = shapely.STRtree([geometry for geometry, _ in regions])
        self._background = IGNORE_INDEX if not has_region and unannotated == "ignore" else 0

    def label_region(
        self, x: float, y: float, width: int, height: int, scale_x: float, scale_y: float
    ) -> np.ndarray:
        """See `RegionLabels.label_region`."""
        box = shapely.box(x, y, x + width * scale_x, y + height * scale_y)
        grid = Grid(x, y, width, height, (scale_x, scale_y))
        there = [self._painted[i] for i in sorted(self._tree.query(box))]
        labels, overlaps = rasterise(there, grid, background=self._background)
        if overlaps:
            self.findings.add("pixels claimed by two classes", overlaps)
        if self._regions:
            inside = [self._regions[i] for i in self._region_tree.query(box)]
            in_region, _ = rasterise(inside, grid)
            labels[in_region == 0] = IGNORE_INDEX
        return labels


def _painted(annotation: Annotation, table: ClassTable) -> tuple[int, str]:
    """(label, name) of a shape; label -1 where the table does not know its class."""
    if annotation.role == "ignore":
        return IGNORE_INDEX, annotation.name
    label = table.label(annotation.name)
    return (-1 if label is None else label), annotation.name


def _check_known(
    name: str,
    labelled: list[tuple[BaseGeometry, int, str]],
    findings: Findings,
    unknown: str,
) -> None:
    """Refuses unknown classes, or makes their shapes ignored, in place."""
    strangers: dict[str, int] = {}
    for number, (geometry, label, class_name) in enumerate(labelled):
        if label < 0:
            strangers[class_name] = strangers.get(class_name, 0) + 1
            labelled[number] = geometry, IGNORE_INDEX, class_name
    if strangers and unknown == "error":
        listed = ", ".join(f"{n or '(no class)'!r} ({c})" for n, c in sorted(strangers.items()))
        raise AnnotationError(
            f"{name} has classes that the table does not know: {listed}. Add them to --classes, "
            "for instance as other names of a class or of ignore, or pass --unknown=ignore."
        )
    for class_name, count in strangers.items():
        findings.add(f"shapes of the unknown class {class_name!r}, ignored", count)
