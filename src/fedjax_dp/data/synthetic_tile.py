"""One drawn tile from its name: tissue, then stain, microscope, sensor and file."""

import dataclasses
import io
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from fedjax_dp.data.synthetic_style import (
    EXTERNAL_SITES,
    TRAINING_SITES,
    Style,
    patient_style,
    wide_style,
)
from fedjax_dp.data.synthetic_tissue import Tissue, draw_tissue

Task = Literal["nuclei", "tissue"]
Variation = Literal["sites", "wide"]

CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "nuclei": ("background", "nucleus"),
    "tissue": ("background", "stroma", "epithelium", "lymphocytes", "necrosis"),
}
"""Label names of each task; in "tissue", background is glass, lumen, tears and fat."""

SITE_NAMES = (*TRAINING_SITES, *EXTERNAL_SITES)
"""All sites, training first; a `TileId` refers to them by index."""

# Red cells absorb green and blue: the optical density vector of oxygenated blood with eosin.
_BLOOD = (0.10, 0.72, 0.68)
_PATIENT, _TILE = 0, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileSpec:
    """What all tiles of one drawing have in common.

    Attributes:
        seed: any non-negative integer.
        task: which labels: "nuclei" or "tissue". The images are the same.
        tile_size: side in pixels, 16..512.
        mpp: microns per pixel, 0.1..2.
        variation: "sites", or "wide" for a look of its own for every tile.

    Raises:
        ValueError: if a value is out of range.
    """

    seed: int
    task: Task
    tile_size: int
    mpp: float
    variation: Variation

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"Expected seed >= 0, got {self.seed}.")
        if self.task not in CLASS_NAMES:
            raise ValueError(f"Expected task in {sorted(CLASS_NAMES)}, got {self.task!r}.")
        if self.variation not in ("sites", "wide"):
            raise ValueError(f'Expected variation "sites" or "wide", got {self.variation!r}.')
        if not 16 <= self.tile_size <= 512:
            raise ValueError(f"Expected 16 <= tile_size <= 512 pixels, got {self.tile_size}.")
        if not 0.1 <= self.mpp <= 2.0:
            raise ValueError(f"Expected 0.1 <= mpp <= 2.0 microns per pixel, got {self.mpp}.")


class TileId(NamedTuple):
    """Which tile: everything that its random numbers depend on, besides the seed."""

    site: int
    patient: int
    tile: int


def draw_tile(spec: TileSpec, tile_id: TileId) -> tuple[np.ndarray, np.ndarray]:
    """The image uint8 [H, W, 3] and the label uint8 [H, W] of one tile.

    Guarantees: depends on the two arguments only, never on what else is drawn.
    """
    rng = _rng(spec.seed, _TILE, *tile_id)
    if spec.variation == "wide":
        style = wide_style(rng)
    else:
        site = {**TRAINING_SITES, **EXTERNAL_SITES}[SITE_NAMES[tile_id.site]]
        style = patient_style(_rng(spec.seed, _PATIENT, tile_id.site, tile_id.patient), site)
    tissue = draw_tissue(rng, style, spec.tile_size, spec.mpp)
    label = tissue.nuclei if spec.task == "nuclei" else tissue.regions
    return photograph(rng, style, tissue, spec.mpp), label.astype(np.uint8)


def _rng(seed: int, *spawn_key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=spawn_key))


def photograph(rng: np.random.Generator, style: Style, tissue: Tissue, mpp: float) -> np.ndarray:
    """The tissue through stain, microscope, sensor and file: uint8 [H, W, 3].

    Beer-Lambert: light falls by exp(-sum of concentration times optical density vector).
    """
    stains = np.array([style.hematoxylin, style.eosin, _BLOOD], np.float32)
    stains *= np.array([[style.hematoxylin_strength], [style.eosin_strength], [1.0]], np.float32)
    density = np.stack([tissue.hematoxylin, tissue.eosin, tissue.blood], -1)
    shape = density.shape
    light = np.exp(density.reshape(-1, 3) @ -stains).reshape(shape)
    light *= np.array(style.glass, np.float32) * np.float32(255)
    sigma = style.blur_um / mpp
    if sigma > 0.2:  # less is no blur on a pixel grid
        light = ndimage.gaussian_filter(light, (sigma, sigma, 0), truncate=3.0)
    light += np.float32(style.noise) * rng.standard_normal(shape, np.float32)
    light += np.float32(0.5)
    image = np.clip(light, 0, 255).astype(np.uint8)
    if style.jpeg_quality:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=style.jpeg_quality)
        image = np.array(Image.open(buffer))
    return image
