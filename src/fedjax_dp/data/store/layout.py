"""Where things lie in a tile store, and what its small files say.

store.json                  the recipe: all that decides what is cut from a slide
index.csv                   every tile: slide, patient, site, split, x, y, tissue, pixels per class
report.csv                  every slide, in numbers
slides/PSEUDONYM/           images, labels (zarr3), tiles.csv, done.json: whole or absent
overview/PSEUDONYM.png      the slide at low power with its tissue and its tiles
private/                    key of the pseudonyms, sources.csv, errors: not to leave the site
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

from fedjax_dp.data.manifest import MAX_MPP, MIN_MPP

FORMAT = "fedjax_dp tile store"
VERSION = 1

PRIVATE = "private"
SLIDES = "slides"
OVERVIEW = "overview"
IMAGES, LABELS, TILES, DONE = "images", "labels", "tiles.csv", "done.json"


_CHOICES = {
    "tissue": ("saturation", "otsu", "none"),
    "unannotated": ("", "background", "ignore"),
    "unknown": ("error", "ignore"),
    "origin": ("file", "bounds"),
    "compression": ("none", "lz4", "zstd"),
}


class StoreError(ValueError):
    """A tile store that cannot be used; the message names it and the remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides what is cut from a slide, beside the slide and its annotation.

    Attributes:
        mpp: micrometres per pixel of the tiles.
        tile_size: side of a tile, pixels.
        class_names: K names, background first; the index is the label.
        classes: the class table as it was given, with its other names.
        tissue: how tissue is found, "saturation", "otsu" or "none" (everywhere).
        min_tissue: tiles with less tissue are left out, unless they are annotated.
        unannotated: what pixels outside all annotations are, "background", "ignore" or "".
        unknown: what annotations of unknown classes are, "error" or "ignore".
        origin: from where annotations count, "file" (level 0) or "bounds".
        compression: of the arrays, "none", "lz4" or "zstd"; all lossless.
    """

    mpp: float
    tile_size: int
    class_names: tuple[str, ...]
    classes: str
    tissue: str = "saturation"
    min_tissue: float = 0.5
    unannotated: str = ""
    unknown: str = "error"
    origin: str = "file"
    compression: str = "zstd"

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_tissue <= 1.0:
            raise StoreError(f"Expected 0 <= min_tissue <= 1, got {self.min_tissue}.")
        if not MIN_MPP <= self.mpp <= MAX_MPP:
            raise StoreError(f"Expected {MIN_MPP} <= mpp <= {MAX_MPP}, got {self.mpp}.")
        if not 8 <= self.tile_size <= 4096:
            raise StoreError(f"Expected 8 <= tile_size <= 4096 pixels, got {self.tile_size}.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise StoreError(f"Expected {name} in {choices}, got {getattr(self, name)!r}.")

    def digest(self) -> str:
        """BLAKE2b, in hex: stores of one recipe can be told by it."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlideRecord:
    """What `done.json` says of a finished slide: numbers and pseudonyms alone, no text of the file.

    Attributes:
        slide: pseudonym.
        patient: pseudonym, empty where unknown.
        site: name of the site.
        split: "train", "validation", "test" or "external".
        hospital: as the table of sites says.
        tiles: how many.
        tissue_mm2: area of the tissue found.
        pixels: of each class, and last of those ignored.
        mpp: (x, y) of level 0.
        width: of level 0, pixels.
        height: of level 0, pixels.
        codec: how level 0 is compressed.
        warnings: how many things were skipped, repaired or odd; the texts are private.
        recipe: `Recipe.digest()`.
        content: BLAKE2b, in hex, of all its tiles and labels.
    """

    slide: str
    patient: str
    site: str
    split: str
    hospital: str
    tiles: int
    tissue_mm2: float
    pixels: tuple[int, ...]
    mpp: tuple[float, float]
    width: int
    height: int
    codec: str
    warnings: int
    recipe: str
    content: str


def read_recipe(folder: pathlib.Path) -> Recipe:
    """The recipe of a store.

    Raises:
        StoreError: the folder is no store, or of another version.
    """
    value = _read_json(folder / "store.json", f"Expected a tile store, got {folder}")
    if value.get("format") != FORMAT or value.get("version") != VERSION:
        raise StoreError(
            f"Expected a {FORMAT} of version {VERSION}, got {folder} with "
            f"{value.get('format')!r} of version {value.get('version')!r}. Prepare it anew."
        )
    recipe = value["recipe"]
    return Recipe(**{**recipe, "class_names": tuple(recipe["class_names"])})


def claim(folder: pathlib.Path, recipe: Recipe) -> None:
    """Makes a folder the store of a recipe, or goes on with one that is.

    Raises:
        StoreError: the folder holds a store of another recipe, or something else.
    """
    if (folder / "store.json").exists():
        there = dataclasses.asdict(read_recipe(folder))
        mine = dataclasses.asdict(recipe)
        unlike = [f"{k}: {there[k]!r} there, {mine[k]!r} now" for k in mine if there[k] != mine[k]]
        if unlike:
            raise StoreError(
                f"{folder} is a store of another recipe ({'; '.join(unlike)}). Give the same "
                "settings to go on with it, or another --output."
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise StoreError(f"Expected an empty folder for the store, got {folder}, which is not.")
    (folder / SLIDES).mkdir(parents=True, exist_ok=True)
    value = {"format": FORMAT, "version": VERSION, "recipe": dataclasses.asdict(recipe)}
    write_text(folder / "store.json", json.dumps(value, indent=1) + "\n")


def read_record(folder: pathlib.Path) -> SlideRecord | None:
    """What a slide's folder says, None where it is not finished.

    Raises:
        StoreError: its mark is damaged.
    """
    if not (folder / DONE).exists():
        return None
    value = _read_json(folder / DONE, f"Cannot read the mark of slide {folder.name}")
    try:
        return SlideRecord(
            **{**value, "pixels": tuple(value["pixels"]), "mpp": tuple(value["mpp"])}
        )
    except (TypeError, KeyError) as error:
        raise StoreError(
            f"Cannot read the mark of slide {folder.name}: {error}. Delete {folder} and prepare "
            "it anew."
        ) from error


def write_record(folder: pathlib.Path, record: SlideRecord) -> None:
    """Writes a slide's mark, whole or not at all."""
    write_text(folder / DONE, json.dumps(dataclasses.asdict(record), indent=1) + "\n")


def read_records(folder: pathlib.Path) -> tuple[SlideRecord, ...]:
    """Of every finished slide of a store, by pseudonym."""
    found = (read_record(path) for path in sorted((folder / SLIDES).iterdir()))
    return tuple(record for record in found if record is not None)


def write_text(path: pathlib.Path, text: str, mode: int = 0o644) -> None:
    """Writes a file whole or not at all, durably."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with open(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, mode)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: pathlib.Path) -> None:
    """Makes durable which files a folder holds."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json(path: pathlib.Path, problem: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"{problem}: {path.name}: {error.strerror or error}.") from error
    except ValueError as error:
        raise StoreError(f"{problem}: {path.name} is no JSON: {error}.") from error
