"""Finds images that show the same tissue: crops of one field, tiles cut with an overlap.

Two images that share pixels are one unit of privacy, and one in training and one in test is a
leak. Public sets are often cut that way and rarely say so.

Two searches, because compression hides one kind from the other:

* landmarks find any shift: windows of 8 x 8 pixels are hashed, those whose hash ends in zeros are
  kept (so that both images keep the same ones), and a pair of images overlaps where several
  textured windows agree under one displacement (Schleimer et al., "Winnowing", SIGMOD 2003);
* border strips find tiles that were compressed after cutting, so that no pixel is equal: the first
  rows of one image are correlated with all rows of the others of its size and site.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

_WINDOW = 8
_KEEP_ONE_IN = 64
_BAND = 128
_MIN_AGREEING = 3
_MIN_WINDOW_VALUES = 24  # distinct grays of 64: flat and smooth blocks repeat by chance
_STRIP = 8
_REDUCE = 8
_MIN_CORRELATION = 0.97
_MIN_STRIP_COLUMNS = 16  # reduced pixels: shorter strips correlate by chance
_MIN_STRIP_STDDEV = 3.0


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What is remembered of one image, about half a byte a pixel.

    Attributes:
        landmarks: uint32 [M], hashes of chosen windows, each once.
        corners: int32 [M, 2], their rows and columns.
        down: float16 [H - 7, 2, W // 8], strips of eight rows, reduced.
        across: float16 [W - 7, 2, H // 8], the same of the transposed image.
    """

    landmarks: np.ndarray
    corners: np.ndarray
    down: np.ndarray
    across: np.ndarray


def fingerprint(image: np.ndarray) -> Fingerprint:
    """Fingerprint of an RGB image, uint8 [H, W, 3]."""
    landmarks, corners = _landmarks(image)
    gray = image[..., 0].astype(np.uint16)
    gray += image[..., 1]
    gray += image[..., 2]
    across = _strips(np.ascontiguousarray(gray.T))
    return Fingerprint(landmarks, corners, _strips(gray), across)


def overlapping_pairs(
    fingerprints: Sequence[Fingerprint], groups: Sequence[str]
) -> list[tuple[int, int]]:
    """Pairs (a, b), a < b, of images that share tissue.

    Where many images share one spot, they are linked in a chain, not each with each.

    Args:
        fingerprints: of the images.
        groups: group of each image; compressed overlaps are searched within a group (a site) only.
    """
    pairs = _by_landmarks(fingerprints)
    members: dict[tuple, list[int]] = {}
    for i, (some, group) in enumerate(zip(fingerprints, groups, strict=True)):
        members.setdefault((group, "down", some.down.shape[2]), []).append(i)
        members.setdefault((group, "across", some.across.shape[2]), []).append(i)
    for (_, direction, _), indices in members.items():
        strips = [getattr(fingerprints[i], direction) for i in indices]
        pairs |= {(indices[a], indices[b]) for a, b in _by_strips(strips)}
    return sorted({(min(pair), max(pair)) for pair in pairs})


def _landmarks(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes and corners of the textured windows of an image that occur in it once."""
    if min(image.shape[:2]) < _WINDOW:
        return np.zeros((0,), np.uint32), np.zeros((0, 2), np.int32)
    found = []
    for start in range(0, len(image) - _WINDOW + 1, _BAND):  # in bands: they fit the cache
        hashes = _window_hashes(image[start : start + _BAND + _WINDOW - 1])
        chosen = (hashes & np.uint32((_KEEP_ONE_IN - 1) << 16)) == 0
        chosen[:, 1:] &= hashes[:, 1:] != hashes[:, :-1]  # blank areas are chosen all or none
        y, x = np.nonzero(chosen)
        found.append((hashes[y, x], y + start, x))
    values, y, x = (np.concatenate(parts) for parts in zip(*found, strict=True))
    unique, index, counts = np.unique(values, return_index=True, return_counts=True)
    unique, index = unique[counts == 1], index[counts == 1]
    y, x = y[index], x[index]
    windows = np.lib.stride_tricks.sliding_window_view(image[..., 1], (_WINDOW, _WINDOW))
    grays = np.sort(windows[y, x].reshape(len(y), _WINDOW**2), axis=1)
    is_textured = (np.diff(grays, axis=1) > 0).sum(1) + 1 >= _MIN_WINDOW_VALUES
    corners = np.stack([y, x], axis=1).astype(np.int32)
    return unique[is_textured], corners[is_textured]


def _window_hashes(image: np.ndarray) -> np.ndarray:
    """Hash uint32 [H - 7, W - 7] of the window that begins at each pixel."""
    red, green, blue = (image[..., c].astype(np.uint32) for c in range(3))
    hashes = red * np.uint32(0x1F123BB5) + green * np.uint32(0x05491333) + blue
    for axis, base in ((0, 0x9E3779B1), (1, 0x85EBCA77)):
        width = 1
        while width < _WINDOW:  # a window of 2n is a window of n beside another
            factor = np.uint32(pow(base, width, 2**32))
            length = hashes.shape[axis] - width
            first = hashes[:, :length] if axis else hashes[:length]
            second = hashes[:, width:] if axis else hashes[width:]
            hashes = first * factor
            hashes += second
            width *= 2
    hashes ^= hashes >> np.uint32(15)  # the low bits of a product know only low bits
    hashes *= np.uint32(0x2C1B3C6D)
    return hashes


def _by_landmarks(fingerprints: Sequence[Fingerprint]) -> set[tuple[int, int]]:
    """Pairs with several equal windows at one displacement."""
    if not fingerprints:
        return set()
    owner = np.repeat(np.arange(len(fingerprints)), [len(f.landmarks) for f in fingerprints])
    landmarks = np.concatenate([f.landmarks for f in fingerprints])
    corners = np.concatenate([f.corners for f in fingerprints])
    order = np.argsort(landmarks, kind="stable")
    landmarks, owner, corners = landmarks[order], owner[order], corners[order]
    same = np.flatnonzero(landmarks[1:] == landmarks[:-1])
    moves = corners[same + 1] - corners[same]
    agreeing, counts = np.unique(
        np.column_stack([owner[same], owner[same + 1], moves]), axis=0, return_counts=True
    )
    return {(int(a), int(b)) for a, b in agreeing[counts >= _MIN_AGREEING, :2]}


def _strips(gray: np.ndarray) -> np.ndarray:
    """float16 [H - 7, 2, W // 8] of a sum of three channels, uint16 [H, W].

    Eight rows from each row on, as two rows of reduced pixels.
    """
    height, width = gray.shape
    if height < _STRIP or width < _MIN_STRIP_COLUMNS * _REDUCE:
        return np.zeros((0, 2, width // _REDUCE), np.float16)
    columns = gray[:, : width // _REDUCE * _REDUCE].reshape(height, -1, _REDUCE)
    reduced = columns.sum(-1, dtype=np.uint16).astype(np.float32) / (3 * _REDUCE)
    half = _STRIP // 2
    shifted = [reduced[i : height - half + 1 + i] for i in range(half)]
    rows = functools.reduce(np.add, shifted) / half
    return np.stack([rows[:-half], rows[half:]], axis=1).astype(np.float16)


def _by_strips(strips: Sequence[np.ndarray]) -> set[tuple[int, int]]:
    """Pairs where the first strip of one image lies somewhere in another."""
    present = [i for i, some in enumerate(strips) if len(some)]
    if len(present) < 2:
        return set()
    firsts, has_contrast = _normalise(np.stack([strips[i][0] for i in present]))
    pairs = set()
    for i in present:
        rows, _ = _normalise(strips[i])
        best = np.where(has_contrast, (rows @ firsts.T).max(axis=0), -1.0)
        pairs |= {(i, present[j]) for j in np.flatnonzero(best >= _MIN_CORRELATION)}
    return {(a, b) for a, b in pairs if a != b}


def _normalise(strips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Strips as unit vectors [N, P] without their mean, and whether each shows anything."""
    flat = strips.reshape(len(strips), -1).astype(np.float32)
    flat = flat - flat.mean(axis=1, keepdims=True)
    stddev = np.sqrt(np.mean(flat**2, axis=1, keepdims=True))
    unit = flat / np.maximum(stddev, 1e-6) / np.sqrt(flat.shape[1])
    return unit, stddev[:, 0] >= _MIN_STRIP_STDDEV
