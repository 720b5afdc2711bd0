"""ReLU and max pooling whose second derivative sees their kinks.

An attacker who matches gradients differentiates a gradient. The gradient of a ReLU network jumps
wherever an activation changes sign or another pixel becomes the maximum of its window, and between
the jumps automatic differentiation says that nothing depends on them: descent follows a slope that
is not there. Here the value and the first derivative are exact, and only the derivative of the
first derivative is replaced, by that of a smooth step of a given width: the surrogate derivative
that spiking networks are trained with (Neftci et al. 2019). For attacks alone; where nothing is
differentiated twice, these are the layers of `layers.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def relu(width: float, x: Array) -> Array:
    """max(x, 0); zero has the derivative zero.

    Args:
        width: of the smooth step, in units of x, above 0.
        x: any shape.
    """
    return jnp.maximum(x, 0)


def _relu_fwd(width: float, x: Array) -> Any:
    return relu(width, x), x


def _relu_bwd(width: float, x: Array, cotangent: Array) -> Any:
    return (_gate(width, x, cotangent),)


relu.defvjp(_relu_fwd, _relu_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gate(width: float, x: Array, passed: Array) -> Array:
    return jnp.where(x > 0, passed, 0)


def _gate_fwd(width: float, x: Array, passed: Array) -> Any:
    return _gate(width, x, passed), (x, passed)


def _gate_bwd(width: float, residuals: Any, cotangent: Array) -> Any:
    x, passed = residuals
    step = jax.nn.sigmoid(x / width)
    return cotangent * passed * step * (1 - step) / width, _gate(width, x, cotangent)


_gate.defvjp(_gate_fwd, _gate_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def max_pool_2x2(width: float, x: Float[Array, "N H W C"]) -> Float[Array, "N H/2 W/2 C"]:
    """Maximum over 2x2 windows, stride 2. Pixels that share a maximum share its gradient.

    Args:
        width: of the smooth choice between the pixels of a window, in units of x, above 0.
        x: images of even height and width.
    """
    return _windows(x).max((2, 4))


def _max_pool_fwd(width: float, x: Array) -> Any:
    return max_pool_2x2(width, x), x


def _max_pool_bwd(width: float, x: Array, cotangent: Array) -> Any:
    return (_route(width, x, cotangent),)


max_pool_2x2.defvjp(_max_pool_fwd, _max_pool_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _route(width: float, x: Array, pooled: Array) -> Array:
    """Each window's value of `pooled`, at the window's maximum."""
    return (_shares(x) * pooled[:, :, None, :, None]).reshape(x.shape)


def _route_fwd(width: float, x: Array, pooled: Array) -> Any:
    return _route(width, x, pooled), (x, pooled)


def _route_bwd(width: float, residuals: Any, cotangent: Array) -> Any:
    x, pooled = residuals

    def smooth(x: Array) -> Array:
        windows = _windows(x) / width
        shares = jnp.exp(windows - jax.nn.logsumexp(windows, (2, 4), keepdims=True))
        return (shares * pooled[:, :, None, :, None]).reshape(x.shape)

    _, vjp = jax.vjp(smooth, x)
    return *vjp(cotangent), (_shares(x) * _windows(cotangent)).sum((2, 4))


_route.defvjp(_route_fwd, _route_bwd)


def _windows(x: Array) -> Array:
    n, height, width, channels = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, channels)


def _shares(x: Array) -> Array:
    """One over the number of maxima of its window where a pixel is one, else zero."""
    windows = _windows(x)
    is_maximum = windows == windows.max((2, 4), keepdims=True)
    return is_maximum / is_maximum.sum((2, 4), keepdims=True)
