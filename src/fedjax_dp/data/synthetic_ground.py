"""What lies between nuclei: cytoplasm, collagen, neuropil, debris, blood, as stain densities."""

import enum

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from fedjax_dp.data.synthetic_nuclei import Nuclei, scatter
from fedjax_dp.data.synthetic_style import Style
from fedjax_dp.data.synthetic_texture import Grid, fibres, grain, waves

BACKGROUND, STROMA, EPITHELIUM, LYMPHOCYTES, NECROSIS = range(5)
"""Tissue classes; background is glass, lumen, tears and fat."""

# Densities of the classes' ground substance, in the order of the class indices.
_EOSIN = np.array([0.01, 0.55, 0.60, 0.42, 0.75], np.float32)
_BASOPHILIA = np.array([0.0, 0.25, 1.0, 0.8, 0.5], np.float32)


class Matrix(enum.Enum):
    """What a tile's stroma is made of."""

    COLLAGEN = "dense wavy bundles"
    AREOLAR = "thin strands with much space between"
    NEUROPIL = "a felt of fine processes, as in brain"


def draw_ground(
    rng: np.random.Generator,
    style: Style,
    grid: Grid,
    regions: np.ndarray,
    nuclei: Nuclei,
    matrix: Matrix,
    fibre_angle: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Hematoxylin and eosin float32 [size, size] of everything but nuclei and blood."""
    fine, medium, coarse = (grain(rng, grid, width) for width in (0.3, 0.7, 1.8))
    slow = waves(rng, grid, 22.0)
    stroma, epithelium = regions == STROMA, regions == EPITHELIUM

    # Levels blend over about half a micron; the textures on them stay sharp.
    sigma = 0.4 / grid.mpp
    eosin = ndimage.gaussian_filter(_EOSIN[regions], sigma, truncate=2.5)
    purple = ndimage.gaussian_filter(_BASOPHILIA[regions], sigma, truncate=2.5)

    vacuoles = np.clip(medium + 0.5 * coarse - 1.5, 0, 1)
    texture = style.grit * (0.13 * fine + 0.14 * medium + 0.06 * coarse - 0.5 * vacuoles)
    relief = np.where(stroma, _stroma(rng, style, grid, matrix, fibre_angle, medium, coarse), 0)
    border, shade = _cell_pattern(rng, style, grid, nuclei)
    clear = np.clip(2 * (style.clearing - 0.5) + 0.8 * shade, 0, 1) * np.clip(1 - 2 * border, 0, 1)
    cytoplasm = 0.14 * shade - clear * (0.75 - 0.25 * np.abs(medium))
    cytoplasm += (1.3 if style.membrane > 0 else 2.4) * style.membrane * border
    relief += np.where(epithelium, cytoplasm, 0)
    # Sections are not evenly thick.
    relief += np.where(stroma, 0.6, 1.0) * texture + 0.13 * slow
    eosin *= np.clip(1 + relief, 0.03, 2)
    purple *= style.basophilia * np.clip(1 + 0.9 * relief + 0.15 * medium, 0, 2)
    return purple, eosin


def _stroma(
    rng: np.random.Generator,
    style: Style,
    grid: Grid,
    matrix: Matrix,
    angle: float,
    medium: np.ndarray,
    coarse: np.ndarray,
) -> np.ndarray:
    """Relative density of the stroma's eosin above its level."""
    streaks = fibres(rng, grid, angle, style.waviness_um)
    if matrix is Matrix.NEUROPIL:
        return 0.3 - 0.35 * np.abs(medium + 0.6 * coarse) + 0.1 * streaks
    if matrix is Matrix.AREOLAR:
        across = fibres(rng, grid, angle + rng.uniform(0.3, 1.2), 2 * style.waviness_um)
        strands = np.clip(1.2 - 1.3 * np.minimum(np.abs(streaks), np.abs(across)), 0, 1)
        return 0.9 * strands - 0.85 + 0.15 * coarse
    clefts = np.clip(1.5 * style.looseness - 2.1 - streaks + 0.5 * waves(rng, grid, 22.0), 0, 1)
    return 0.22 * streaks - 0.9 * clefts


def _cell_pattern(rng: np.random.Generator, style: Style, grid: Grid, nuclei: Nuclei) -> np.ndarray:
    """Borders between epithelial cells (0..1), and each cell's shade: float32 [2, size, size]."""
    own = np.flatnonzero(nuclei.tissue == EPITHELIUM)
    if len(own) < 2:
        return np.zeros((2, grid.size, grid.size), np.float32)
    tree = cKDTree(np.stack([nuclei.y[own], nuclei.x[own]], 1))
    coarse = grid.axis[::2]
    # Unstraight borders: the query points wander.
    wander = 0.9 * waves(rng, grid, 8.0)[::2, ::2]
    y, x = np.broadcast_arrays(coarse[:, None] + wander, coarse[None, :] - wander)
    distance, index = tree.query(np.stack([y.ravel(), x.ravel()], 1), k=2)
    gap = (distance[:, 1] - distance[:, 0]).astype(np.float32)
    # Cells that let go of each other leave wide clefts, here and there.
    width = 1.2 + 3.0 * max(-style.membrane, 0)
    border = np.clip(1.1 + 0.6 * waves(rng, grid, 12.0)[::2, ::2].ravel() - gap / width, 0, 1)
    shade = rng.standard_normal(len(own)).astype(np.float32)[index[:, 0]] * (1 - border)
    pattern = np.stack([border, shade]).reshape(2, *y.shape)
    return pattern.repeat(2, 1).repeat(2, 2)[:, : grid.size, : grid.size]


def draw_blood(
    rng: np.random.Generator, style: Style, grid: Grid, regions: np.ndarray
) -> np.ndarray:
    """Red cells in a vessel-like patch of the stroma; float32 [size, size]."""
    blood = np.zeros((grid.size, grid.size), np.float32)
    if rng.random() >= style.bleeding:
        return blood
    patch = (waves(rng, grid, 40.0) > rng.uniform(0.6, 1.6)) & (regions == STROMA)
    axis = grid.axis
    for y, x in scatter(rng, grid, 6.5, 0.0):
        row, column = np.abs(axis - y).argmin(), np.abs(axis - x).argmin()
        if max(abs(y), abs(x)) > grid.half_width or not patch[row, column]:
            continue
        rows = np.flatnonzero(np.abs(axis - y) < 4)
        columns = np.flatnonzero(np.abs(axis - x) < 4)
        here = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        away2 = (axis[rows, None] - y) ** 2 + (axis[None, columns] - x) ** 2
        disc = np.clip((3.2**2 - away2) / 5, 0, 1) * (0.75 + 0.02 * away2)
        blood[here] = np.maximum(blood[here], disc.astype(np.float32))
    return blood
