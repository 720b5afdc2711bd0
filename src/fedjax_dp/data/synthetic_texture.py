"""Textures of drawn tissue: smooth random fields, and banks of noise that are cut, not computed."""

import functools
from typing import NamedTuple

import numpy as np
from scipy import ndimage

_BANK_SIZE = 512
_BANK_SEED = 20240229
_GRAIN_SIGMAS_PX = (0.5, 0.8, 1.2, 1.8, 2.7, 4.0, 6.0)
_FIBRE_PIXEL_UM = 0.25


class Grid(NamedTuple):
    """Pixel centres of a square tile in microns from its middle."""

    size: int
    mpp: float

    @property
    def axis(self) -> np.ndarray:
        """float32 [size]: coordinate of each row or column, in microns."""
        return ((np.arange(self.size) - (self.size - 1) / 2) * self.mpp).astype(np.float32)

    @property
    def half_width(self) -> float:
        """Half the side of the tile, in microns."""
        return self.size * self.mpp / 2


def _unit(field: np.ndarray) -> np.ndarray:
    field = field - field.mean()
    return (field / field.std()).astype(np.float32)


@functools.cache
def _grain_bank() -> np.ndarray:
    """float32 [levels, 512, 512]: isotropic noise of unit variance, one level per grain size."""
    rng = np.random.default_rng(_BANK_SEED)
    white = rng.standard_normal((len(_GRAIN_SIGMAS_PX), _BANK_SIZE, _BANK_SIZE), np.float32)
    return np.stack(
        [
            _unit(ndimage.gaussian_filter(noise, sigma, mode="wrap"))
            for noise, sigma in zip(white, _GRAIN_SIGMAS_PX, strict=True)
        ]
    )


@functools.cache
def _fibre_bank() -> np.ndarray:
    """float32 [512, 512]: streaks along the columns' axis, at 0.25 microns a pixel."""
    rng = np.random.default_rng(_BANK_SEED + 1)
    white = rng.standard_normal((2, _BANK_SIZE, _BANK_SIZE), np.float32)
    thin = _unit(ndimage.gaussian_filter(white[0], (1.3, 18.0), mode="wrap"))
    thick = _unit(ndimage.gaussian_filter(white[1], (4.0, 40.0), mode="wrap"))
    return _unit(thin + 0.8 * thick)


def _level(grain_um: float, mpp: float) -> np.ndarray:
    sigmas = np.asarray(_GRAIN_SIGMAS_PX)
    return _grain_bank()[int(np.argmin(np.abs(np.log(sigmas * mpp / grain_um))))]


def grain(rng: np.random.Generator, grid: Grid, grain_um: float) -> np.ndarray:
    """Isotropic noise float32 [size, size] of unit variance, its grains about `grain_um` wide."""
    return grains(rng, 1, grid.size, grain_um, grid.mpp)[0]


def grains(
    rng: np.random.Generator, count: int, size: int, grain_um: float, mpp: float
) -> np.ndarray:
    """`count` independent cuts float32 [count, size, size] of isotropic noise of unit variance."""
    level = _level(grain_um, mpp)
    if size > _BANK_SIZE:
        level = np.tile(level, (-(-size // _BANK_SIZE),) * 2)
    windows = np.lib.stride_tricks.sliding_window_view(level, (size, size))
    rows, columns = rng.integers(0, windows.shape[0], (2, count))
    return windows[rows, columns]


def waves(rng: np.random.Generator, grid: Grid, wavelength_um: float, terms: int = 8) -> np.ndarray:
    """Smooth random field float32 [size, size] of unit variance: a sum of `terms` plane waves."""
    frequency = 2 * np.pi / (wavelength_um * rng.uniform(0.6, 1.7, terms))
    direction, phase = rng.uniform(0, 2 * np.pi, (2, terms))
    axis = grid.axis
    along_x = np.outer(axis, frequency * np.cos(direction)) + phase
    along_y = np.outer(axis, frequency * np.sin(direction))
    # cos(a + b) = cos a cos b - sin a sin b: two matrix products instead of `terms` full images.
    field = np.cos(along_y) @ np.cos(along_x).T - np.sin(along_y) @ np.sin(along_x).T
    return (field * np.sqrt(2 / terms)).astype(np.float32)


def fibres(rng: np.random.Generator, grid: Grid, angle: float, waviness_um: float) -> np.ndarray:
    """Wavy streaks float32 [size, size] of unit variance that run along `angle` (radians)."""
    axis = grid.axis
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    shift = np.float32(waviness_um) * waves(rng, grid, 24.0, terms=5)
    along = axis[None, :] * cosine + axis[:, None] * sine
    across = axis[:, None] * cosine - axis[None, :] * sine + shift
    offset_along, offset_across = rng.integers(0, _BANK_SIZE, 2)
    rows = np.floor(across / _FIBRE_PIXEL_UM).astype(np.int32) + offset_across
    columns = np.floor(along / _FIBRE_PIXEL_UM).astype(np.int32) + offset_along
    return _fibre_bank()[rows % _BANK_SIZE, columns % _BANK_SIZE]
