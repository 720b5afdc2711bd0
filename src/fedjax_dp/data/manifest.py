"""The manifest: a CSV table of images, masks and whose they are."""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Sequence
from typing import Literal

from fedjax_dp.data.splits import SPLITS

REQUIRED_COLUMNS = ("image", "mask", "site")
OPTIONAL_COLUMNS = ("patient", "hospital", "split", "mpp")
MIN_MPP, MAX_MPP = 0.05, 10.0
"""Micrometres per pixel outside this range are taken for a slip of the pen."""

_MAX_SHOWN_ROWS = 12

Level = Literal["error", "warning"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something wrong, or worth a look, in a manifest.

    Attributes:
        level: "error" (nothing can be built) or "warning" (it can, but look).
        rows: line numbers in the file as an editor shows them, the header being line 1; empty
            where the finding concerns the whole file.
        message: what is wrong, with the value, and what to do.
    """

    level: Level
    rows: tuple[int, ...]
    message: str

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.rows[:_MAX_SHOWN_ROWS]))
        more = len(self.rows) - _MAX_SHOWN_ROWS
        where = f"row{'s' * (len(self.rows) > 1)} {shown}" if self.rows else "manifest"
        return f"{self.level}: {where}{f' and {more} more' if more > 0 else ''}: {self.message}"


class ManifestError(ValueError):
    """A manifest with errors; `findings` holds all of them, and the message shows all."""

    def __init__(self, path: pathlib.Path, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        lines = "\n".join(f"  {finding}" for finding in findings)
        super().__init__(
            f"{path} has {len(findings)} error{'s' * (len(findings) != 1)}:\n{lines}\n"
            f"See pictures and counts with: python -m experiments.check_manifest --manifest={path}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One image of a manifest.

    Attributes:
        line: line number in the file, as an editor shows it.
        image: path of the image as written, relative to the manifest or absolute.
        mask: path of the mask as written.
        site: who holds the image; one training site is one client.
        patient: whose tissue it is; empty where unknown.
        hospital: where it was taken; empty where unknown.
        split: one of `SPLITS`; empty where the manifest does not say.
        mpp: micrometres per pixel; None where unknown.
    """

    line: int
    image: str
    mask: str
    site: str
    patient: str = ""
    hospital: str = ""
    split: str = ""
    mpp: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The rows of a manifest and what was wrong with its text.

    Attributes:
        path: the file; relative paths in it start at its folder.
        rows: the images, in the order of the file, as far as they could be read.
        findings: what is wrong with the text itself.
    """

    path: pathlib.Path
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def has_split(self) -> bool:
        """Whether the manifest brings its own split."""
        return any(row.split for row in self.rows)

    def resolve(self, name: str) -> pathlib.Path:
        """Full path of an image or mask as the manifest writes it (backslashes allowed)."""
        path = self.path.parent / name
        if "\\" in name and not path.exists():
            return self.path.parent / name.replace("\\", "/")
        return path


def read_manifest(path: str | pathlib.Path) -> Manifest:
    """Reads a manifest; opens no image.

    The separator may be a comma, a semicolon or a tab; a byte order mark and unknown columns are
    ignored; column names are taken without regard to case.

    Args:
        path: the CSV file.

    Returns:
        Its rows, and in `findings` everything wrong with its text.

    Raises:
        ManifestError: there is no such file, or it is no UTF-8 text.
    """
    path = pathlib.Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        message = f"Cannot open the manifest: {error.strerror or error}. Check the path."
        raise ManifestError(path, [Finding("error", (), message)]) from error
    except UnicodeDecodeError as error:
        message = f"The manifest is not UTF-8 text ({error.reason}). Save it as 'CSV UTF-8'."
        raise ManifestError(path, [Finding("error", (), message)]) from error
    records, findings = _records(text)
    is_whole = not findings
    if not records:
        wanted = ",".join(REQUIRED_COLUMNS)
        message = f"The manifest is empty. Begin with a header line, at least {wanted}."
        return Manifest(path=path, rows=(), findings=(Finding("error", (), message),))
    header_line, header = records[0]
    columns = [name.strip().casefold() for name in header]
    known = (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS)
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    if missing:
        message = f"No column {', '.join(missing)}; the header is {header}. Add it."
        findings.append(Finding("error", (header_line,), message))
    for name in known:
        if columns.count(name) > 1:
            message = f"Column {name!r} occurs {columns.count(name)} times. Keep one."
            findings.append(Finding("error", (header_line,), message))
            missing.append(name)
    if len(records) == 1 and is_whole:
        findings.append(Finding("error", (header_line,), "No row below the header. Add images."))
    if missing:
        return Manifest(path=path, rows=(), findings=tuple(findings))
    rows, without_split = [], []
    for line, cells in records[1:]:
        if len(cells) != len(columns):
            message = (
                f"{len(cells)} fields where the header has {len(columns)}. Quote fields that "
                "contain the separator."
            )
            findings.append(Finding("error", (line,), message))
            continue
        values = dict(zip(columns, (cell.strip() for cell in cells), strict=True))
        row, wrong = _row(line, {name: values.get(name, "") for name in known})
        findings.extend(wrong)
        if row is not None:
            rows.append(row)
            if not values.get("split"):
                without_split.append(line)
    findings.extend(_duplicates(rows))
    if 0 < len(without_split) < len(rows):
        message = f"split is empty while other rows have one. Write one of {', '.join(SPLITS)}."
        findings.append(Finding("error", tuple(without_split), message))
    return Manifest(path=path, rows=tuple(rows), findings=tuple(findings))


def _records(text: str) -> tuple[list[tuple[int, list[str]]], list[Finding]]:
    """(line number, fields) of every record that is not blank."""
    header = text.lstrip().partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records, line = [], 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                records.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        message = f"Not a CSV record: {error}. Look for a quote that is not closed."
        return records, [Finding("error", (line,), message)]
    return records, []


def _row(line: int, values: dict[str, str]) -> tuple[Row | None, list[Finding]]:
    """One row and what is wrong with its text; no row where it cannot be used at all."""
    findings = [
        Finding("error", (line,), f"{name} is empty. Fill it in or delete the row.")
        for name in REQUIRED_COLUMNS
        if not values[name]
    ]
    is_usable = not findings
    split = values["split"].casefold()
    if split and split not in SPLITS:
        message = f"split is {values['split']!r}. Write one of {', '.join(SPLITS)}."
        findings.append(Finding("error", (line,), message))
        split = ""
    mpp = None
    if values["mpp"]:
        try:
            mpp = float(values["mpp"])
        except ValueError:
            mpp = float("nan")
        if not MIN_MPP <= mpp <= MAX_MPP:
            message = (
                f"mpp is {values['mpp']!r}. Write micrometres per pixel, {MIN_MPP} to {MAX_MPP} "
                "with a decimal point (about 0.25 at 40x, 0.5 at 20x), or leave it empty."
            )
            findings.append(Finding("error", (line,), message))
            mpp = None
    names = {name: values[name] for name in (*REQUIRED_COLUMNS, "patient", "hospital")}
    return (Row(line=line, split=split, mpp=mpp, **names) if is_usable else None), findings


def _duplicates(rows: Sequence[Row]) -> list[Finding]:
    """Images listed twice, and masks that serve two images."""
    findings = []
    checks: tuple[tuple[str, Level, str], ...] = (
        ("image", "error", "Delete all but one of the rows."),
        ("mask", "warning", "Each image should have its own."),
    )
    for column, level, advice in checks:
        lines: dict[str, list[int]] = {}
        for row in rows:
            lines.setdefault(getattr(row, column), []).append(row.line)
        for name, where in lines.items():
            if len(where) > 1:
                message = f"The {column} {name} is listed {len(where)} times. {advice}"
                findings.append(Finding(level, tuple(where), message))
    return findings
