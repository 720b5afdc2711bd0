"""What an attack moves: variables from which a tile is painted.

The optimiser's steps are as large in every variable, so the variables decide what is found first.
Pixels (Zhu et al. 2019; Geiping et al. 2020) let it add noise to every pixel alike. The tissue
canvas moves amounts of stain instead of colours and spatial frequencies instead of pixels, each
frequency by as much as natural images hold of it (Field 1987): what a pathologist knows of any H&E
image, and nothing of the victim's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fedjax_dp.segmentation.augment import HED_FROM_RGB, RGB_FROM_HED
from fedjax_dp.typing import PRNGKey


class Canvas(NamedTuple):
    """How variables become a tile.

    Attributes:
        init: `init(key) -> variables [H, W, 3]`, a random start.
        paint: `paint(variables) -> tile [H, W, 3]` in [0, 1].
        project: `project(variables) -> variables`, after every step of the optimiser.
    """

    init: Callable[[PRNGKey], Any]
    paint: Callable[[Any], Any]
    project: Callable[[Any], Any]


def pixels(size: int, mean_colour: np.ndarray, *, spread: float = 0.05) -> Canvas:
    """Pixels themselves, kept within [0, 1].

    Args:
        size: side of the tile, pixels.
        mean_colour: RGB in [0, 1] around which the start is drawn.
        spread: standard deviation of the start.
    """
    mean = jnp.asarray(mean_colour, jnp.float32)

    def init(key: PRNGKey) -> Float[Array, "H W 3"]:
        noise = spread * jax.random.normal(key, (size, size, 3))
        return jnp.clip(mean + noise, 0.0, 1.0)

    return Canvas(init, lambda x: x, lambda x: jnp.clip(x, 0.0, 1.0))


def tissue(
    size: int, mean_colour: np.ndarray, *, spread: float = 0.02, residual: float = 0.3
) -> Canvas:
    """Amounts of haematoxylin, eosin and a third stain, by spatial frequency.

    Args:
        size: side of the tile, pixels.
        mean_colour: RGB in (0, 1) of the flat tile that variables of zero paint.
        spread: standard deviation of the start's variables, that is, of optical density at the
            frequency 1 / size.
        residual: how fast the third stain moves beside the two.

    References:
        Ruifrok and Johnston 2001 for the stains; Field 1987, "Relations between the statistics of
        natural images and the response properties of cortical cells", for the spectrum.
    """
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    # One at the lowest frequency, then falling as its inverse; the mean moves like the lowest.
    gain = jnp.asarray(1 / np.maximum(frequency * size, 1.0), jnp.float32)[..., None]
    speed = jnp.asarray([1.0, 1.0, residual], jnp.float32)
    density = -np.log(np.clip(mean_colour, 1 / 255, 254 / 255))
    start = jnp.asarray(density @ HED_FROM_RGB, jnp.float32)

    def init(key: PRNGKey) -> Float[Array, "H W 3"]:
        return spread * jax.random.normal(key, (size, size, 3))

    def paint(variables: Array) -> Float[Array, "H W 3"]:
        spectrum = jnp.fft.rfft2(variables, axes=(0, 1)) * gain
        amounts = start + speed * jnp.fft.irfft2(spectrum, s=(size, size), axes=(0, 1))
        # Light is only absorbed; rounded off, or a white pixel would never darken again.
        return jnp.exp(-jax.nn.softplus(20.0 * amounts @ jnp.asarray(RGB_FROM_HED)) / 20.0)

    return Canvas(init, paint, lambda variables: variables)
