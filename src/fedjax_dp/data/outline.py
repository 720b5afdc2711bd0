"""A federation without its pixels: how many tiles of whom there will be, from headers alone."""

import pathlib
from collections.abc import Sequence

from fedjax_dp.data import table_checks
from fedjax_dp.data.federation import Federation, effective_splits
from fedjax_dp.data.images import ImageError, image_size
from fedjax_dp.data.inspection import DEFAULT_CLASS_NAMES
from fedjax_dp.data.manifest import Finding, ManifestError, read_manifest
from fedjax_dp.data.splits import EXTERNAL, SPLIT_KEY, TEST, TRAIN, VALIDATION
from fedjax_dp.data.tiles import blank_tiles, concatenate, grid


def outline_from_manifest(
    path: str | pathlib.Path,
    *,
    tile_size: int = 128,
    stride: int | None = None,
    class_names: Sequence[str] = DEFAULT_CLASS_NAMES,
    train_sites: Sequence[str] = (),
    external_sites: Sequence[str] = (),
    split_key: bytes = SPLIT_KEY,
) -> Federation:
    """What `federation_from_manifest` returns with `min_tissue=0`, but for the pixels.

    Guarantees: tables of the same sites, slides, patients and tiles, in the same order; their
    images are uint8 [N, 0, 0, 3]. What is wrong with the table, or with the header of an image, is
    an error here as there. What is wrong with pixels or masks is not seen.

    Args:
        path: the manifest.
        tile_size: as in `federation_from_manifest`.
        stride: as there.
        class_names: as there.
        train_sites: as there.
        external_sites: as there.
        split_key: as there.

    Raises:
        ManifestError: (a ValueError) with all errors that can be seen without pixels.
        ValueError: an argument out of range, or an unknown site.
    """
    path = pathlib.Path(path)
    stride = tile_size if stride is None else stride
    if tile_size < 1 or not 1 <= stride <= tile_size:
        raise ValueError(f"Expected 1 <= stride <= tile_size, got {stride=} and {tile_size=}.")
    manifest = read_manifest(path)
    splits = effective_splits(manifest, train_sites, external_sites, split_key)
    findings = [
        *manifest.findings,
        *table_checks.patients(manifest.rows, splits),
    ]
    if all(row.split for row in manifest.rows) or not manifest.has_split:
        findings += table_checks.empty_splits(manifest.rows, splits)
    members: dict[str, list[tuple[int, tuple[str, str, str]]]] = {
        split: [] for split in (TRAIN, VALIDATION, TEST, EXTERNAL)
    }
    for row, split in zip(manifest.rows, splits, strict=True):
        if split not in members:
            continue
        try:
            height, width = image_size(manifest.resolve(row.image))
        except ImageError as error:
            findings.append(Finding("error", (row.line,), f"image: {error}"))
            continue
        where = grid(height, width, tile_size, stride if split == TRAIN else tile_size)
        members[split].append((len(where.top), (row.site, row.image, row.patient)))
    if errors := [finding for finding in findings if finding.level == "error"]:
        raise ManifestError(path, errors)
    tables = {
        split: concatenate(
            [blank_tiles(count) for count, _ in images], [owner for _, owner in images], 0
        )
        for split, images in members.items()
    }
    return Federation(
        name=f"{path.parent.resolve().name}/{path.name}",
        class_names=tuple(class_names),
        train=tables[TRAIN],
        validation=tables[VALIDATION],
        test=tables[TEST],
        external=tables[EXTERNAL],
        tiles_overlap=stride < tile_size,
    )
