"""MoNuSeg (Kumar et al., IEEE TMI 2020): 1000 px of TCGA slides of many organs, nuclei outlined.

Images lie in `Tissue Images` (or `images`), ImageScope annotations of the same names in
`Annotations` (or `annotations_xml`).
"""

import functools
import pathlib

import numpy as np

from fedjax_dp.data.annotations.classes import ClassTable
from fedjax_dp.data.annotations.reading import open_labels
from fedjax_dp.data.images import read_image
from fedjax_dp.data.importers.regions import DataSet, LayoutError, SourceRegion, folder_of, tcga

CLASS_NAMES = ("background", "nucleus")
_MPP = 0.25
_ENDINGS = (".tif", ".tiff", ".png")
# All outlines are nuclei, whatever the name of their layer.
_TABLE = ClassTable.from_text("background; nucleus")


def read_monuseg(root: pathlib.Path) -> DataSet:
    """The images, sites being tissue source sites; one without annotation fails to load.

    Raises:
        LayoutError: no such layout.
    """
    images = folder_of(root, ("Tissue Images", "images"), "TIFF images")
    drawn = folder_of(root, ("Annotations", "annotations_xml"), "XML annotations")
    regions = []
    for path in sorted(p for p in images.iterdir() if p.suffix.lower() in _ENDINGS):
        annotation = drawn / f"{path.stem}.xml"
        site, patient = tcga(path.stem)
        regions.append(
            SourceRegion(
                name=path.stem,
                site=site,
                patient=patient,
                mpp=_MPP,
                load=functools.partial(_load, path, annotation),
            )
        )
    if not regions:
        raise LayoutError(f"Expected TIFF or PNG images in {images}, got none.")
    return DataSet(regions=tuple(regions), class_names=CLASS_NAMES)


def _load(image_path: pathlib.Path, annotation: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    image = read_image(image_path)
    height, width = image.shape[:2]
    found = open_labels(
        annotation,
        table=_AnyName(_TABLE.names, {}),
        dimensions=(width, height),
        unannotated="background",
    )
    return image, found.label_region(0, 0, width, height, 1.0, 1.0)


class _AnyName(ClassTable):
    """A table in which every name is a nucleus."""

    def label(self, name: str) -> int | None:
        """Always the nucleus."""
        del name
        return 1
