"""Draws nuclei: outline, envelope, chromatin and nucleoli, and the mask that is exactly theirs."""

import numpy as np

from fedjax_dp.data.synthetic_nuclei import Nuclei
from fedjax_dp.data.synthetic_texture import Grid, grains

# Nuclei are drawn together in boxes of the same size, in pixels: few large array operations.
_BOX_SIZES = (8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256, 384)


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
