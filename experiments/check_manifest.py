r"""Checks a manifest and shows what is in it, before anything is trained.

    python -m experiments.check_manifest --manifest=data/manifest.csv --output=runs/check

Prints everything wrong with its row, and a table of the sites; writes a picture of each site:
images with the contours of their masks, the share of each class, and the diameters of the objects
(a wrong resolution shows there). Exits with 1 where there are errors. The pictures show tissue:
keep them where the images may be kept.
"""

import dataclasses
import pathlib
import re
from collections.abc import Sequence

import numpy as np
from absl import app, flags

from fedjax_dp.data.inspection import LABEL_MODES, default_splits, inspect
from fedjax_dp.data.manifest import Manifest, ManifestError, Row, read_manifest
from fedjax_dp.data.splits import SPLITS
from fedjax_dp.reporting import contact_sheet

_MANIFEST = flags.DEFINE_string("manifest", "", "The CSV file; required.")
_OUTPUT = flags.DEFINE_string("output", "runs/check_manifest", "Folder of pictures; empty: none.")
_LABEL_MODE = flags.DEFINE_enum(
    "label_mode", "class", LABEL_MODES, "Whether masks hold classes or count objects."
)
_CLASS_NAMES = flags.DEFINE_list(
    "class_names", ["background", "nucleus"], "Names of the classes, in the order of the labels."
)
_TILE_SIZE = flags.DEFINE_integer("tile_size", 128, "Warns of images smaller than this.")

MAX_PICTURES = 8


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What is kept of one image: counts int64 [K + 1], diameters in pixels, perhaps a picture."""

    pixel_counts: np.ndarray
    diameters: np.ndarray
    picture: contact_sheet.Picture | None


def check(
    manifest_path: str | pathlib.Path,
    output: str | pathlib.Path = "",
    *,
    label_mode: str = "class",
    class_names: Sequence[str] = ("background", "nucleus"),
    tile_size: int | None = 128,
) -> int:
    """Prints findings and the table, writes the pictures; 1 where there are errors, else 0."""
    class_names = tuple(class_names)
    try:
        manifest = read_manifest(manifest_path)
    except ManifestError as error:
        print(error)
        return 1
    shown = _shown_lines(manifest) if str(output) else set()

    def visit(
        row: Row, split: str, image: np.ndarray, labels: np.ndarray, mask: np.ndarray
    ) -> _Seen:
        counts = np.bincount(labels.ravel(), minlength=256)
        picture = None
        if row.line in shown:
            title = _picture_title(row, split, labels.shape)
            part, part_labels = contact_sheet.middle(image, labels)
            picture = contact_sheet.Picture(title=title, image=part, labels=part_labels)
        return _Seen(
            pixel_counts=np.append(counts[: len(class_names)], counts[255]),
            diameters=contact_sheet.object_diameters(mask, is_instance=label_mode == "instance"),
            picture=picture,
        )

    inspected = inspect(
        manifest, label_mode=label_mode, class_names=class_names, tile_size=tile_size, visit=visit
    )
    for finding in inspected.findings:
        print(finding)
    levels = [finding.level for finding in inspected.findings]
    num_errors, num_warnings = levels.count("error"), levels.count("warning")
    how = "" if manifest.has_split else " (by keyed hash: the manifest has no split)"
    print(
        f"\n{manifest.path}: {_count(len(manifest.rows), 'image')}, "
        f"{_count(num_errors, 'error')}, {_count(num_warnings, 'warning')}. Splits: "
        f"{', '.join(SPLITS)}{how}.\n"
    )
    sheets = _sheets(manifest, inspected.visited, class_names, label_mode)
    print(_table(manifest, sheets))
    for site, sheet in sheets.items():
        _print_doubtful_size(site, sheet)
    if str(output):
        folder = pathlib.Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        for number, (site, sheet) in enumerate(sheets.items()):
            name = re.sub(r"[^\w.-]+", "_", site)
            contact_sheet.save(sheet, folder / f"{number:02d}_{name}.png")
        print(f"\nPictures of {_count(len(sheets), 'site')}: {folder}/")
    return 1 if num_errors else 0


def _shown_lines(manifest: Manifest) -> set[int]:
    """Lines of the images to be shown: of each site some, evenly over its rows."""
    lines: dict[str, list[int]] = {}
    for row, split in zip(manifest.rows, default_splits(manifest), strict=True):
        if split != "excluded":
            lines.setdefault(row.site, []).append(row.line)
    chosen = set()
    for some in lines.values():
        where = np.linspace(0, len(some) - 1, min(MAX_PICTURES, len(some))).round().astype(int)
        chosen |= {some[i] for i in where}
    return chosen


def _picture_title(row: Row, split: str, shape: tuple[int, ...]) -> str:
    name = pathlib.PurePath(row.image).name
    name = name if len(name) <= 34 else f"{name[:20]}...{name[-11:]}"
    size = f"{shape[1]} x {shape[0]} pixels"
    if max(shape) > contact_sheet.MAX_SIDE:
        size = f"the middle {contact_sheet.MAX_SIDE} of {size}"
    patient = row.patient if len(row.patient) <= 24 else f"{row.patient[:21]}..."
    return f"row {row.line}: {name}\n{split}, patient {patient or 'unknown'}\n{size}"


def _sheets(
    manifest: Manifest,
    visited: Sequence[_Seen | None],
    class_names: tuple[str, ...],
    label_mode: str,
) -> dict[str, contact_sheet.Sheet]:
    """The sheet of every site that has an image which could be used."""
    of_site: dict[str, list[tuple[Row, _Seen]]] = {}
    for row, seen in zip(manifest.rows, visited, strict=True):
        if seen is not None:
            of_site.setdefault(row.site, []).append((row, seen))
    sheets = {}
    for site, members in of_site.items():
        is_scaled = all(row.mpp is not None for row, _ in members)
        mpp = sorted({row.mpp for row, _ in members if row.mpp is not None})
        patients = {row.patient for row, _ in members}
        known = "patients unknown" if patients == {""} else _count(len(patients - {""}), "patient")
        hospital = next((row.hospital for row, _ in members if row.hospital), "")
        resolution = _span(mpp) + " µm per pixel" if mpp else "resolution not stated"
        sheets[site] = contact_sheet.Sheet(
            title=f"{site}{f' ({hospital})' if hospital else ''}: "
            f"{_count(len(members), 'image')}, {known}, {resolution}",
            class_names=class_names,
            pictures=[seen.picture for _, seen in members if seen.picture is not None],
            pixel_counts=np.sum([seen.pixel_counts for _, seen in members], axis=0),
            diameters=np.concatenate(
                [seen.diameters * (row.mpp or 1.0 if is_scaled else 1.0) for row, seen in members]
            ),
            unit="µm" if is_scaled else "px",
            is_instance=label_mode == "instance",
        )
    return sheets


def _print_doubtful_size(site: str, sheet: contact_sheet.Sheet) -> None:
    """A nucleus of two micrometres is no nucleus: the resolution is wrong."""
    low, high = contact_sheet.NUCLEUS_DIAMETER
    if not contact_sheet.shows_nuclei(sheet) or not len(sheet.diameters):
        return
    median = float(np.median(sheet.diameters))
    if not low <= median <= high:
        print(
            f"look: the nuclei of {site} measure {median:.1f} µm in the median, most measure "
            f"{low:g} to {high:g}. Is its mpp right?"
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _span(values: Sequence[float]) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def _table(manifest: Manifest, sheets: dict[str, contact_sheet.Sheet]) -> str:
    """Aligned text, one line a site."""
    header = ("site", "images", "patients", *SPLITS, "mpp", "foreground", "median diameter")
    lines: list[tuple[str, ...]] = [header]
    splits = default_splits(manifest)
    for site in dict.fromkeys(row.site for row in manifest.rows):
        rows = [(r, s) for r, s in zip(manifest.rows, splits, strict=True) if r.site == site]
        patients = {row.patient for row, _ in rows}
        count = str(len(patients - {""})) if patients != {""} else "unknown"
        if len(patients) > 1 and "" in patients:
            count += "+?"
        counts = [str(sum(split == name for _, split in rows) or "-") for name in SPLITS]
        sheet = sheets.get(site)
        foreground = diameter = "-"
        if sheet is not None:
            labelled = sheet.pixel_counts[:-1]
            foreground = f"{labelled[1:].sum() / max(int(labelled.sum()), 1):.3f}"
            if len(sheet.diameters):
                diameter = f"{np.median(sheet.diameters):.1f} {sheet.unit}"
        mpp = _span([row.mpp for row, _ in rows if row.mpp is not None])
        lines.append((site, str(len(rows)), count, *counts, mpp, foreground, diameter))
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def main(argv: Sequence[str]) -> int:
    """Runs the check with the flags of the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {list(argv[1:])}. Write --manifest=FILE.")
    if not _MANIFEST.value:
        raise app.UsageError("Name the manifest: --manifest=FILE.")
    return check(
        _MANIFEST.value,
        _OUTPUT.value,
        label_mode=_LABEL_MODE.value,
        class_names=_CLASS_NAMES.value,
        tile_size=_TILE_SIZE.value,
    )


if __name__ == "__main__":
    app.run(main)
