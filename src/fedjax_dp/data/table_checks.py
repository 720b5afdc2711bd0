"""What is wrong with a manifest as a table: whose images are where, before any is opened."""

from collections.abc import Sequence

from fedjax_dp.data.manifest import Finding, Level, Row
from fedjax_dp.data.splits import EXCLUDED, EXTERNAL, TEST, TRAIN, VALIDATION

_MPP_TOLERANCE = 1.1


def patients(rows: Sequence[Row], splits: Sequence[str]) -> list[Finding]:
    """Patients in two sites, or on both sides of training."""
    findings = []
    of_patient: dict[str, list[tuple[Row, str]]] = {}
    for row, split in zip(rows, splits, strict=True):
        if row.patient and split not in ("", EXCLUDED):
            of_patient.setdefault(row.patient, []).append((row, split))
    for patient, members in of_patient.items():
        lines = tuple(row.line for row, _ in members)
        sites = list(dict.fromkeys(row.site for row, _ in members))
        if len(sites) > 1:
            message = (
                f"patient {patient!r} is at the sites {' and '.join(map(repr, sites))}. A patient "
                "belongs to one client: give different people different names, or keep one site."
            )
            findings.append(Finding("error", lines, message))
        names = list(dict.fromkeys(split for _, split in members))
        if TRAIN in names and len(names) > 1:
            message = (
                f"patient {patient!r} is in the splits {' and '.join(names)}. What is measured on "
                "a patient who trains says nothing: move all images of the patient to one split."
            )
            findings.append(Finding("error", lines, message))
    return findings


def empty_splits(rows: Sequence[Row], splits: Sequence[str]) -> list[Finding]:
    """Splits without images."""
    if not rows:
        return []
    if TRAIN not in splits:
        message = (
            "No image is in the split 'train'. Mark some in the column split, or where there is no "
            "such column, add images or choose another split_key."
        )
        return [Finding("error", (), message)]
    findings = []
    if TEST not in splits:
        level: Level = "warning" if EXTERNAL in splits else "error"
        message = "No image is in the split 'test'. Mark some in the column split."
        findings.append(Finding(level, (), message))
    if VALIDATION not in splits:
        message = "No image is in the split 'validation'; curves cannot be drawn while training."
        findings.append(Finding("warning", (), message))
    return findings


def resolutions(rows: Sequence[Row], splits: Sequence[str]) -> list[Finding]:
    """Sites whose resolutions differ, or are not stated."""
    known: dict[str, list[float]] = {}
    silent: dict[str, None] = {}
    for row, split in zip(rows, splits, strict=True):
        if split in ("", EXCLUDED):
            continue
        if row.mpp is None:
            silent[row.site] = None
        else:
            known.setdefault(row.site, []).append(row.mpp)
    findings = []
    values = [value for some in known.values() for value in some]
    if values and max(values) > _MPP_TOLERANCE * min(values):
        spans = ", ".join(
            f"{site} {min(v):g}" + (f" to {max(v):g}" if max(v) > min(v) else "")
            for site, v in known.items()
        )
        message = f"mpp differs: {spans}. Nothing is rescaled; resample to one resolution first."
        findings.append(Finding("warning", (), message))
    if values and silent:
        message = f"mpp is not stated for {', '.join(silent)}; their images are taken as they are."
        findings.append(Finding("warning", (), message))
    return findings
