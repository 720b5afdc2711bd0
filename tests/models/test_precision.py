"""A network that multiplies in bfloat16; all that privacy and the optimiser see is float32."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from fedjax_dp.assembly.programs import make_model
from fedjax_dp.config import Config
from fedjax_dp.evaluation import Evaluator
from fedjax_dp.federated.client import client_update
from fedjax_dp.federated.cohort import client_mesh
from fedjax_dp.models.layers import compute_dtype_on, convolution
from fedjax_dp.models.unet import unet
from fedjax_dp.privacy.clipping import clipped_grad, global_norm, normalised_grad
from fedjax_dp.privacy.noise import add_noise
from fedjax_dp.segmentation.losses import soft_dice_cross_entropy
from fedjax_dp.segmentation.objective import segmentation_loss
from tests import oracles
from tests.oracles import assert_trees_close, distance, exact_products, norm  # noqa: F401

VARIANTS = ("xla", "matmul", "canonical")
TINY = {"base_channels": 8, "depth": 1}
UNITS, SIDE = 4, 16
UNIT_ROUNDOFF = 2.0**-9
"""Of bfloat16: eight significant bits, so a rounding moves a number by at most 2**-9 of it."""
BF16, FP32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
PRODUCTS = ("conv_general_dilated", "dot_general")


@functools.cache
def network(dtype="bfloat16", variant="matmul", standardize=False):
    init, apply = unet(
        2, **TINY, standardize=standardize, conv_variant=variant, compute_dtype=dtype
    )
    return init, apply


def random_params(init):
    rng = np.random.default_rng(7)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), shapes
    )


def unit_loss(apply):
    # Not augmented, which is float32 anyway and would be most of the compilation.
    loss = segmentation_loss(apply, flips=False, rotate=False, hed_jitter=0.0)

    def one(params, unit, key):
        images, labels = unit
        return loss(params, images, labels, len(images), jax.random.split(key, len(images)))

    return one


def units():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (UNITS, 1, SIDE, SIDE, 3)).astype(np.uint8)
    labels = rng.integers(0, 2, (UNITS, 1, SIDE, SIDE)).astype(np.uint8)
    return (images, labels), jax.random.split(jax.random.key(1), UNITS)


def equations(jaxpr):
    """All of a program, with those of the programs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            tuple(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from equations(getattr(inner, "jaxpr", inner))


def dtypes_in(equation):
    return tuple(variable.aval.dtype for variable in equation.invars)


def gradient_program(dtype, variant, standardize=False):
    init, apply = network(dtype, variant, standardize)
    data, keys = units()
    grad = jax.value_and_grad(unit_loss(apply))
    args = jax.eval_shape(init, keys[0]), oracles.take(data, 0), keys[0]
    return list(equations(jax.make_jaxpr(grad)(*args).jaxpr))


# --- what runs in which dtype


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_product_but_the_heads_is_of_bfloat16_and_every_sum_is_float32(variant, standardize):
    program = gradient_program("bfloat16", variant, standardize)
    products = [equation for equation in program if equation.primitive.name in PRODUCTS]
    counted = Counter(dtypes_in(equation) for equation in products)
    # Forth, and back to the images and the kernel: 7 layers, of which the first has no image to go
    # back to.
    convolutions = 6 * 3 + 3
    assert counted.pop((FP32, FP32)) == 3  # the head
    assert set(counted) == {(BF16, BF16)}
    assert convolutions - 1 <= counted[BF16, BF16] <= convolutions
    sums = [equation for equation in program if equation.primitive.name == "reduce_sum"]
    assert len(sums) > 20
    assert BF16 not in {dtype for equation in sums for dtype in dtypes_in(equation)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_of_bfloat16_unless_asked_for(variant):
    program = gradient_program("float32", variant)
    assert BF16 not in {
        variable.aval.dtype for equation in program for variable in equation.outvars
    }
    assert any(equation.primitive.name in PRODUCTS for equation in program)


@pytest.mark.parametrize("variant", ["matmul", "canonical"])
def test_our_weight_gradients_are_accumulated_in_float32(variant):
    conv = convolution(variant)
    images, kernel = jnp.ones((2, 6, 6, 3), BF16), jnp.ones((3, 3, 3, 4), BF16)
    program = jax.make_jaxpr(jax.grad(lambda k: conv(images, k, (1, 1), "SAME").sum()))(kernel)
    products = [e for e in equations(program.jaxpr) if e.primitive.name in PRODUCTS]
    found = [equation.outvars[0].aval.dtype for equation in products]
    assert found.count(FP32) == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_convolution_in_bfloat16_rounds_once(variant):
    rng = np.random.default_rng(0)
    images, kernel, cotangent = (
        jnp.asarray(rng.normal(size=shape), BF16)
        for shape in ((2, 16, 16, 4), (3, 3, 4, 8), (2, 16, 16, 8))
    )

    def both(conv, *arguments):
        def fn(images, kernel):
            return conv(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

        value, pull = jax.jit(functools.partial(jax.vjp, fn))(*arguments[:2])
        return value, *pull(arguments[2])

    found = both(convolution(variant), images, kernel, cotangent)
    exact = both(lax.conv_general_dilated, *oracles.as_float32((images, kernel, cotangent)))
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == BF16
        assert_trees_close(one, other, rtol=1.01 * UNIT_ROUNDOFF)


# --- float32 wherever privacy and the optimiser look


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_loss_gradient_and_norm_are_float32(variant):
    init, apply = network(variant=variant)
    data, keys = units()
    params = jax.eval_shape(init, keys[0])
    logits = jax.eval_shape(apply, params, jnp.zeros((1, SIDE, SIDE, 3)), keys[0])
    arguments = params, oracles.take(data, 0), keys[0]
    loss, gradient = jax.eval_shape(jax.value_and_grad(unit_loss(apply)), *arguments)
    summed, aux = jax.eval_shape(clipped_grad(unit_loss(apply)), params, data, keys, UNITS, 1.0)
    others = logits, loss, jax.eval_shape(global_norm, gradient), aux
    assert {leaf.dtype for leaf in jax.tree.leaves((params, gradient, summed, others))} == {FP32}
    assert jax.tree.structure(summed) == jax.tree.structure(params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_client_sends_is_float32(dtype):
    init, apply = network(dtype)
    plan = oracles.make_plan([[0, 1], [2]], [[3]])
    update = client_update(segmentation_loss(apply), optax.adam(1e-3), placement="dp_sgd")
    delta, _, _ = jax.eval_shape(
        update,
        jax.eval_shape(init, jax.random.key(0)),
        oracles.make_keys(),
        (),
        oracles.make_constants(),
        plan,
        oracles.make_pool(size=SIDE),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(delta)} == {FP32}


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_noise_is_float32_whatever_it_is_added_to(dtype):
    tree = {"a": jnp.zeros((40, 50), dtype), "b": jnp.zeros(1000, dtype)}
    noised = add_noise(jax.random.key(0), tree, 1.0)
    assert {leaf.dtype for leaf in jax.tree.leaves(noised)} == {FP32}
    values = oracles.flat(noised)
    on_grid = np.mean(values == np.asarray(jnp.asarray(values, BF16), np.float64))
    # A bfloat16 drops 16 bits of a float32: one in 65,536 has none to drop.
    assert on_grid < 0.01
    # The noise is the same: it is not rounded to the tree's dtype on its way.
    expected = add_noise(jax.random.key(0), oracles.as_float32(tree), 1.0)
    oracles.assert_trees_equal(noised, expected)


@pytest.mark.parametrize("variant", ["xla", "matmul"])
def test_a_clipped_gradient_has_norm_one_in_float32(variant):
    """Were the norm taken of another rounding than the one that is scaled, it would be off."""
    init, apply = network(variant=variant)
    data, keys = units()
    unit = normalised_grad(unit_loss(apply))
    params, clip = random_params(init), 1e-6  # all are clipped
    if variant == "xla":  # in blocks, as on accelerators
        mapped = jax.jit(jax.vmap(unit, (None, 0, 0, None)))(params, data, keys, clip)
        gradients = [oracles.take(mapped[3], index) for index in range(UNITS)]
    else:  # one by one, as on CPU
        alone = jax.jit(unit)
        each = [(oracles.take(data, index), keys[index]) for index in range(UNITS)]
        gradients = [alone(params, *one, clip)[3] for one in each]
    for gradient in gradients:
        assert abs(norm(gradient) - 1.0) < 16 * np.finfo(np.float32).eps
    # A rounding to bfloat16 in between is seen.
    rounded = jax.tree.map(lambda leaf: leaf.astype(BF16), gradients[0])
    assert distance(rounded, gradients[0]) > 1e-4


@pytest.mark.parametrize(("size", "variant"), [(1, "matmul"), (2, "xla")])
def test_a_unit_of_a_bfloat16_model_weighs_at_most_the_clip(size, variant):
    init, apply = network(variant=variant)
    (images, labels), keys = units()
    params = random_params(init)
    fn = jax.jit(clipped_grad(unit_loss(apply), microbatch_size=size))
    others = images.copy()
    others[-1] = 255 - others[-1]
    for clip in (1e-6, 1e3):
        with_it, aux = fn(params, (images, labels), keys, UNITS, clip)
        without, _ = fn(params, (images, labels), keys, UNITS - 1, clip)
        replaced, _ = fn(params, (others, labels), keys, UNITS, clip)
        # Sums of up to UNITS, each rounded to float32.
        slack = 16 * UNITS * np.finfo(np.float32).eps
        assert distance(with_it, without) <= 1.0 + slack
        assert distance(with_it, replaced) <= 2.0 + slack
        if clip == 1e-6:
            assert aux.value.clipped == UNITS
            assert distance(with_it, without) > 1.0 - slack


# --- near float32, and good enough to train


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_are_near_those_of_float32(variant):
    data, keys = units()
    params = random_params(network()[0])
    unit = oracles.take(data, 0)
    logits, gradients = [], []
    for dtype in ("float32", "bfloat16"):
        _, apply = network(dtype, variant)

        @jax.jit
        def both(params, unit, key, apply=apply):
            gradient = jax.grad(unit_loss(apply))(params, unit, key)
            return apply(params, unit[0] / np.float32(255), key), gradient

        for found, one in zip((logits, gradients), both(params, unit, keys[0]), strict=True):
            found.append(one)
    # Seven layers round images, kernel and result: if all roundings added up.
    tolerance = 7 * 3 * UNIT_ROUNDOFF
    assert_trees_close(*logits, rtol=tolerance)
    # An error of that size turns about such a share of the ReLUs on or off, and each takes its
    # whole term of the gradient along: of the square of the norm, that share.
    assert_trees_close(*gradients, rtol=np.sqrt(tolerance))
    assert distance(*logits) > 1e-4 * norm(logits[0])  # it did round


def test_a_bfloat16_model_learns_a_tile_as_well_as_a_float32_model():
    rng = np.random.default_rng(3)
    labels = np.kron(rng.integers(0, 2, (4, 4)), np.ones((4, 4))).astype(np.uint8)
    images = (0.6 * labels[..., None] + 0.2 + 0.1 * rng.normal(size=(SIDE, SIDE, 3)))[None]
    optimizer, losses = optax.adam(1e-2), {}
    for dtype in ("float32", "bfloat16"):
        init, apply = network(dtype)

        def loss_fn(params, apply=apply):
            logits = apply(params, images.astype(np.float32), jax.random.key(0))[0]
            return soft_dice_cross_entropy(logits, labels)

        @jax.jit
        def train(params, loss_fn=loss_fn):
            def step(carry, _):
                params, state = carry
                loss, gradient = jax.value_and_grad(loss_fn)(params)
                updates, state = optimizer.update(gradient, state, params)
                return (optax.apply_updates(params, updates), state), loss

            return lax.scan(step, (params, optimizer.init(params)), None, 40)

        (params, _), losses[dtype] = train(init(jax.random.key(0)))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {FP32}
    for trace in losses.values():
        assert trace[-1] < 0.1 * trace[0]


# --- the configuration


def tiny_config(dtype):
    config = Config()
    config.model.base_channels, config.model.depth = 8, 1
    config.model.compute_dtype = dtype
    return config


def test_training_and_evaluation_take_the_dtype_from_the_configuration(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # where nothing is warned of
    model, plain = (make_model(tiny_config(dtype), 2) for dtype in ("bfloat16", "float32"))
    monkeypatch.undo()
    assert model.dimension == plain.dimension
    params = random_params(model.init)
    images = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3)).astype(np.uint8)
    evaluator = Evaluator(model.apply, params, tile_size=SIDE, batch_size=4, mesh=client_mesh(1))
    logits = jax.jit(model.apply)(params, images.astype(np.float32) / 255.0, jax.random.key(0))
    np.testing.assert_array_equal(evaluator.predictions(params, images), logits.argmax(-1))
    other = jax.jit(plain.apply)(params, images.astype(np.float32) / 255.0, jax.random.key(0))
    assert distance(logits, other) > 1e-4 * norm(other)


def test_bfloat16_on_cpu_is_warned_of_and_other_names_are_refused():
    for backend in ("gpu", "tpu"):
        assert compute_dtype_on(backend, "bfloat16") == "bfloat16"
    assert compute_dtype_on("cpu", "float32") == "float32"
    with pytest.warns(UserWarning, match="is for GPU and TPU"):
        assert compute_dtype_on("cpu", "bfloat16") == "bfloat16"
    with pytest.raises(ValueError, match="'float16'"):
        compute_dtype_on("gpu", "float16")
    with pytest.raises(ValueError, match="compute_dtype='float16'"):
        unet(2, **TINY, compute_dtype="float16")
