"""Nuclei of drawn tissue: kinds of cells, their sizes, and where they lie."""

import dataclasses

import numpy as np

from fedjax_dp.data.synthetic_style import Style
from fedjax_dp.data.synthetic_texture import Grid


@dataclasses.dataclass(frozen=True)
class Nuclei:
    """n nuclei; every field is float32 [n].

    Attributes:
        y, x: centre, in microns from the middle of the tile.
        major, minor: semi-axes in microns.
        angle: direction of the major axis in radians.
        density: hematoxylin of the body.
        vesicular: 0 = even, 1 = pale centre, dark rim.
        nucleolus: density of the nucleoli above the body, 0 = none.
        texture: contrast of the chromatin.
        bend: curvature, relative.
        softness: width of the outline in microns: sharp, or out of focus.
        tissue: class index of the tissue it belongs to.
    """

    y: np.ndarray
    x: np.ndarray
    major: np.ndarray
    minor: np.ndarray
    angle: np.ndarray
    density: np.ndarray
    vesicular: np.ndarray
    nucleolus: np.ndarray
    texture: np.ndarray
    bend: np.ndarray
    softness: np.ndarray
    tissue: np.ndarray

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: np.ndarray) -> "Nuclei":
        """The nuclei at `index`, in that order."""
        return Nuclei(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))


def concatenate(parts: list[Nuclei]) -> Nuclei:
    """All nuclei of `parts`, in order."""
    return Nuclei(
        *(
            np.concatenate([getattr(part, field.name) for part in parts])
            for field in dataclasses.fields(Nuclei)
        )
    )


def _population(
    rng: np.random.Generator,
    centres: np.ndarray,
    *,
    tissue: int,
    diameter_um: float,
    spread: float,
    aspect: tuple[float, float],
    angle: np.ndarray | None,
    density: float,
    vesicular: float,
    nucleolus: float,
    texture: float,
    bend: float = 0.0,
) -> Nuclei:
    n = len(centres)
    diameter = diameter_um * np.exp(spread * rng.standard_normal(n))
    ratio = np.sqrt(rng.uniform(*aspect, n))
    angle = rng.uniform(0, np.pi, n) if angle is None else angle
    columns = (
        centres[:, 0],
        centres[:, 1],
        diameter / 2 * ratio,
        diameter / 2 / ratio,
        angle,
        # Nuclei of one field differ: cut high or low, condensed, out of focus.
        density * np.exp(np.clip(0.22 * rng.standard_normal(n), -0.6, 0.4)),
        np.clip(vesicular + 0.15 * rng.standard_normal(n), 0, 1),
        nucleolus * (rng.random(n) < 0.7) * rng.uniform(0.5, 1.2, n),
        texture * rng.uniform(0.6, 1.4, n),
        bend * rng.standard_normal(n),
        rng.choice([0.3, 0.5, 1.1], n, p=[0.5, 0.35, 0.15]),
        np.full(n, tissue),
    )
    return Nuclei(*(np.asarray(column, np.float32) for column in columns))


def epithelial(
    rng: np.random.Generator,
    style: Style,
    centres: np.ndarray,
    tissue: int,
    angle: np.ndarray | None = None,
) -> Nuclei:
    """Nuclei of epithelium at `centres` float [n, 2]; elongated along `angle` if given."""
    return _population(
        rng,
        centres,
        tissue=tissue,
        diameter_um=style.diameter_um,
        spread=style.pleomorphism,
        aspect=(1.0, 1.5) if angle is None else (1.2, 2.0),
        angle=angle,
        density=1.05 - 0.45 * style.vesicular,
        vesicular=style.vesicular,
        nucleolus=0.8 * style.vesicular,
        texture=style.chromatin,
    )


def lymphocytes(rng: np.random.Generator, style: Style, centres: np.ndarray, tissue: int) -> Nuclei:
    """Small round dark nuclei at `centres` float [n, 2]."""
    return _population(
        rng,
        centres,
        tissue=tissue,
        diameter_um=6.3,
        spread=0.09,
        aspect=(1.0, 1.25),
        angle=None,
        density=1.15,
        vesicular=0.05,
        nucleolus=0.0,
        texture=1.2 * style.chromatin,
    )


def fibroblasts(
    rng: np.random.Generator, style: Style, centres: np.ndarray, tissue: int, angle: np.ndarray
) -> Nuclei:
    """Spindle nuclei at `centres` float [n, 2] along the fibres' `angle` float [n]."""
    return _population(
        rng,
        centres,
        tissue=tissue,
        diameter_um=6.6,
        spread=0.18,
        aspect=(1.8, 5.5),
        angle=angle + 0.15 * rng.standard_normal(len(centres)),
        density=0.9,
        vesicular=0.5 * style.vesicular,
        nucleolus=0.0,
        texture=style.chromatin,
        bend=0.12,
    )


def glia(rng: np.random.Generator, style: Style, centres: np.ndarray, tissue: int) -> Nuclei:
    """Round and oval nuclei in any direction at `centres` float [n, 2]: fibrillary ground."""
    return _population(
        rng,
        centres,
        tissue=tissue,
        diameter_um=0.87 * style.diameter_um,
        spread=0.2,
        aspect=(1.0, 2.4),
        angle=None,
        density=0.95 - 0.25 * style.vesicular,
        vesicular=0.8 * style.vesicular,
        nucleolus=0.3 * style.vesicular,
        texture=style.chromatin,
        bend=0.05,
    )


def pyknotic(rng: np.random.Generator, centres: np.ndarray, tissue: int) -> Nuclei:
    """Shrunken, almost black nuclei of dying cells at `centres` float [n, 2]."""
    return _population(
        rng,
        centres,
        tissue=tissue,
        diameter_um=4.2,
        spread=0.25,
        aspect=(1.0, 1.7),
        angle=None,
        density=1.25,
        vesicular=0.0,
        nucleolus=0.0,
        texture=0.05,
    )


def scatter(
    rng: np.random.Generator, grid: Grid, spacing_um: float, margin_um: float
) -> np.ndarray:
    """A jittered lattice of points float [n, 2] over the tile and a margin, in microns."""
    half = grid.half_width + margin_um
    rows = np.arange(-half, half + spacing_um, spacing_um * 0.87)
    columns = np.arange(-half, half + spacing_um, spacing_um)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    x = x + spacing_um * 0.5 * (np.arange(len(rows)) % 2)[:, None]
    points = np.stack([y.ravel(), x.ravel()], 1) - rng.uniform(0, spacing_um, 2)
    return points + spacing_um * rng.uniform(-0.42, 0.42, points.shape)


def spread_apart(nuclei: Nuclei, touching: float) -> Nuclei:
    """Leaves out nuclei nearer to an earlier one than `touching` times the sum of their radii."""
    radius = np.sqrt(nuclei.major * nuclei.minor)
    distance2 = (nuclei.y[:, None] - nuclei.y) ** 2 + (nuclei.x[:, None] - nuclei.x) ** 2
    too_near = distance2 < (touching * (radius[:, None] + radius)) ** 2
    return nuclei.take(np.flatnonzero(~np.tril(too_near, -1).any(1)))
