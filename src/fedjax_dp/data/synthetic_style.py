"""How a laboratory and a patient make tissue look: stain, scanner, nuclei; the sites' values."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
    """Everything that varies between hospitals and patients.

    Attributes:
        hematoxylin, eosin: optical density vectors (R, G, B), unit norm (natural logarithm).
        hematoxylin_strength, eosin_strength: concentration where a structure has density 1.
        glass: colour (R, G, B) in [0, 1] of the slide without tissue.
        blur_um: standard deviation of the optics' blur, in microns.
        noise: standard deviation of the sensor's noise, in grey levels of 255.
        jpeg_quality: 1..95, or 0 for none.
        cellularity: nuclei per area, relative to the usual.
        diameter_um: mean diameter of epithelial nuclei, in microns.
        pleomorphism: relative spread of their diameters.
        vesicular: 0 = dark and even nuclei, 1 = pale with rim and nucleoli.
        chromatin: contrast of the chromatin's texture.
        basophilia: hematoxylin in the cytoplasm.
        membrane: density of cell borders; negative = white clefts between cells.
        clearing: 0..1, empty cytoplasm (clear or foamy cells).
        halo: 0..1, shrinkage rims around nuclei.
        apart: least distance of two nuclei relative to the sum of their radii; they overlap
            below 1.
        grit: contrast of the ground's fine texture.
        neuropil, areolar: probability that a tile's stroma is a felt of fine processes (as in
            brain) or thin strands with space between, instead of collagen.
        waviness_um: amplitude of the collagen's waves.
        looseness: 0..1, white clefts between collagen bundles.
        architecture: relative frequency of sheets, nests, glands and stroma.
        inflammation, necrosis, bleeding, fat, edge: probability that a tile shows lymphocytes,
            necrosis, red cells, fat vacuoles, or the tissue's edge.
    """

    hematoxylin: tuple[float, float, float] = (0.60, 0.71, 0.37)
    eosin: tuple[float, float, float] = (0.17, 0.87, 0.46)
    hematoxylin_strength: float = 1.5
    eosin_strength: float = 0.8
    glass: tuple[float, float, float] = (0.95, 0.94, 0.95)
    blur_um: float = 0.2
    noise: float = 2.0
    jpeg_quality: int = 85
    cellularity: float = 1.0
    diameter_um: float = 8.5
    pleomorphism: float = 0.15
    vesicular: float = 0.4
    chromatin: float = 0.2
    basophilia: float = 0.15
    membrane: float = 0.1
    clearing: float = 0.0
    halo: float = 0.3
    apart: float = 0.78
    grit: float = 1.0
    neuropil: float = 0.05
    areolar: float = 0.15
    waviness_um: float = 2.0
    looseness: float = 0.4
    architecture: tuple[float, float, float, float] = (0.35, 0.25, 0.25, 0.15)
    inflammation: float = 0.4
    necrosis: float = 0.2
    bleeding: float = 0.15
    fat: float = 0.08
    edge: float = 0.12


TRAINING_SITES: dict[str, Style] = {
    # Balanced stain, sharp scanner: the reference.
    "alder": Style(),
    # Strong purple hematoxylin, dark crowded nuclei.
    "birch": Style(
        hematoxylin=(0.58, 0.74, 0.34), eosin=(0.26, 0.88, 0.40), hematoxylin_strength=1.9,
        eosin_strength=0.75, glass=(0.93, 0.92, 0.95), blur_um=0.25, noise=2.5, jpeg_quality=70,
        cellularity=1.3, apart=0.68, diameter_um=7.8, vesicular=0.15, basophilia=0.3, membrane=0.0,
        architecture=(0.5, 0.2, 0.1, 0.2), inflammation=0.5,
    ),
    # Orange-red eosin, pale vesicular nuclei with nucleoli, glands.
    "cedar": Style(
        hematoxylin=(0.56, 0.70, 0.44), eosin=(0.10, 0.84, 0.53), hematoxylin_strength=1.35,
        eosin_strength=1.0, glass=(0.96, 0.95, 0.92), blur_um=0.15, noise=1.5, jpeg_quality=92,
        diameter_um=9.5, vesicular=0.8, basophilia=0.08, membrane=0.25,
        architecture=(0.2, 0.15, 0.5, 0.15), bleeding=0.25,
    ),
    # Faded, bluish-grey old stain; loose stroma and clefts between cells.
    "dogwood": Style(
        hematoxylin=(0.67, 0.66, 0.34), eosin=(0.24, 0.86, 0.45), hematoxylin_strength=1.15,
        eosin_strength=0.5, glass=(0.90, 0.91, 0.93), blur_um=0.32, noise=3.0, jpeg_quality=60,
        cellularity=0.8, diameter_um=8.8, pleomorphism=0.25, vesicular=0.5, membrane=-0.4,
        neuropil=0.4, areolar=0.3, grit=1.3, looseness=0.7, fat=0.15,
        architecture=(0.25, 0.35, 0.15, 0.25),
    ),
    # Magenta, thick sections, large pleomorphic nuclei, necrosis.
    "elm": Style(
        hematoxylin=(0.52, 0.77, 0.37), eosin=(0.19, 0.90, 0.40), hematoxylin_strength=1.7,
        eosin_strength=1.15, glass=(0.95, 0.91, 0.94), blur_um=0.3, noise=2.0, jpeg_quality=80,
        cellularity=0.95, diameter_um=9.8, pleomorphism=0.3, vesicular=0.35, basophilia=0.25,
        looseness=0.25, architecture=(0.4, 0.3, 0.1, 0.2), necrosis=0.4,
    ),
}  # fmt: skip
"""The five hospitals that train."""

EXTERNAL_SITES: dict[str, Style] = {
    # Blue-violet, lossless, clear cells.
    "fir": Style(
        hematoxylin=(0.67, 0.68, 0.29), eosin=(0.32, 0.86, 0.40), hematoxylin_strength=1.6,
        eosin_strength=0.6, glass=(0.97, 0.96, 0.97), blur_um=0.25, jpeg_quality=0,
        clearing=0.6, membrane=0.35, diameter_um=7.6, vesicular=0.2,
    ),
    # Brick red, heavy compression, large pale nuclei.
    "ginkgo": Style(
        hematoxylin=(0.50, 0.71, 0.50), eosin=(0.08, 0.80, 0.60), hematoxylin_strength=1.5,
        eosin_strength=1.2, glass=(0.94, 0.93, 0.88), blur_um=0.35, noise=3.5, jpeg_quality=50,
        diameter_um=10.2, vesicular=0.7, membrane=0.1,
    ),
    # Pale pink, sparse.
    "hazel": Style(
        hematoxylin=(0.62, 0.69, 0.37), eosin=(0.12, 0.91, 0.40), hematoxylin_strength=1.0,
        eosin_strength=0.55, cellularity=0.7, blur_um=0.35, jpeg_quality=75, looseness=0.6,
        neuropil=0.3, areolar=0.2,
    ),
    # Very dark purple, small crowded nuclei, blurred.
    "juniper": Style(
        hematoxylin=(0.55, 0.75, 0.37), eosin=(0.30, 0.87, 0.39), hematoxylin_strength=2.2,
        eosin_strength=0.9, glass=(0.90, 0.88, 0.92), blur_um=0.5, jpeg_quality=70,
        cellularity=1.35, apart=0.65, diameter_um=7.2, vesicular=0.1, basophilia=0.35,
    ),
}  # fmt: skip
"""Hospitals that never train, each with a further shift."""


def patient_style(rng: np.random.Generator, site: Style) -> Style:
    """One patient of a site: own cellularity, nuclei and a little of the day's staining."""
    weights = rng.dirichlet(8 * np.asarray(site.architecture) + 0.3)
    return dataclasses.replace(
        site,
        hematoxylin=_tilt(rng, site.hematoxylin, 0.02),
        eosin=_tilt(rng, site.eosin, 0.02),
        hematoxylin_strength=site.hematoxylin_strength * _spread(rng, 0.08),
        eosin_strength=site.eosin_strength * _spread(rng, 0.10),
        cellularity=site.cellularity * _spread(rng, 0.15),
        diameter_um=float(np.clip(site.diameter_um * _spread(rng, 0.10), 6.0, 12.0)),
        pleomorphism=site.pleomorphism * _spread(rng, 0.25),
        vesicular=float(np.clip(site.vesicular + 0.15 * rng.standard_normal(), 0, 1)),
        chromatin=site.chromatin * _spread(rng, 0.25),
        basophilia=site.basophilia * _spread(rng, 0.3),
        architecture=tuple(weights.tolist()),
    )


def wide_style(rng: np.random.Generator) -> Style:
    """A style drawn from far wider ranges than any site has: one for each tile of pretraining."""
    membrane = (0.0, rng.uniform(0, 0.5), -rng.uniform(0.1, 0.9))[rng.integers(3)]
    return Style(
        hematoxylin=_tilt(rng, (0.60, 0.71, 0.37), 0.11),
        eosin=_tilt(rng, (0.18, 0.87, 0.42), 0.13),
        hematoxylin_strength=rng.uniform(0.8, 2.8),
        eosin_strength=rng.uniform(0.35, 1.7),
        glass=tuple((rng.uniform(0.88, 0.99) + rng.uniform(-0.03, 0.02, 3)).tolist()),
        blur_um=rng.uniform(0.12, 0.55),
        noise=rng.uniform(0.5, 5.0),
        jpeg_quality=int(rng.integers(40, 96)) if rng.random() < 0.7 else 0,
        cellularity=rng.uniform(0.5, 1.5),
        diameter_um=rng.uniform(6.0, 12.0),
        pleomorphism=rng.uniform(0.08, 0.35),
        vesicular=rng.uniform(0, 1),
        chromatin=rng.uniform(0.08, 0.4),
        basophilia=rng.uniform(0.0, 0.5),
        membrane=membrane,
        clearing=rng.uniform(0.2, 0.9) if rng.random() < 0.3 else 0.0,
        halo=rng.uniform(0, 0.9),
        apart=rng.uniform(0.55, 0.9),
        grit=rng.uniform(0.5, 2.0),
        neuropil=0.25,
        areolar=0.25,
        waviness_um=rng.uniform(0.5, 4.0),
        looseness=rng.uniform(0, 0.9),
        architecture=tuple(rng.dirichlet([1.5, 1.0, 1.0, 1.0]).tolist()),
        inflammation=0.4,
        necrosis=0.2,
        bleeding=0.2,
        fat=0.1,
        edge=0.15,
    )


def _spread(rng: np.random.Generator, relative: float) -> float:
    return float(np.exp(relative * rng.standard_normal()))


def _tilt(
    rng: np.random.Generator, vector: tuple[float, float, float], amount: float
) -> tuple[float, float, float]:
    tilted = np.maximum(np.asarray(vector) + amount * rng.standard_normal(3), 0.02)
    return tuple((tilted / np.linalg.norm(tilted)).tolist())
