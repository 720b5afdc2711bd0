"""Nuclei of drawn tissue: where they lie, and how they look in hematoxylin."""

import dataclasses

import numpy as np

from fedjax_dp.data.synthetic_style import Style
from fedjax_dp.data.synthetic_texture import Grid, grains

_BOX_SIZES = (8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256, 384)


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


def paint(
    rng: np.random.Generator,
    grid: Grid,
    nuclei: Nuclei,
    halo: float,
    hematoxylin: np.ndarray,
    eosin: np.ndarray,
) -> np.ndarray:
    """Draws the nuclei into two density maps, in place; later ones lie on top.

    Args:
        rng: shapes and chromatin are drawn from it.
        grid: the tile.
        nuclei: what to draw; those outside the tile are cut or left out.
        halo: 0..1, how empty the shrinkage rim around a nucleus is.
        hematoxylin: float32 [size, size], changed in place.
        eosin: float32 [size, size], changed in place.

    Returns:
        Index int32 [size, size] of the nucleus at each pixel, -1 where there is none: the pixels
        whose centre lies inside the drawn outline.
    """
    size, mpp = grid
    owner = np.full((size, size), -1, np.int32)
    # A bent or wobbly outline reaches about a fifth beyond its semi-axis.
    boxes = np.searchsorted(_BOX_SIZES, 2.4 * nuclei.major / mpp + 4)
    boxes = np.asarray(_BOX_SIZES)[np.minimum(boxes, len(_BOX_SIZES) - 1)]
    drawn: dict[int, tuple] = {}
    halos = halo * rng.random(len(nuclei)).astype(np.float32) ** 2
    for box in np.unique(boxes):
        members = np.flatnonzero(boxes == box)
        middle = np.stack([nuclei.y[members], nuclei.x[members]], 1) / mpp + (size - 1) / 2
        corner = np.round(middle).astype(int) - box // 2
        inside = ((corner < size) & (corner + box > 0)).all(1)
        members, middle, corner = members[inside], middle[inside], corner[inside]
        if len(members):
            layers = _render(rng, nuclei.take(members), middle - corner, int(box), mpp)
            for position, member in enumerate(members.tolist()):
                drawn[member] = (corner[position].tolist(), *(layer[position] for layer in layers))
    for member in sorted(drawn):
        (top, left), cover, density, around = drawn[member]
        box = len(cover)
        y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + box, size), min(left + box, size)
        cut = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
        here = slice(y0, y1), slice(x0, x1)
        cover = cover[cut]
        shrunk = 1 - halos[member] * around[cut]
        hematoxylin[here] *= shrunk
        hematoxylin[here] += cover * (density[cut] - hematoxylin[here])
        eosin[here] *= shrunk * (1 - 0.5 * cover)
        owner[here][cover > 0.5] = member
    return owner


def _render(
    rng: np.random.Generator, nuclei: Nuclei, middle: np.ndarray, box: int, mpp: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coverage, density and halo float32 [n, box, box] of n nuclei, each in a box of its own."""
    n = len(nuclei)

    def column(values: np.ndarray) -> np.ndarray:
        return np.asarray(values, np.float32).reshape(n, 1, 1)

    axis = np.arange(box, dtype=np.float32)
    dy = (axis[None, :, None] - column(middle[:, 0])) * np.float32(mpp)
    dx = (axis[None, None, :] - column(middle[:, 1])) * np.float32(mpp)
    cosine, sine = column(np.cos(nuclei.angle)), column(np.sin(nuclei.angle))
    u = (dx * cosine + dy * sine) / column(nuclei.major)
    v = (dy * cosine - dx * sine) / column(nuclei.minor)
    v += column(nuclei.bend * nuclei.major / nuclei.minor) * (u * u - 0.4)
    radius = np.sqrt(u * u + v * v) + np.float32(1e-6)
    c, s = u / radius, v / radius
    c2, s2 = c * c - s * s, 2 * c * s
    c3, s3 = c2 * c - s2 * s, s2 * c + c2 * s
    wobble = rng.standard_normal((6, n, 1, 1), np.float32)
    # Some nuclei are smooth, some dented or angular.
    wobble *= column(rng.choice([0.02, 0.035, 0.05], n))
    edge = 1 + wobble[0] * c2 + wobble[1] * s2 + wobble[2] * c3 + wobble[3] * s3
    edge += 0.6 * (wobble[4] * (c2 * c2 - s2 * s2) + wobble[5] * (s3 * c2 + c3 * s2))
    depth = edge - radius  # relative depth below the outline: 0 on it, 1 in the middle
    scale = column(np.sqrt(nuclei.major * nuclei.minor))
    inward = depth * scale  # about the distance to the outline, in microns
    cover = np.clip(inward / np.maximum(column(nuclei.softness), np.float32(mpp)) + 0.5, 0, 1)
    around = np.clip(1.3 + inward, 0, 1)

    vesicular = column(nuclei.vesicular)
    # The envelope is about half a micron thick, whatever the size of the nucleus.
    rim = np.clip(1 - np.abs(inward - 0.35) / 0.55, 0, 1)
    texture = grains(rng, n, box, 0.45, mpp) + 0.7 * grains(rng, n, box, 0.9, mpp)
    body = 1 + column(nuclei.texture) * texture * (0.6 + 0.9 * vesicular)
    body += (0.25 + 0.75 * vesicular) * rim
    if nuclei.nucleolus.any():
        for _ in range(2):
            away, turn = np.sqrt(rng.random(n)) * 0.55, rng.uniform(0, 2 * np.pi, n)
            nu, nv = column(away * np.cos(turn)), column(away * np.sin(turn))
            size = column(rng.uniform(0.7, 1.3, n)) / scale
            near = 1 - ((u - nu) ** 2 + (v - nv) ** 2) / (size * size)
            body += column(nuclei.nucleolus * (rng.random(n) < 0.7)) * np.clip(2 * near, 0, 1)
    density = column(nuclei.density) * np.clip(body, 0.15, 2.5)
    return cover, density, around
