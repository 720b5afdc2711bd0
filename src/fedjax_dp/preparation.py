"""From a hospital's slides and annotations to a tile store, slide by slide, resumable.

What leaves a worker for the store is numbers, pixels and pseudonyms. Every text that comes from a
file (paths, names of classes, errors) stays in the store's private folder and on the screen.
"""

import contextlib
import dataclasses
import fcntl
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_dp.data.annotations.classes import ClassTable
from fedjax_dp.data.annotations.reading import open_labels, read_polygons
from fedjax_dp.data.preparation import cut_slide, file_digest
from fedjax_dp.data.slide_list import SlideRow
from fedjax_dp.data.slide_workers import each_in_a_process
from fedjax_dp.data.slides import Slide, open_slide
from fedjax_dp.data.store import layout
from fedjax_dp.data.store.layout import Recipe, SlideRecord, StoreError
from fedjax_dp.data.store.pseudonyms import (
    Pseudonyms,
    private_folder,
    table_text,
    write_private_table,
)
from fedjax_dp.data.store.reading import tile_rows
from fedjax_dp.data.store.sources import read_sources, write_sources
from fedjax_dp.data.store.writing import StoredTile, write_slide
from fedjax_dp.data.tissue import TissueMask, everywhere, tissue_from_outlines, tissue_mask
from fedjax_dp.reporting.slide_overview import save_overview


class SlideJob(NamedTuple):
    """One slide to prepare: all that another process needs."""

    folder: pathlib.Path
    recipe: Recipe
    row: SlideRow
    slide: str  # pseudonym
    patient: str  # pseudonym
    with_overview: bool


class SlideReport(NamedTuple):
    """What became of one slide.

    Attributes:
        row: of the table of sites.
        slide: pseudonym.
        record: what the store says of it; None where it failed.
        findings: what was skipped, repaired or odd, with texts from the files: private.
        error: why it failed; empty where it did not. Private likewise.
        is_old: whether it was finished by an earlier call.
    """

    row: SlideRow
    slide: str
    record: SlideRecord | None
    findings: tuple[str, ...] = ()
    error: str = ""
    is_old: bool = False


def prepare_store(
    rows: Sequence[SlideRow],
    folder: pathlib.Path,
    recipe: Recipe,
    *,
    workers: int = 1,
    with_overview: bool = True,
    prune: bool = False,
    tell: Callable[[SlideReport], None] = lambda report: None,
) -> tuple[SlideReport, ...]:
    """Prepares every slide that is not finished, and writes the store's index and reports.

    Guarantees: the store's contents do not depend on the number of workers nor on how often it was
    interrupted; a slide that fails leaves nothing, and the rest goes on; a slide or annotation
    whose file changed since it was prepared is prepared anew.

    Args:
        rows: the slides.
        folder: of the store; made where absent.
        recipe: what is cut.
        workers: slides at once, each in a process of its own.
        with_overview: whether to draw every slide with its tissue and tiles.
        prune: whether to delete slides of the store that are no longer in `rows`; otherwise they
            are an error, for training would go on using them.
        tell: called for every slide as it is done.

    Returns:
        A report for every slide, in the order of `rows`.

    Raises:
        StoreError: the folder cannot be used; another call is at work on it; it holds slides that
            are not in `rows`.
    """
    layout.claim(folder, recipe)
    with _locked(folder):
        _sweep(folder)
        names = Pseudonyms.of_store(folder)
        jobs = [
            SlideJob(
                folder=folder,
                recipe=recipe,
                row=row,
                slide=names.of_slide(row.name),
                patient=names.of_patient(row.patient),
                with_overview=with_overview,
            )
            for row in rows
        ]
        known = read_sources(folder)
        _drop(folder, {job.slide for job in jobs}, known, prune=prune)
        reports: dict[int, SlideReport] = {}
        for number, job in enumerate(jobs):
            if (record := _finished(job, known.get(job.slide))) is not None:
                reports[number] = SlideReport(job.row, job.slide, record, is_old=True)
                tell(reports[number])
        waiting = [number for number in range(len(jobs)) if number not in reports]
        for outcome in each_in_a_process(
            _prepare, [jobs[number] for number in waiting], min(workers, max(len(waiting), 1))
        ):
            number = waiting[outcome.number]
            job = jobs[number]
            if outcome.error:
                _remove(folder, job.slide, known)
                reports[number] = SlideReport(job.row, job.slide, None, (), outcome.error)
            else:
                record, findings, source = outcome.value
                known[job.slide] = source
                reports[number] = SlideReport(job.row, job.slide, record, findings)
            write_sources(folder, known)
            tell(reports[number])
        _write_reports(folder, recipe, [reports[number] for number in range(len(jobs))])
    return tuple(reports[number] for number in range(len(jobs)))


def _prepare(job: SlideJob) -> tuple[SlideRecord, tuple[str, ...], dict[str, str]]:
    """Prepares one slide; runs in a process of its own."""
    row, recipe = job.row, job.recipe
    before = _file_facts(row)
    with open_slide(row.slide, row.mpp) as slide:
        bounds = slide.bounds
        offset = (bounds.x, bounds.y) if recipe.origin == "bounds" else (0, 0)
        labels = open_labels(
            row.annotation,
            table=ClassTable.from_text(recipe.classes),
            dimensions=slide.dimensions,
            unannotated=recipe.unannotated or None,
            unknown=recipe.unknown,
            offset=offset,
        )
        tissue = _tissue(slide, row, recipe, offset)
        record = _record(job, slide, tissue)
        corners: list[tuple[float, float]] = []
        tiles = _noting(cut_slide(slide, labels, tissue, recipe), corners)
        record = write_slide(job.folder, tiles, recipe, record)
        if job.with_overview:
            _draw(job, slide, tissue, corners)
    source = {**before, "digest": file_digest(row.slide)}
    if _file_facts(row) != before:
        raise StoreError(f"{row.slide} or its annotation changed while it was read. Start again.")
    findings = tuple(map(str, labels.findings.sentences()))
    if findings:
        record = dataclasses.replace(record, warnings=len(findings))
        layout.write_record(job.folder / layout.SLIDES / job.slide, record)
    return record, findings, {**source, "slide": job.slide, "patient": job.patient}


def _tissue(slide: Slide, row: SlideRow, recipe: Recipe, offset: tuple[float, float]) -> TissueMask:
    if row.tissue is not None:
        return tissue_from_outlines(slide, read_polygons(row.tissue, offset))
    return (
        everywhere(slide) if recipe.tissue == "none" else tissue_mask(slide, method=recipe.tissue)
    )


def _record(job: SlideJob, slide: Slide, tissue: TissueMask) -> SlideRecord:
    """What is known of a slide before it is cut: by allow-list, nothing of the file's texts."""
    area = tissue.mask.sum() * np.prod(np.multiply(tissue.scale, slide.mpp)) * 1e-6
    return SlideRecord(
        slide=job.slide,
        patient=job.patient,
        site=job.row.site,
        split=job.row.split,
        hospital=job.row.hospital,
        tiles=0,
        tissue_mm2=round(float(area), 4),
        pixels=(),
        mpp=slide.mpp,
        width=slide.dimensions[0],
        height=slide.dimensions[1],
        codec=slide.codec,
        warnings=0,
        recipe=job.recipe.digest(),
        content="",
    )


def _noting(
    tiles: Iterator[StoredTile], corners: list[tuple[float, float]]
) -> Iterator[StoredTile]:
    for tile in tiles:
        corners.append((tile.x, tile.y))
        yield tile


def _draw(
    job: SlideJob, slide: Slide, tissue: TissueMask, corners: Sequence[tuple[float, float]]
) -> None:
    folder = job.folder / layout.OVERVIEW
    folder.mkdir(exist_ok=True)
    side = job.recipe.tile_size * job.recipe.mpp
    save_overview(
        folder / f"{job.slide}.png",
        slide,
        tissue,
        tiles_xy=corners,
        tile_size=(side / slide.mpp[0], side / slide.mpp[1]),
        title=job.slide,
    )


def _finished(job: SlideJob, source: dict[str, str] | None) -> SlideRecord | None:
    """The record of a slide whose files are those it was made from; brought up to the table."""
    folder = job.folder / layout.SLIDES / job.slide
    record = layout.read_record(folder)
    if record is None or source is None or record.recipe != job.recipe.digest():
        return None
    try:
        facts = _file_facts(job.row)
    except OSError:
        return None
    if any(source.get(name) != value for name, value in facts.items()):
        return None
    row = job.row
    current = dataclasses.replace(
        record, patient=job.patient, site=row.site, split=row.split, hospital=row.hospital
    )
    if current != record:
        layout.write_record(folder, current)
    return current


def _file_facts(row: SlideRow) -> dict[str, str]:
    """What tells whether a slide and its annotation are the files they were."""
    facts = {"name": row.name, "path": str(row.slide), "patient_name": row.patient}
    for prefix, path in (
        ("", row.slide),
        ("annotation_", row.annotation),
        ("tissue_", row.tissue),
    ):
        status = path.stat() if path else None
        facts[f"{prefix}size"] = str(status.st_size) if status else ""
        facts[f"{prefix}modified_ns"] = str(status.st_mtime_ns) if status else ""
    return {
        **facts,
        "annotation": str(row.annotation or ""),
        "tissue": str(row.tissue or ""),
        "mpp": str(row.mpp or ""),
    }


def _write_reports(folder: pathlib.Path, recipe: Recipe, reports: Sequence[SlideReport]) -> None:
    """index.csv and report.csv in numbers and pseudonyms; the texts into the private folder."""
    records = sorted((r.record for r in reports if r.record is not None), key=lambda r: r.slide)
    classes = [*(f"pixels_{name}" for name in recipe.class_names), "ignored"]
    header = ["slide", "patient", "site", "split", "x", "y", "tissue", *classes]
    rows: list[list[Any]] = [
        [record.slide, record.patient, record.site, record.split, *tile.values()]
        for record in records
        for tile in tile_rows(folder, record)
    ]
    layout.write_text(folder / "index.csv", table_text(header, rows))
    header = ["slide", "patient", "site", "split", "hospital", "tiles", "tissue_mm2", *classes]
    header += ["mpp_x", "mpp_y", "width", "height", "codec", "warnings"]
    rows = [
        [
            *(r.slide, r.patient, r.site, r.split, r.hospital, r.tiles, r.tissue_mm2, *r.pixels),
            *(f"{r.mpp[0]:.6g}", f"{r.mpp[1]:.6g}", r.width, r.height, r.codec, r.warnings),
        ]
        for r in records
    ]
    layout.write_text(folder / "report.csv", table_text(header, rows))
    private = [
        [r.slide, r.row.name, kind, text]
        for r in reports
        for kind, texts in (("error", [r.error] if r.error else []), ("warning", r.findings))
        for text in texts
    ]
    path = private_folder(folder) / "report.csv"
    write_private_table(path, ("slide", "name", "kind", "text"), private)


def _drop(
    folder: pathlib.Path, wanted: set[str], known: dict[str, dict[str, str]], *, prune: bool
) -> None:
    """Deletes the slides that nobody lists any more, or refuses to go on with them."""
    there = {path.name for path in (folder / layout.SLIDES).iterdir() if path.is_dir()}
    if not (gone := sorted(there - wanted)):
        return
    if not prune:
        names = ", ".join(known.get(slide, {}).get("name", slide) for slide in gone[:8])
        raise StoreError(
            f"{folder} holds {len(gone)} slides that the table does not list ({names}), and "
            "training would use them. List them, or pass --prune to delete them from the store."
        )
    for slide in gone:
        _remove(folder, slide, known)
    write_sources(folder, known)


def _remove(folder: pathlib.Path, slide: str, known: dict[str, dict[str, str]]) -> None:
    """Takes a slide out of the store, its picture too."""
    shutil.rmtree(folder / layout.SLIDES / slide, ignore_errors=True)
    (folder / layout.OVERVIEW / f"{slide}.png").unlink(missing_ok=True)
    known.pop(slide, None)


def _sweep(folder: pathlib.Path) -> None:
    """Removes what a killed call left half-written."""
    for path in (folder / layout.SLIDES).glob(".*.partial"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Only one call at a time works on a store."""
    with (private_folder(folder) / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(
                f"Another call is preparing {folder}. Wait for it, or end it first."
            ) from error
        yield
