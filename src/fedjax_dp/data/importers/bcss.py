"""BCSS (Amgad et al., Bioinformatics 2019): regions of TCGA breast slides, 0.25 µm a pixel.

Names are like TCGA-A1-A0SK-DX1_xmin45749_ymin25055_MPP-0.2500.png, images in `images` (or
`rgbs_colorNormalized`), masks in `masks`. Of the 22 codes of a mask 0 is "outside the region".
"""

import functools
import pathlib
import re

import numpy as np

from fedjax_dp.data.images import read_image, read_mask
from fedjax_dp.data.importers.regions import (
    DataSet,
    LayoutError,
    SourceRegion,
    check_sizes,
    folder_of,
    tcga,
)
from fedjax_dp.data.splits import EXTERNAL
from fedjax_dp.data.tiles import IGNORE_INDEX

CLASS_NAMES = ("other", "tumour", "stroma", "lymphocytic", "necrosis")
"""The five groups; "other" takes the place of the background."""

GROUPS = {1: (1, 19, 20), 2: (2,), 3: (3, 10, 11), 4: (4,)}
"""Class -> codes: angioinvasion and in-situ carcinoma are tumour, plasma cells and other immune
infiltrate are lymphocytic. Outside (0) and "exclude" (7) are ignored; all the rest is other."""

EXTERNAL_SITES = ("E2", "EW", "OL", "GM", "LL", "S3")
"""Held-out tissue source sites."""

_LAST_CODE = 21
_MPP = re.compile(r"_MPP-(\d+(?:\.\d+)?)")


def read_bcss(root: pathlib.Path) -> DataSet:
    """The regions, sites being tissue source sites.

    Raises:
        LayoutError: no such layout.
    """
    images = folder_of(root, ("images", "rgbs_colorNormalized", "rgbs"), "PNG images")
    masks = folder_of(root, ("masks",), "PNG masks")
    paths = sorted(images.glob("*.png"))
    if not paths:
        raise LayoutError(f"Expected PNG images in {images}, got none.")
    regions = []
    for path in paths:
        site, patient = tcga(path.stem)
        found = _MPP.search(path.stem)
        regions.append(
            SourceRegion(
                name=path.stem,
                site=site,
                patient=patient,
                split=EXTERNAL if site[5:].upper() in EXTERNAL_SITES else "",
                mpp=float(found.group(1)) if found else 0.25,
                load=functools.partial(_load, path, masks / path.name),
            )
        )
    return DataSet(regions=tuple(regions), class_names=CLASS_NAMES)


def _load(image_path: pathlib.Path, mask_path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    image, codes = read_image(image_path), read_mask(mask_path)
    check_sizes(image_path.name, image, codes)
    if codes.max(initial=0) > _LAST_CODE:
        raise LayoutError(
            f"Expected codes 0 to {_LAST_CODE} in {mask_path}, got {int(codes.max())}. Is it BCSS?"
        )
    table = np.zeros(_LAST_CODE + 1, np.uint8)
    table[[0, 7]] = IGNORE_INDEX
    for label, members in GROUPS.items():
        table[list(members)] = label
    return image, table[codes]
