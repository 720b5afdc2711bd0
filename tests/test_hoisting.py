import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedjax_dp.hoisting import hoisted
from fedjax_dp.models.unet import unet
from fedjax_dp.privacy.clipping import clipped_grad


def primitives(jaxpr, inside=""):
    """Names of primitives, those in the body of a loop after "while/"."""
    for equation in jaxpr.eqns:
        yield inside + equation.primitive.name
        for value in equation.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    loop = "while/" if equation.primitive.name in ("while", "scan") else inside
                    yield from primitives(inner, loop)


def looped(fn, count=3):
    """Sums `fn(index)` over a loop, hoisted."""
    body, shapes = hoisted(fn, jax.ShapeDtypeStruct((), jnp.int32))
    zero = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return lax.fori_loop(0, count, lambda i, acc: jax.tree.map(jnp.add, acc, body(i)), zero)


def test_what_depends_on_no_argument_is_computed_before_the_loop():
    kernel = jnp.arange(12.0).reshape(3, 4)

    def total(kernel):
        return looped(lambda i: {"a": jnp.sin(kernel).T * i, "b": (i, jnp.cos(i * 1.0))})

    names = list(primitives(jax.make_jaxpr(total)(kernel).jaxpr))
    assert {"sin", "transpose", "while/mul", "while/cos"} <= set(names)
    assert not {"while/sin", "while/transpose", "cos"} & set(names)
    found = jax.jit(total)(kernel)
    np.testing.assert_allclose(found["a"], 3 * np.sin(kernel).T, rtol=1e-6)
    assert found["b"][0] == 3


def test_what_grows_stays_in_the_loop():
    small, images = jnp.arange(4.0), jnp.ones((8, 8), jnp.uint8)

    def total(small, images):
        widened = lambda: images.astype(jnp.float32)  # noqa: E731
        return looped(lambda i: jnp.outer(small, small) * i + widened().sum() + jnp.arange(4.0))

    names = set(primitives(jax.make_jaxpr(total)(small, images).jaxpr))
    assert "convert_element_type" not in names
    assert "iota" not in names
    assert {"while/convert_element_type", "while/iota"} <= names


def test_a_result_that_never_changes_or_is_a_literal():
    found = jax.jit(lambda x: looped(lambda i: (x * 2.0, 1.0, i)))(jnp.float32(3.0))
    assert [float(value) for value in found] == [18.0, 3.0, 3.0]


def test_the_same_under_vmap_and_grad():
    def total(x):
        body, _ = hoisted(lambda i: jnp.sin(x) * i, jax.ShapeDtypeStruct((), jnp.float32))
        return lax.scan(lambda acc, i: (acc + body(i), None), 0.0, jnp.arange(3.0))[0]

    x = jnp.linspace(0.0, 1.0, 5)
    np.testing.assert_allclose(jax.vmap(total)(x), 3 * np.sin(x), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(total))(x), 3 * np.cos(x), rtol=1e-6)


@pytest.mark.parametrize(("standardize", "turned"), [(False, "rev"), (True, "rsqrt")])
def test_kernels_are_turned_and_standardised_once_for_all_units(standardize, turned):
    """Of a U-Net's unit loop: once a convolution, and none a unit but of what units bring."""
    init, apply = unet(2, base_channels=8, depth=1, conv_variant="matmul", standardize=standardize)
    params = init(jax.random.key(0))

    def loss(params, image, key):
        return jnp.square(apply(params, image[None], key)).mean()

    fn = clipped_grad(loss)
    arguments = params, jnp.ones((3, 8, 8, 3)), jax.random.split(jax.random.key(0), 3), 2, 1.0
    names = list(primitives(jax.make_jaxpr(fn)(*arguments).jaxpr))
    convolutions = 6  # of which the first gives no gradient to images
    assert names.count(turned) >= convolutions - 1
    assert names.count("while/rev") == 0
