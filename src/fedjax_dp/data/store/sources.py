"""The private list that resolves pseudonyms: names, paths and digests of a store's slides."""

import csv
import pathlib

from fedjax_dp.data.store.pseudonyms import private_folder, write_private_table

SOURCES = "sources.csv"
_COLUMNS = (
    "slide",
    "name",
    "path",
    "size",
    "modified_ns",
    "digest",
    "annotation",
    "annotation_size",
    "annotation_modified_ns",
    "tissue",
    "tissue_size",
    "tissue_modified_ns",
    "mpp",
    "patient",
    "patient_name",
)


def read_sources(folder: pathlib.Path) -> dict[str, dict[str, str]]:
    """Pseudonym -> what is known of the slide; empty where nothing is."""
    path = private_folder(folder) / SOURCES
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {row["slide"]: row for row in csv.DictReader(file)}


def write_sources(folder: pathlib.Path, known: dict[str, dict[str, str]]) -> None:
    """Writes the list, readable by its owner alone, whole or not at all."""
    rows = [[known[slide].get(c, "") for c in _COLUMNS] for slide in sorted(known)]
    write_private_table(private_folder(folder) / SOURCES, _COLUMNS, rows)
