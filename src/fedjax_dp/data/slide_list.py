"""The table of sites: which slides there are, whose they are, and where their annotations lie."""

import csv
import dataclasses
import io
import os
import pathlib
from collections.abc import Sequence

from fedjax_dp.data.manifest import MAX_MPP, MIN_MPP
from fedjax_dp.data.splits import EXCLUDED, SPLITS, TRAIN, split_of

REQUIRED = ("slide", "site")
OPTIONAL = ("patient", "hospital", "split", "mpp", "annotation", "tissue")
_DRAWN = (".geojson", ".json", ".xml")
_PAINTED = (".png", ".tif", ".tiff")


class SlideListError(ValueError):
    """A table of sites that does not fit its slides; the message shows all that is wrong."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlideRow:
    """One slide of the table.

    Attributes:
        line: in the file, as an editor shows it.
        name: of the slide as the table writes it.
        slide: its path.
        annotation: path of its annotation; None without one.
        tissue: path of outlines of its tissue, instead of looking for it; None without one.
        site: who holds it.
        patient: whose tissue it is; empty where unknown.
        hospital: where it was taken; empty where unknown.
        split: one of `SPLITS`.
        mpp: micrometres per pixel, instead of what the file says; None = as the file says.
    """

    line: int
    name: str
    slide: pathlib.Path
    annotation: pathlib.Path | None
    tissue: pathlib.Path | None
    site: str
    patient: str
    hospital: str
    split: str
    mpp: float | None


def read_slide_list(
    table: str | os.PathLike[str],
    slides: str | os.PathLike[str],
    annotations: str | os.PathLike[str] | None = None,
) -> tuple[SlideRow, ...]:
    """Reads the table of sites and finds each slide and its annotation.

    The columns are slide and site, and as wanted patient, hospital, split, mpp, annotation and
    tissue (outlines in GeoJSON or XML); others are ignored. A slide is named by its path below the
    folder of slides, or by its file name with or without the ending where that names one file
    alone. An annotation is named likewise, or found by the slide's name. Where no row has a split,
    a keyed hash of the patient decides (see `splits.split_of`), of the slide's name where no
    patient is known.

    Args:
        table: the CSV file; separated by comma, semicolon or tab.
        slides: folder of the slides.
        annotations: folder of the annotations; None = the folder of the slides, where pictures are
            taken for slides and only GeoJSON and XML for annotations.

    Returns:
        The slides in the table's order, excluded ones left out.

    Raises:
        SlideListError: all that is wrong, with line numbers.
    """
    table, slides = pathlib.Path(table), pathlib.Path(slides)
    annotations = slides if annotations is None else pathlib.Path(annotations)
    records = _records(table)
    problems: list[str] = []
    for folder in (slides, annotations):
        if not folder.is_dir():
            raise SlideListError(f"Expected a folder, got {folder}. Check the path.")
    known, drawn = _Files(slides), _Files(annotations)
    has_split = any(record["split"] for _, record in records)
    rows = []
    for line, record in records:
        try:
            rows.append(_row(line, record, known, drawn, has_split=has_split))
        except SlideListError as error:
            problems.append(f"row {line}: {error}")
    problems += _conflicts(rows)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise SlideListError(f"{table} has {len(problems)} errors:\n{listed}")
    kept = tuple(row for row in rows if row.split != EXCLUDED)
    if not kept:
        raise SlideListError(f"Expected slides in {table}, got none. Add rows below the header.")
    return kept


class _Files:
    """The files below a folder, by their names."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self._by_name: dict[str, list[pathlib.Path]] = {}
        for path in sorted(folder.rglob("*")):
            relative = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in relative.parts):
                for name in {str(relative), path.name, path.stem}:
                    self._by_name.setdefault(name, []).append(path)

    def find(self, name: str, endings: Sequence[str] | None = None) -> list[pathlib.Path]:
        """Files of this name; of equal names those with one of the endings."""
        found = self._by_name.get(name.replace("\\", "/"), [])
        return [p for p in found if endings is None or p.suffix.lower() in endings]


def _records(table: pathlib.Path) -> list[tuple[int, dict[str, str]]]:
    """(line, column -> text) of every row."""
    try:
        text = table.read_bytes().decode("utf-8-sig")
        delimiter = max(",;\t", key=text.lstrip().partition("\n")[0].count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        lines = [(reader.line_num, cells) for cells in reader if any(c.strip() for c in cells)]
    except OSError as error:
        raise SlideListError(f"Cannot open {table}: {error.strerror or error}.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise SlideListError(f"Expected a CSV in UTF-8, got {table}: {error}.") from error
    if not lines:
        raise SlideListError(f"{table} is empty. Begin with a header, at least slide,site.")
    header = [name.strip().casefold() for name in lines[0][1]]
    if missing := [name for name in REQUIRED if header.count(name) != 1]:
        raise SlideListError(
            f"Expected one column {' and one '.join(missing)} in {table}, got the header {header}."
        )
    wrong = [line for line, cells in lines[1:] if len(cells) != len(header)]
    if wrong:
        raise SlideListError(
            f"Expected {len(header)} fields as in the header of {table}, got others in rows "
            f"{wrong[:12]}. Quote fields that contain the separator."
        )
    found = []
    for line, cells in lines[1:]:
        values = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        found.append((line, {name: values.get(name, "") for name in (*REQUIRED, *OPTIONAL)}))
    return found


def _row(
    line: int, record: dict[str, str], slides: _Files, annotations: _Files, *, has_split: bool
) -> SlideRow:
    name, split = record["slide"], record["split"].casefold()
    for column in REQUIRED:
        if not record[column]:
            raise SlideListError(f"{column} is empty. Fill it in or delete the row.")
    found = slides.find(name)
    if len(found) > 1:  # an annotation of the same stem may lie beside its slide
        found = [path for path in found if path.suffix.lower() not in _DRAWN]
    if len(found) != 1:
        raise SlideListError(
            f"Expected one slide {name!r} below {slides.folder}, found {len(found)}. Write its "
            "path below that folder."
        )
    if has_split and split not in SPLITS:
        raise SlideListError(f"split is {record['split']!r}. Write one of {', '.join(SPLITS)}.")
    if not has_split:
        split = split_of(patient=record["patient"], image=name)
    return SlideRow(
        line=line,
        name=name,
        slide=found[0],
        annotation=_annotation(
            record["annotation"],
            found[0],
            annotations,
            _DRAWN if annotations.folder == slides.folder else (*_DRAWN, *_PAINTED),
        ),
        tissue=_annotation(record["tissue"], found[0], annotations, ()),
        site=record["site"],
        patient=record["patient"],
        hospital=record["hospital"],
        split=split,
        mpp=_mpp(record["mpp"]),
    )


def _annotation(
    name: str, slide: pathlib.Path, annotations: _Files, endings: Sequence[str]
) -> pathlib.Path | None:
    """The annotation that the table names, or the one that is named like the slide."""
    found = annotations.find(name) if name else annotations.find(slide.stem, endings)
    found = [path for path in found if path != slide]
    if len(found) > 1 or (name and not found):
        raise SlideListError(
            f"Expected one annotation {name or slide.stem!r} below {annotations.folder}, found "
            f"{len(found)}. Name it in the column annotation."
        )
    return found[0] if found else None


def _mpp(text: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not MIN_MPP <= value <= MAX_MPP:
        raise SlideListError(
            f"mpp is {text!r}. Write micrometres per pixel, {MIN_MPP} to {MAX_MPP}, or nothing."
        )
    return value


def _conflicts(rows: Sequence[SlideRow]) -> list[str]:
    """Slides listed twice, patients at two sites or on both sides of training."""
    problems = []
    slides: dict[pathlib.Path, list[int]] = {}
    patients: dict[str, list[SlideRow]] = {}
    for row in rows:
        slides.setdefault(row.slide, []).append(row.line)
        if row.patient and row.split != EXCLUDED:
            patients.setdefault(row.patient, []).append(row)
    for path, lines in slides.items():
        if len(lines) > 1:
            problems.append(f"rows {lines}: {path.name} is listed {len(lines)} times. Keep one.")
    for patient, members in patients.items():
        where = [row.line for row in members]
        sites, splits = ({getattr(row, name) for row in members} for name in ("site", "split"))
        if len(sites) > 1:
            problems.append(
                f"rows {where}: patient {patient!r} is at {' and '.join(sorted(sites))}. A patient "
                "belongs to one client."
            )
        if TRAIN in splits and len(splits) > 1:
            problems.append(
                f"rows {where}: patient {patient!r} is in {' and '.join(sorted(splits))}. Move "
                "all slides of a patient to one split."
            )
    return problems
