"""Labelled tiles and whose they are: the host's dictionary, and the grid that cuts an image."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

IGNORE_INDEX = 255
"""Label of pixels that no loss and no metric may see."""

UNKNOWN_PATIENT = -1
"""Value of `TileTable.patient` where the source does not say whose tissue it is."""

MIN_SATURATION = 20
"""Of 255: pixels below it are glass. Slide-wise thresholds settle between 8 and 40."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileTable:
    """N tiles of one split, and the site, slide and patient each belongs to.

    Attributes:
        images: uint8 [N, H, W, 3], RGB; in memory, or read as it is indexed (`StoredPixels`).
        labels: uint8 [N, H, W], class index per pixel, 255 = ignore; likewise.
        site: int32 [N], index into `sites`.
        slide: int32 [N], index into `slides` (a source image counts as a slide).
        patient: int32 [N], index into `patients`, -1 where unknown.
        sites: names of the sites, in the order of `site`.
        slides: names of the slides.
        patients: names of the patients.
        digest: of all images and labels, where who made the table knows it; empty = not known.
    """

    images: np.ndarray
    labels: np.ndarray
    site: np.ndarray
    slide: np.ndarray
    patient: np.ndarray
    sites: tuple[str, ...]
    slides: tuple[str, ...]
    patients: tuple[str, ...]
    digest: bytes = b""

    def __post_init__(self) -> None:
        n, height, width = self.labels.shape
        if self.images.shape != (n, height, width, 3):
            raise ValueError(
                f"Expected images of shape {(n, height, width, 3)} beside labels of shape "
                f"{self.labels.shape}, got {self.images.shape}."
            )
        for name in ("images", "labels"):
            if getattr(self, name).dtype != np.uint8:
                raise ValueError(f"Expected uint8 {name}, got {getattr(self, name).dtype}.")
        for name in ("site", "slide", "patient"):
            if getattr(self, name).shape != (n,):
                raise ValueError(
                    f"Expected {name} of shape ({n},), got {getattr(self, name).shape}."
                )

    def __len__(self) -> int:
        return len(self.labels)

    def of_site(self, name: str) -> np.ndarray:
        """Indices int32 [n] of the tiles of site `name`, in table order."""
        if name not in self.sites:
            return np.zeros((0,), np.int32)
        return np.flatnonzero(self.site == self.sites.index(name)).astype(np.int32)


class TileSource(Protocol):
    """Training tiles wherever they lie, read by their numbers in the training table.

    One thread reads from it at a time, and that need not be the one that made it.
    """

    @property
    def tile_size(self) -> int:
        """Side of a tile, pixels."""
        ...

    def __len__(self) -> int:
        """The number of tiles."""
        ...

    def images(self, index: np.ndarray) -> np.ndarray:
        """uint8 [n, H, W, 3] of the tiles `index`, int [n], distinct and ascending."""
        ...

    def labels(self, index: np.ndarray) -> np.ndarray:
        """uint8 [n, H, W] of the tiles `index`, int [n], distinct and ascending."""
        ...


class TileArrays:
    """The `TileSource` of what is indexed like NumPy: arrays in memory, on disk (`np.memmap`)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Takes uint8 images [N, H, W, 3] and labels [N, H, W]; neither is read yet."""
        self._images, self._labels = images, labels

    @property
    def tile_size(self) -> int:
        """Side of a tile, pixels."""
        return self._labels.shape[1]

    def __len__(self) -> int:
        return len(self._labels)

    def images(self, index: np.ndarray) -> np.ndarray:
        """uint8 [n, H, W, 3], a copy."""
        return np.asarray(self._images[index])

    def labels(self, index: np.ndarray) -> np.ndarray:
        """uint8 [n, H, W], a copy."""
        return np.asarray(self._labels[index])


class Grid(NamedTuple):
    """Where the tiles of one image begin: top left corners int32 [N] and the padded size."""

    top: np.ndarray
    left: np.ndarray
    height: int
    width: int


def grid(height: int, width: int, tile_size: int, stride: int) -> Grid:
    """Tiles in reading order that together cover every pixel of an image.

    Guarantees: with `stride == tile_size` every pixel lies in exactly one tile; with a smaller
    stride in at least one. Tiles that reach over the edge are padded, never moved inwards,
    because a moved tile would show pixels twice.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        tile_size: side of a tile, in pixels.
        stride: distance of neighbouring tiles, in pixels, 1 to `tile_size`.

    Returns:
        The corners, and the smallest size that holds all tiles.

    Raises:
        ValueError: a size below one, or a stride that leaves gaps.
    """
    for name, value in (("height", height), ("width", width), ("tile_size", tile_size)):
        if value < 1:
            raise ValueError(f"Expected {name} >= 1 pixel, got {value}.")
    if not 1 <= stride <= tile_size:
        raise ValueError(
            f"Expected 1 <= stride <= {tile_size=}, got {stride=}. A larger stride would leave "
            "pixels out."
        )
    tops = _starts(height, tile_size, stride)
    lefts = _starts(width, tile_size, stride)
    top, left = np.meshgrid(tops, lefts, indexing="ij")
    return Grid(
        top=top.ravel().astype(np.int32),
        left=left.ravel().astype(np.int32),
        height=int(tops[-1]) + tile_size,
        width=int(lefts[-1]) + tile_size,
    )


def _starts(length: int, tile_size: int, stride: int) -> np.ndarray:
    """Starts along one axis: the last tile is the first that reaches the end."""
    count = 1 + max(0, -(-(length - tile_size) // stride))
    return np.arange(count) * stride


def cut(
    image: np.ndarray,
    labels: np.ndarray,
    *,
    tile_size: int,
    stride: int,
    min_tissue: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts an image and its labels to tiles of one size.

    Beyond the edge the image is mirrored, so that a network sees tissue and no black frame, and
    the labels are 255, so that no loss and no metric sees it.

    Args:
        image: uint8 [H, W, 3].
        labels: uint8 [H, W].
        tile_size: side of a tile, in pixels.
        stride: distance of neighbouring tiles, in pixels.
        min_tissue: tiles whose fraction of tissue is below this are left out, unless something
            other than background is annotated in them. Zero keeps all.

    Returns:
        Tiles uint8 [N, tile_size, tile_size, 3] and labels uint8 [N, tile_size, tile_size].

    Raises:
        ValueError: shapes that do not fit, or `min_tissue` outside [0, 1].
    """
    if image.shape != (*labels.shape, 3):
        raise ValueError(
            f"Expected image [H, W, 3], labels [H, W]; got {image.shape}, {labels.shape}."
        )
    if not 0.0 <= min_tissue <= 1.0:
        raise ValueError(f"Expected 0 <= min_tissue <= 1, got {min_tissue=}.")
    height, width = labels.shape
    where = grid(height, width, tile_size, stride)
    after = ((0, where.height - height), (0, where.width - width))
    padded = np.pad(image, (*after, (0, 0)), mode="symmetric")
    padded_labels = np.pad(labels, after, constant_values=IGNORE_INDEX)
    corners = list(zip(where.top.tolist(), where.left.tolist(), strict=True))
    if min_tissue > 0.0:
        corners = [
            (y, x)
            for y, x in corners
            if _is_worth_keeping(image, labels, y, x, tile_size, min_tissue)
        ]
    tiles = np.empty((len(corners), tile_size, tile_size, 3), np.uint8)
    tile_labels = np.empty((len(corners), tile_size, tile_size), np.uint8)
    for i, (y, x) in enumerate(corners):
        tiles[i] = padded[y : y + tile_size, x : x + tile_size]
        tile_labels[i] = padded_labels[y : y + tile_size, x : x + tile_size]
    return tiles, tile_labels


def _is_worth_keeping(
    image: np.ndarray, labels: np.ndarray, y: int, x: int, tile_size: int, min_tissue: float
) -> bool:
    """Whether a tile is annotated or shows enough tissue, judged on real pixels alone."""
    part = labels[y : y + tile_size, x : x + tile_size]
    if ((part != 0) & (part != IGNORE_INDEX)).any():
        return True
    return tissue_fraction(image[y : y + tile_size, x : x + tile_size]) >= min_tissue


def tissue_fraction(image: np.ndarray) -> float:
    """Fraction of the pixels of `image` (uint8 [H, W, 3]) that are stained.

    A pixel counts where its saturation (largest minus smallest channel, over the largest) reaches
    `MIN_SATURATION`. The threshold is fixed: one fitted to a slide (Otsu) would let the tiles of a
    slide decide about each other, and then a tile would be no unit of privacy.
    """
    return float(np.mean(saturation_of(image)[2] >= MIN_SATURATION))


def saturation_of(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Largest channel int32, its distance to the smallest, and saturation uint8, of every pixel."""
    largest = image.max(-1).astype(np.int32)
    span = largest - image.min(-1)
    return largest, span, (span * 255 // np.maximum(largest, 1)).astype(np.uint8)


def blank_tiles(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [count, 0, 0, 3] and labels uint8 [count, 0, 0], where tiles only count."""
    return np.empty((count, 0, 0, 3), np.uint8), np.empty((count, 0, 0), np.uint8)


def concatenate(
    parts: Sequence[tuple[np.ndarray, np.ndarray]],
    owners: Sequence[tuple[str, str, str]],
    tile_size: int,
) -> TileTable:
    """One table from the tiles of many images.

    Args:
        parts: (tiles uint8 [n, H, W, 3], labels uint8 [n, H, W]) of each image.
        owners: (site, slide, patient) of each image; an empty patient is unknown.
        tile_size: side of a tile in pixels, for a table without tiles.

    Returns:
        The table; it names only sites, slides and patients that have tiles, in order of
        appearance.
    """
    present = [(part, owner) for part, owner in zip(parts, owners, strict=True) if len(part[1])]
    sites, slides, patients = (
        tuple(dict.fromkeys(owner[i] for _, owner in present if owner[i])) for i in range(3)
    )
    counts = [len(labels) for (_, labels), _ in present]
    total = sum(counts)
    images = np.empty((total, tile_size, tile_size, 3), np.uint8)
    labels = np.empty((total, tile_size, tile_size), np.uint8)
    start = 0
    for (some_images, some_labels), _ in present:
        images[start : start + len(some_labels)] = some_images
        labels[start : start + len(some_labels)] = some_labels
        start += len(some_labels)

    def index(column: int, names: tuple[str, ...]) -> np.ndarray:
        number = {name: i for i, name in enumerate(names)}
        of_image = [number.get(owner[column], UNKNOWN_PATIENT) for _, owner in present]
        return np.repeat(np.asarray(of_image, np.int32), counts).astype(np.int32)

    return TileTable(
        images=images,
        labels=labels,
        site=index(0, sites),
        slide=index(1, slides),
        patient=index(2, patients),
        sites=sites,
        slides=slides,
        patients=patients,
    )
