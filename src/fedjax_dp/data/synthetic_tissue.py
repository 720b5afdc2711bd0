"""One tile of drawn tissue: regions, cells, fibres as densities of the stains, and exact masks."""

import dataclasses

import numpy as np

from fedjax_dp.data import synthetic_nuclei as cells
from fedjax_dp.data.synthetic_ground import (
    BACKGROUND,
    EPITHELIUM,
    LYMPHOCYTES,
    NECROSIS,
    STROMA,
    Matrix,
    draw_blood,
    draw_ground,
)
from fedjax_dp.data.synthetic_paint import paint
from fedjax_dp.data.synthetic_style import Style
from fedjax_dp.data.synthetic_texture import Grid, grain, waves

_MARGIN_UM = 8.0


@dataclasses.dataclass(frozen=True)
class Tissue:
    """Densities of the stains over a tile, before the optics, and what lies where.

    Attributes:
        hematoxylin, eosin, blood: float32 [H, W], concentrations relative to the site's strength.
        nuclei: bool [H, W].
        regions: uint8 [H, W], tissue class of each pixel.
    """

    hematoxylin: np.ndarray
    eosin: np.ndarray
    blood: np.ndarray
    nuclei: np.ndarray
    regions: np.ndarray


@dataclasses.dataclass
class _Gland:
    y: float
    x: float
    outer: np.ndarray  # outline radius as harmonics, microns
    lumen: float

    def radius(self, cosine: np.ndarray, sine: np.ndarray) -> np.ndarray:
        """Distance of the outline from the centre, in the given directions."""
        mean, a2, b2, a3, b3 = self.outer
        cosine2, sine2 = cosine * cosine - sine * sine, 2 * cosine * sine
        wobble = a2 * cosine2 + b2 * sine2
        wobble += a3 * (cosine2 * cosine - sine2 * sine)
        wobble += b3 * (sine2 * cosine + cosine2 * sine)
        return mean * (1 + wobble)


def draw_tissue(rng: np.random.Generator, style: Style, size: int, mpp: float) -> Tissue:
    """Draws one tile of `size` pixels of `mpp` microns each."""
    grid = Grid(size, mpp)
    regions, glands = _draw_regions(rng, style, grid)
    angle = rng.uniform(0, np.pi)
    chance = rng.random()
    matrix = Matrix.AREOLAR if chance < style.areolar + style.neuropil else Matrix.COLLAGEN
    matrix = Matrix.NEUROPIL if chance < style.neuropil else matrix
    nuclei = _place_nuclei(rng, style, grid, regions, glands, matrix, angle)
    hematoxylin, eosin = draw_ground(rng, style, grid, regions, nuclei, matrix, angle)
    blood = draw_blood(rng, style, grid, regions)
    owner = paint(rng, grid, nuclei, style.halo, hematoxylin, eosin)
    inside = owner >= 0
    if len(nuclei):
        # A nucleus that bulges into a lumen or a cleft is tissue of its own kind, not glass.
        bulging = inside & (regions == BACKGROUND)
        regions[bulging] = nuclei.tissue[owner[bulging]].astype(np.uint8)
    blood[inside] = 0
    return Tissue(hematoxylin, eosin, blood, inside, regions)


def _draw_regions(
    rng: np.random.Generator, style: Style, grid: Grid
) -> tuple[np.ndarray, list[_Gland]]:
    axis = grid.axis
    regions = np.full((grid.size, grid.size), STROMA, np.uint8)
    # Tissues interlock: every outline is ragged by about a micron.
    ragged = 0.07 * grain(rng, grid, 0.6) + 0.05 * grain(rng, grid, 1.4)
    glands: list[_Gland] = []
    kind = rng.choice(4, p=style.architecture)
    if kind == 0:
        regions[waves(rng, grid, 70.0) + ragged > -1.1] = EPITHELIUM
    elif kind == 1:
        regions[waves(rng, grid, 45.0) + ragged > rng.uniform(-0.5, 0.6)] = EPITHELIUM
    elif kind == 2:
        glands = _draw_glands(rng, style, grid, regions)
    chances = rng.random(4)
    if chances[0] < style.inflammation:
        field = waves(rng, grid, 50.0) + ragged > rng.uniform(0.0, 1.0)
        regions[field & (regions == STROMA)] = LYMPHOCYTES
    if chances[1] < style.necrosis:
        field = waves(rng, grid, 60.0) + ragged > rng.uniform(-0.3, 0.8)
        regions[field & (regions == EPITHELIUM)] = NECROSIS
    if chances[2] < style.fat:
        for _ in range(rng.integers(2, 7)):
            y, x = rng.uniform(-1, 1, 2) * (grid.half_width + 10)
            reach = rng.uniform(8, 25)
            hole = (axis[:, None] - y) ** 2 + (axis[None, :] - x) ** 2 < reach**2
            regions[hole & (regions == STROMA)] = BACKGROUND
    if chances[3] < style.edge:
        turn = rng.uniform(0, 2 * np.pi)
        reach = axis[:, None] * np.sin(turn) + axis[None, :] * np.cos(turn)
        edge = (
            reach + 4 * waves(rng, grid, 30.0) + 5 * ragged
            > rng.uniform(-0.3, 0.9) * grid.half_width
        )
        regions[edge] = BACKGROUND
    return regions, glands


def _draw_glands(
    rng: np.random.Generator, style: Style, grid: Grid, regions: np.ndarray
) -> list[_Gland]:
    glands = []
    axis = grid.axis
    spacing = rng.uniform(45, 80)
    for centre in cells.scatter(rng, grid, spacing, 25.0):
        wall = rng.uniform(1.7, 2.6) * style.diameter_um
        reach = spacing * rng.uniform(0.32, 0.5)
        outer = np.array([reach, *rng.normal(0, 0.07, 4)], np.float32)
        gland = _Gland(centre[0], centre[1], outer, max(reach - wall, 0) / reach)
        dy, dx = axis[:, None] - centre[0], axis[None, :] - centre[1]
        away2 = dy * dy + dx * dx
        if away2.min() > (1.5 * reach) ** 2:
            continue
        away = np.sqrt(away2) + np.float32(1e-6)
        limit = gland.radius(dx / away, dy / away)
        away += 0.4 * grain(rng, grid, 1.2)
        regions[away < limit] = EPITHELIUM
        regions[away < gland.lumen * limit] = BACKGROUND
        glands.append(gland)
    return glands


def _at(regions: np.ndarray, grid: Grid, points: np.ndarray) -> np.ndarray:
    """Region of each point [n, 2]; points beyond the border take the nearest pixel's."""
    index = np.round(points / grid.mpp + (grid.size - 1) / 2).astype(int)
    rows, columns = np.clip(index, 0, grid.size - 1).T
    return regions[rows, columns]


def _place_nuclei(
    rng: np.random.Generator,
    style: Style,
    grid: Grid,
    regions: np.ndarray,
    glands: list[_Gland],
    matrix: Matrix,
    fibre_angle: float,
) -> cells.Nuclei:
    dense = 1 / np.sqrt(style.cellularity)
    parts = []
    for gland in glands:
        parts.append(_gland_nuclei(rng, style, gland, dense))

    def fill(kind: int, spacing_um: float, keep: float) -> np.ndarray:
        points = cells.scatter(rng, grid, spacing_um * dense, _MARGIN_UM)
        points = points[rng.random(len(points)) < keep]
        return points[_at(regions, grid, points) == kind]

    if not glands:
        points = fill(EPITHELIUM, 1.22 * style.diameter_um, 0.85)
        parts.append(cells.epithelial(rng, style, points, EPITHELIUM))
    points = fill(LYMPHOCYTES, 7.6, 0.9)
    parts.append(cells.lymphocytes(rng, style, points, LYMPHOCYTES))
    points = fill(STROMA, rng.uniform(12, 17), rng.uniform(0.4, 0.9))
    if matrix is Matrix.NEUROPIL:
        parts.append(cells.glia(rng, style, points, STROMA))
    else:
        along = np.full(len(points), fibre_angle)
        parts.append(cells.fibroblasts(rng, style, points, STROMA, along))
    points = fill(STROMA, 20.0, 0.25)
    parts.append(cells.lymphocytes(rng, style, points, STROMA))
    points = fill(NECROSIS, 10.0, 0.5)
    parts.append(cells.pyknotic(rng, points, NECROSIS))
    nuclei = cells.concatenate(parts)
    # Glands may have been torn by the tissue's edge: their nuclei went with them.
    here = _at(regions, grid, np.stack([nuclei.y, nuclei.x], 1))
    return cells.spread_apart(nuclei.take(np.flatnonzero(here != BACKGROUND)), style.apart)


def _gland_nuclei(
    rng: np.random.Generator, style: Style, gland: _Gland, dense: float
) -> cells.Nuclei:
    """A basal ring of nuclei that stand upright on the gland's outline."""
    spacing = 0.85 * style.diameter_um * dense
    count = max(int(2 * np.pi * gland.outer[0] * 0.85 / spacing), 5)
    turn = (np.arange(count) + rng.uniform(-0.3, 0.3, count)) * 2 * np.pi / count
    depth = 1 - (1 - gland.lumen) * rng.uniform(0.25, 0.5, count)
    reach = gland.radius(np.cos(turn), np.sin(turn)) * depth
    centres = np.stack([gland.y + reach * np.sin(turn), gland.x + reach * np.cos(turn)], 1)
    return cells.epithelial(
        rng, style, centres, EPITHELIUM, turn + 0.15 * rng.standard_normal(count)
    )
