import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_dp.segmentation.losses import soft_dice_cross_entropy


def make_tile(seed, num_classes=3, size=8):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2.0, size=(size, size, num_classes)).astype(np.float32)
    labels = rng.integers(0, num_classes, (size, size)).astype(np.uint8)
    labels[rng.random((size, size)) < 0.2] = 255
    return jnp.asarray(logits), jnp.asarray(labels)


def naive_loss(logits, labels, dice_weight, smoothing):
    """The docstring's formula in float64, a pixel at a time."""
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    num_classes = logits.shape[-1]
    predicted, truth, overlap = (np.zeros(num_classes) for _ in range(3))
    cross_entropy, num_valid = 0.0, 0
    for scores, label in zip(logits.reshape(-1, num_classes), labels.ravel(), strict=True):
        if label == 255:
            continue
        probs = np.exp(scores) / np.exp(scores).sum()
        num_valid += 1
        cross_entropy -= np.log(probs[label])
        predicted += probs
        truth[label] += 1
        overlap[label] += probs[label]
    dice = (2 * overlap / num_valid + smoothing) / ((predicted + truth) / num_valid + smoothing)
    return cross_entropy / num_valid + dice_weight * (1 - dice[1:].mean())


@pytest.mark.parametrize("num_classes", [2, 5])
def test_loss_equals_the_naive_formula(num_classes):
    logits, labels = make_tile(0, num_classes)
    loss = soft_dice_cross_entropy(logits, labels, dice_weight=0.7, smoothing=0.03)
    np.testing.assert_allclose(loss, naive_loss(logits, labels, 0.7, 0.03), rtol=1e-5)


def test_a_sure_and_right_prediction_costs_nothing():
    _, labels = make_tile(1)
    logits = 40.0 * jax.nn.one_hot(labels, 3)
    assert soft_dice_cross_entropy(logits, labels) < 1e-5
    assert soft_dice_cross_entropy(-logits, labels) > 10


@pytest.mark.parametrize("value", [0.0, 1e30, np.inf, np.nan])
def test_an_ignored_pixel_has_no_say(value):
    logits, labels = make_tile(2)
    is_ignored = (labels == 255)[..., None]
    other = jnp.where(is_ignored, jnp.float32(value), logits)
    loss, grad = jax.value_and_grad(soft_dice_cross_entropy)(logits, labels)
    other_loss, other_grad = jax.value_and_grad(soft_dice_cross_entropy)(other, labels)
    assert loss == other_loss
    np.testing.assert_array_equal(grad, other_grad)
    assert not np.asarray(grad)[np.asarray(labels) == 255].any()
    assert np.asarray(grad)[np.asarray(labels) != 255].all()  # the others have one


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_a_tile_of_ignored_pixels_is_exactly_zero(value):
    logits = jnp.full((8, 8, 3), value, jnp.float32)
    labels = jnp.full((8, 8), 255, jnp.uint8)
    loss, grad = jax.value_and_grad(soft_dice_cross_entropy)(logits, labels)
    assert loss == 0
    assert not np.asarray(grad).any()


def test_a_tile_without_foreground_pulls_the_foreground_down_smoothly():
    labels = jnp.zeros((16, 16), jnp.uint8)
    losses = []
    for bias in (2.0, 0.0, -2.0, -8.0):
        logits = jnp.zeros((16, 16, 2)).at[..., 1].set(bias)
        loss, grad = jax.value_and_grad(soft_dice_cross_entropy)(logits, labels)
        assert np.isfinite(np.asarray(grad)).all()
        assert (np.asarray(grad)[..., 1] > 0).all()
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.05


def test_loss_means_the_same_at_every_tile_size():
    logits, labels = make_tile(3)
    tiled = jnp.tile(logits, (3, 3, 1)), jnp.tile(labels, (3, 3))
    np.testing.assert_allclose(
        soft_dice_cross_entropy(logits, labels), soft_dice_cross_entropy(*tiled), rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_loss_is_computed_in_float32(dtype):
    logits, labels = make_tile(4)
    logits = logits.astype(dtype)
    loss = soft_dice_cross_entropy(logits, labels)
    assert loss.dtype == jnp.float32
    assert loss == soft_dice_cross_entropy(logits.astype(jnp.float32), labels)


def test_a_tile_sees_only_itself_under_vmap():
    tiles = [make_tile(seed) for seed in range(3)]
    logits, labels = (jnp.stack(x) for x in zip(*tiles, strict=True))
    grad_fn = jax.jit(jax.vmap(jax.grad(soft_dice_cross_entropy)))
    before = grad_fn(logits, labels)
    after = grad_fn(logits.at[2].multiply(7.0), labels.at[2].set(1))
    np.testing.assert_array_equal(before[:2], after[:2])
    assert np.abs(np.asarray(before[2] - after[2])).max() > 1e-4

    def pooled(logits):  # a Dice over the batch: what the rule forbids, so the test can fail
        flat = logits.reshape(-1, 8, 3), labels.reshape(-1, 8)
        return soft_dice_cross_entropy(*flat)

    change = jax.grad(pooled)(logits) - jax.grad(pooled)(logits.at[2].multiply(7.0))
    assert np.abs(np.asarray(change[:2])).max() > 0


@pytest.mark.parametrize(
    ("num_classes", "options", "message"),
    [
        (1, {}, "2 to 255 classes"),
        (2, {"smoothing": 0.0}, "smoothing > 0"),
        (2, {"dice_weight": -1.0}, "dice_weight >= 0"),
    ],
)
def test_errors_say_what_to_change(num_classes, options, message):
    with pytest.raises(ValueError, match=message):
        soft_dice_cross_entropy(
            jnp.zeros((4, 4, num_classes)), jnp.zeros((4, 4), jnp.uint8), **options
        )
