"""CoNSeP (Graham et al., MedIA 2019): 1000 px of colorectal slides, nuclei segmented.

Published as Train and Test with `Images` (PNG) and `Labels` (MATLAB, `inst_map`). Also as patches
of 256 px, 16 an image, in `images` and `seg_mask` (PNG): those of the last row and column
overlap their neighbours, so they are put together to whole images again.
"""

import functools
import pathlib
import re

import numpy as np
import scipy.io

from fedjax_dp.data.images import read_image, read_mask
from fedjax_dp.data.importers.regions import (
    DataSet,
    LayoutError,
    SourceRegion,
    check_sizes,
)
from fedjax_dp.data.splits import TEST, TRAIN
from fedjax_dp.data.tiles import IGNORE_INDEX

CLASS_NAMES = ("background", "nucleus")
_SITE, _HOSPITAL = "uhcw", "University Hospitals Coventry and Warwickshire"
_MPP = 0.25
_SIDE, _PATCH = 1000, 256
_PATCH_NAME = re.compile(r"^(?P<image>.+?)_(?P<number>\d{1,3})$")


def read_consep(root: pathlib.Path) -> DataSet:
    """The whole images. Patients are not told by the data set; an image is the largest unit.

    Raises:
        LayoutError: no such layout.
    """
    regions = _published(root) or _patches(root)
    if not regions:
        raise LayoutError(
            f"Expected Train/Images and Train/Labels in {root}, or images and seg_mask with "
            "patches, got neither."
        )
    return DataSet(regions=tuple(regions), class_names=CLASS_NAMES)


def _region(name: str, split: str, load: functools.partial) -> SourceRegion:  # type: ignore[type-arg]
    return SourceRegion(name=name, site=_SITE, hospital=_HOSPITAL, split=split, mpp=_MPP, load=load)


def _published(root: pathlib.Path) -> list[SourceRegion]:
    found = []
    for part, split in (("Train", TRAIN), ("Test", TEST)):
        for path in sorted((root / part / "Images").glob("*.png")):
            labels = root / part / "Labels" / f"{path.stem}.mat"
            found.append(_region(path.stem, split, functools.partial(_load, path, labels)))
    return found


def _load(image_path: pathlib.Path, label_path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    image = read_image(image_path)
    try:
        instances = scipy.io.loadmat(label_path)["inst_map"]
    except Exception as error:  # a damaged file raises many types
        raise LayoutError(f"Cannot read inst_map of {label_path}: {error!r}.") from error
    labels = (np.asarray(instances) > 0).astype(np.uint8)
    check_sizes(image_path.name, image, labels)
    return image, labels


def _patches(root: pathlib.Path) -> list[SourceRegion]:
    images = root / "images"
    groups: dict[str, dict[int, pathlib.Path]] = {}
    for path in sorted(images.iterdir()) if images.is_dir() else []:
        if match := _PATCH_NAME.match(path.stem):
            groups.setdefault(match["image"], {})[int(match["number"])] = path
    found = []
    first = 0 if any(0 in paths for paths in groups.values()) else 1
    for name, paths in sorted(groups.items()):
        if max(paths) >= first + len(corners()):
            raise LayoutError(
                f"Expected patches {first} to {first + len(corners()) - 1} of {name} in {images}, "
                f"got {max(paths)}."
            )
        ordered = [(path, corners()[number - first]) for number, path in sorted(paths.items())]
        split = TRAIN if name.startswith("train") else TEST if name.startswith("test") else ""
        found.append(_region(name, split, functools.partial(_assembled, root, ordered)))
    return found


def corners(side: int = _SIDE, patch: int = _PATCH) -> list[tuple[int, int]]:
    """(y, x) of the patches in the order in which they are numbered.

    Whole patches row by row, then the bottom row, the right column and the corner, which reach
    back over what is there already.
    """
    inner = [start for start in range(0, side - patch + 1, patch) if start + patch <= side]
    last = side - patch
    rest = [start for start in inner if start != last]
    return [
        *((y, x) for y in rest for x in rest),
        *((last, x) for x in rest),
        *((y, last) for y in rest),
        (last, last),
    ]


def _assembled(
    root: pathlib.Path, paths: list[tuple[pathlib.Path, tuple[int, int]]]
) -> tuple[np.ndarray, np.ndarray]:
    """One image of its patches; where they overlap the earlier one stays.

    What no patch shows is white, and ignored.

    Raises:
        LayoutError: labels disagree where patches overlap: the patches are of another order.
    """
    image = np.full((_SIDE, _SIDE, 3), 255, np.uint8)
    labels = np.full((_SIDE, _SIDE), IGNORE_INDEX, np.uint8)
    known = np.zeros((_SIDE, _SIDE), bool)
    for path, (y, x) in paths:
        pixels, mask = read_image(path), _mask(root / "seg_mask", path.stem)
        check_sizes(path.name, pixels, mask)
        box = np.s_[y : y + _PATCH, x : x + _PATCH]
        if pixels.shape[:2] != known[box].shape:
            raise LayoutError(f"Expected {path} of {_PATCH} pixels, got {pixels.shape[:2]}.")
        if (labels[box] != mask)[known[box]].any():
            raise LayoutError(
                f"Labels of {path} disagree with those of the patches it overlaps. Their order is "
                "not the one expected: whole patches by rows, bottom row, right column, corner."
            )
        new = ~known[box]
        image[box][new], labels[box][new] = pixels[new], mask[new]
        known[box] = True
    return image, labels


def _mask(folder: pathlib.Path, stem: str) -> np.ndarray:
    path = folder / f"{stem}.png"
    if not path.exists():
        raise LayoutError(f"Expected a mask {path}, got none.")
    return (read_mask(path) > 0).astype(np.uint8)
