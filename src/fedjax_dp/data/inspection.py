"""Opens every image of a manifest once, and tells everything that is wrong with them."""

import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedjax_dp.data import overlap, table_checks
from fedjax_dp.data.images import ImageError, read_image, read_mask
from fedjax_dp.data.manifest import Finding, Level, Manifest, Row
from fedjax_dp.data.splits import EXCLUDED, TRAIN, split_of
from fedjax_dp.data.tiles import IGNORE_INDEX
from fedjax_dp.processor import cores

LABEL_MODES = ("class", "instance")
DEFAULT_CLASS_NAMES = ("background", "nucleus")

Visit = Callable[[Row, str, np.ndarray, np.ndarray, np.ndarray], Any]
"""`visit(row, split, image uint8 [H, W, 3], labels uint8 [H, W], mask as read [H, W])`, on a
thread."""


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What came of opening every image.

    Attributes:
        findings: everything wrong, errors first, each kind in the order of the file.
        splits: the split of each row; "" where the row is not used.
        visited: what `visit` returned for each row; None where it could not be opened.
        digests: of each row's pixels as decoded; empty where they could not be, or are not used.
    """

    findings: tuple[Finding, ...]
    splits: tuple[str, ...]
    visited: tuple[Any, ...]
    digests: tuple[bytes, ...]


@dataclasses.dataclass(frozen=True)
class _Look:
    """What is remembered of one row after its pixels are gone."""

    findings: tuple[Finding, ...] = ()
    digest: bytes = b""
    fingerprint: overlap.Fingerprint | None = None
    has_foreground: bool = False
    has_ignore: bool = False
    visited: Any = None


def check_manifest(
    manifest: Manifest,
    *,
    label_mode: str = "class",
    class_names: Sequence[str] = DEFAULT_CLASS_NAMES,
    tile_size: int | None = None,
) -> list[Finding]:
    """Everything wrong with a manifest, its images and its masks.

    Args:
        manifest: from `read_manifest`.
        label_mode: "class" (pixels are class indices, 255 = ignore) or "instance" (every number
            but 0 is an object of class 1).
        class_names: K names, the index is the label.
        tile_size: warns of images smaller than a tile; None does not.

    Returns:
        Findings, errors first.

    Raises:
        ValueError: an unknown label mode, or not 2 to 255 class names.
    """
    inspected = inspect(
        manifest, label_mode=label_mode, class_names=class_names, tile_size=tile_size
    )
    return list(inspected.findings)


def inspect(
    manifest: Manifest,
    *,
    label_mode: str = "class",
    class_names: Sequence[str] = DEFAULT_CLASS_NAMES,
    tile_size: int | None = None,
    splits: Sequence[str] | None = None,
    visit: Visit | None = None,
) -> Inspection:
    """Opens every image once, on a few threads, checks it and hands it to `visit`.

    Args:
        manifest: from `read_manifest`.
        label_mode: as in `check_manifest`.
        class_names: as in `check_manifest`.
        tile_size: as in `check_manifest`.
        splits: the split of each row, "" for a row that is not used; None takes the manifest's,
            or the keyed hash where it has none.
        visit: called with each image that can be used; what it returns is kept, the pixels are
            not.

    Returns:
        Findings, splits and visits.

    Raises:
        ValueError: an unknown label mode, or not 2 to 255 class names.
    """
    if label_mode not in LABEL_MODES:
        raise ValueError(f"Expected label_mode in {LABEL_MODES}, got {label_mode!r}.")
    if not 2 <= len(class_names) <= IGNORE_INDEX or len(set(class_names)) != len(class_names):
        raise ValueError(
            f"Expected 2 to {IGNORE_INDEX} distinct class names, background first, got "
            f"{tuple(class_names)}."
        )
    rows = manifest.rows
    splits = default_splits(manifest) if splits is None else tuple(splits)

    def look(row: Row, split: str) -> _Look:
        if not split and not (manifest.has_split and not row.split):
            return (
                _Look()
            )  # left out on purpose; one whose split is wrong is looked at all the same
        return _look(manifest, row, split, label_mode, tuple(class_names), tile_size, visit)

    workers = min(8, cores())
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        looks = list(pool.map(look, rows, splits))
    findings = list(manifest.findings)
    for one, split in zip(looks, splits, strict=True):
        for finding in one.findings:
            # A row that nobody uses may be broken: that is often why it is excluded.
            level = "warning" if split == EXCLUDED else finding.level
            findings.append(dataclasses.replace(finding, level=level))
    findings += table_checks.patients(rows, splits)
    if all(row.split for row in rows) or not manifest.has_split:
        findings += table_checks.empty_splits(rows, splits)
    findings += table_checks.resolutions(rows, splits)
    findings += _foreground_findings(rows, splits, looks)
    findings += _same_tissue_findings(rows, splits, looks)
    findings.sort(key=lambda finding: finding.level != "error")
    return Inspection(
        findings=tuple(findings),
        splits=splits,
        visited=tuple(one.visited for one in looks),
        digests=tuple(one.digest for one in looks),
    )


def default_splits(manifest: Manifest, split_key: bytes | None = None) -> tuple[str, ...]:
    """The manifest's own split, or where it has none the keyed hash, for each row."""
    if manifest.has_split:
        return tuple(row.split for row in manifest.rows)
    key = {} if split_key is None else {"split_key": split_key}
    return tuple(split_of(patient=row.patient, image=row.image, **key) for row in manifest.rows)


def to_labels(mask: np.ndarray, *, label_mode: str, num_classes: int) -> np.ndarray:
    """Labels uint8 [H, W] from a mask as `read_mask` returns it.

    Raises:
        ValueError: in mode "class", a label that is neither below `num_classes` nor 255.
    """
    if label_mode == "instance":
        return (mask != 0).astype(np.uint8)
    is_wrong = (mask != IGNORE_INDEX) & ((mask < 0) | (mask >= num_classes))
    if is_wrong.any():
        wrong = [int(value) for value in np.unique(mask[is_wrong])]
        shown = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
        raise ValueError(
            f"labels {shown} outside the class table 0..{num_classes - 1} (and 255 = ignore). Add "
            "the classes to class_names, or use label_mode=instance where numbers count objects."
        )
    return mask.astype(np.uint8)


def _look(
    manifest: Manifest,
    row: Row,
    split: str,
    label_mode: str,
    class_names: tuple[str, ...],
    tile_size: int | None,
    visit: Visit | None,
) -> _Look:
    """Opens one image and its mask; runs on a thread."""
    findings: list[Finding] = []

    def add(level: Level, message: str) -> None:
        findings.append(Finding(level, (row.line,), message))

    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    labels: np.ndarray | None = None
    try:
        image = read_image(manifest.resolve(row.image))
    except ImageError as error:
        add("error", f"image: {error}")
    try:
        mask = read_mask(manifest.resolve(row.mask))
    except ImageError as error:
        add("error", f"mask: {error}")
    if mask is not None:
        try:
            labels = to_labels(mask, label_mode=label_mode, num_classes=len(class_names))
        except ValueError as error:
            add("error", f"mask {row.mask}: {error}")
    if image is None:
        return _Look(tuple(findings))
    if mask is not None and mask.shape != image.shape[:2]:
        add(
            "error",
            f"{row.image} has {image.shape[1]} x {image.shape[0]} pixels, its mask {row.mask} "
            f"{mask.shape[1]} x {mask.shape[0]}. Export the mask again at the size of the image.",
        )
        labels = None
    if tile_size is not None and min(image.shape[:2]) < tile_size:
        add(
            "warning",
            f"{row.image} has {image.shape[1]} x {image.shape[0]} pixels, less than a tile of "
            f"{tile_size}; the rest of the tile is ignored.",
        )
    has_foreground = labels is not None and bool(((labels != 0) & (labels != IGNORE_INDEX)).any())
    has_ignore = labels is not None and bool((labels == IGNORE_INDEX).any())
    if labels is not None and not has_foreground:
        what = "only 0 and 255 (= ignore)" if has_ignore else "background only"
        add("warning", f"the mask {row.mask} is empty: {what}.")
    visited = None
    if visit is not None and mask is not None and labels is not None and split != EXCLUDED:
        visited = visit(row, split, image, labels, mask)
    shape = np.asarray(image.shape, np.int64).tobytes()
    return _Look(
        findings=tuple(findings),
        digest=hashlib.blake2b(shape + image.tobytes(), digest_size=16).digest(),
        fingerprint=None if split == EXCLUDED else overlap.fingerprint(image),
        has_foreground=has_foreground,
        has_ignore=has_ignore,
        visited=visited,
    )


def _foreground_findings(
    rows: Sequence[Row], splits: Sequence[str], looks: Sequence[_Look]
) -> list[Finding]:
    """Sites whose masks say 255 where 1 was meant."""
    findings = []
    of_site: dict[str, list[tuple[Row, _Look]]] = {}
    for row, split, one in zip(rows, splits, looks, strict=True):
        if split not in ("", EXCLUDED):
            of_site.setdefault(row.site, []).append((row, one))
    for site, members in of_site.items():
        if any(one.has_foreground for _, one in members):
            continue
        lines = tuple(row.line for row, one in members if one.has_ignore)
        if lines:
            message = (
                f"every mask of {site} holds only 0 and 255, and 255 means ignore: nothing could "
                "be learned. If 255 marks the object, use label_mode=instance or write 1 for it."
            )
            findings.append(Finding("error", lines, message))
    return findings


def _same_tissue_findings(
    rows: Sequence[Row], splits: Sequence[str], looks: Sequence[_Look]
) -> list[Finding]:
    """Images that are equal, and images that share pixels."""
    used = [i for i, one in enumerate(looks) if one.fingerprint is not None]
    findings = []
    firsts: dict[bytes, list[int]] = {}
    for i in used:
        firsts.setdefault(looks[i].digest, []).append(i)
    for same in firsts.values():
        files = list(dict.fromkeys(rows[i].image for i in same))
        if len(files) > 1:
            message = f"identical images: {', '.join(files)}. Keep one of them."
            findings.append(Finding("error", tuple(rows[i].line for i in same), message))
    distinct = {
        i: one for i in (same[0] for same in firsts.values()) if (one := looks[i].fingerprint)
    }
    of = list(distinct)
    pairs = overlap.overlapping_pairs(list(distinct.values()), [rows[i].site for i in of])
    linked = [(of[a], of[b]) for a, b in pairs]
    for members in _connected(linked):
        trains = any(splits[i] == TRAIN for i in members)
        names = ", ".join(rows[i].image for i in members[:4]) + ", ..." * (len(members) > 4)
        message = f"images that show the same tissue: {names}. " + (
            "They overlap, so they are not separate units of privacy. Put them together to one "
            "image, crop the shared border off, or mark all but one as excluded."
            if trains
            else "Their shared pixels count twice in the results."
        )
        lines = tuple(rows[i].line for i in members)
        findings.append(Finding("error" if trains else "warning", lines, message))
    return findings


def _connected(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Groups of numbers that `pairs` link, each sorted."""
    group: dict[int, set[int]] = {}
    for a, b in pairs:
        merged = group.get(a, {a}) | group.get(b, {b})
        for i in merged:
            group[i] = merged
    return sorted({tuple(sorted(some)) for some in group.values()})
