import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_dp.data.tiles import TileTable
from fedjax_dp.segmentation import metrics

NAN = np.nan


def make_table(site, slide, patient, sites=("a", "b", "c")):
    n = len(site)
    return TileTable(
        images=np.zeros((n, 2, 2, 3), np.uint8),
        labels=np.zeros((n, 2, 2), np.uint8),
        site=np.asarray(site, np.int32),
        slide=np.asarray(slide, np.int32),
        patient=np.asarray(patient, np.int32),
        sites=sites,
        slides=tuple(f"slide-{i}" for i in range(max([0, *slide]) + 1)),
        patients=tuple(f"patient-{i}" for i in range(max([0, *patient]) + 1)),
    )


def binary(hit, missed, extra, background):
    return np.array([[background, extra], [missed, hit]])


@pytest.mark.parametrize("num_classes", [2, 5])
def test_counts_on_device_equal_counts_by_hand(num_classes):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 16, 16, num_classes)).astype(np.float32)
    labels = rng.integers(0, num_classes, (3, 16, 16)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.3] = 255
    got = jax.jit(jax.vmap(metrics.confusion_matrix))(jnp.asarray(logits), jnp.asarray(labels))
    assert got.dtype == jnp.int32
    for i in range(3):
        expected = np.zeros((num_classes, num_classes), int)
        for truth, scores in zip(
            labels[i].ravel(), logits[i].reshape(-1, num_classes), strict=True
        ):
            if truth != 255:
                expected[truth, scores.argmax()] += 1
        np.testing.assert_array_equal(got[i], expected)
        np.testing.assert_array_equal(
            metrics.count_pixels(logits[i].argmax(-1), labels[i], num_classes), expected
        )


def test_counts_are_exact_where_float32_rounding_would_start_to_show():
    labels = jnp.ones((2048, 2048), jnp.uint8).at[0, 0].set(255)
    logits = jnp.zeros((2048, 2048, 2)).at[..., 1].set(1.0)
    assert metrics.confusion_matrix(logits, labels)[1, 1] == 2048**2 - 1
    with pytest.raises(ValueError, match="2\\^24"):
        jax.eval_shape(
            metrics.confusion_matrix,
            jax.ShapeDtypeStruct((8192, 4096, 2), jnp.float32),
            jax.ShapeDtypeStruct((8192, 4096), jnp.uint8),
        )


@pytest.mark.parametrize(
    ("confusion", "strict", "dhunet"),
    [
        # ordinary: Dice 2·6/(2·6+2+4), Jaccard 6/12, accuracy 14/20
        (binary(6, 2, 4, 8), (12 / 18, 0.5, 0.7), (12 / 18, 0.5, 0.7)),
        # in neither: does not count; theirs: a full score
        (binary(0, 0, 0, 20), (NAN, NAN, NAN), (1, 1, 1)),
        # false positives where the truth has none: 0; theirs: forgiven
        (binary(0, 0, 5, 15), (0, 0, 0.75), (NAN, NAN, NAN)),
        # missed altogether: 0; theirs: accuracy 0 too
        (binary(0, 5, 0, 15), (0, 0, 0.75), (0, 0, 0)),
        # no valid pixel
        (binary(0, 0, 0, 0), (NAN, NAN, NAN), (NAN, NAN, NAN)),
    ],
)
def test_what_an_absent_class_counts(confusion, strict, dhunet):
    for scores, expected in (
        (metrics.strict_scores(confusion), strict),
        (metrics.dhunet_scores(confusion), dhunet),
    ):
        np.testing.assert_allclose([s[1] for s in scores], expected)


def test_headline_is_the_mean_within_sites_then_over_sites():
    # Site a: one image in two tiles, and a second one. Site b: one image. Site c: no tile.
    confusions = np.stack(
        [binary(4, 1, 0, 5), binary(2, 0, 3, 5), binary(0, 2, 0, 8), binary(9, 0, 1, 0)]
    )
    table = make_table(site=[0, 0, 0, 1], slide=[0, 0, 1, 2], patient=[0, 0, 0, 1])
    summary = metrics.summarise(confusions, table, ("background", "nuclei"))
    first, second, third = 12 / 16, 0.0, 18 / 19
    site_a = (first + second) / 2
    assert set(summary["per_site"]) == {"a", "b"}
    assert summary["per_site"]["a"]["dice"] == pytest.approx(site_a)
    assert summary["per_site"]["a"]["per_class"]["nuclei"]["dice"] == pytest.approx(site_a)
    assert summary["per_site"]["a"]["num_images"] == 2
    assert summary["dice"] == pytest.approx((site_a + third) / 2)
    assert summary["dice"] != pytest.approx((first + second + third) / 3)  # not over images
    assert summary["jaccard"] == pytest.approx(((6 / 10 + 0) / 2 + 9 / 10) / 2)
    assert summary["accuracy"] == pytest.approx(((16 / 20 + 8 / 10) / 2 + 9 / 10) / 2)
    assert summary["worst_site"]["site"] == "a"
    assert summary["worst_site"]["dice"] == summary["per_site"]["a"]["dice"]
    assert summary["pooled"]["dice"] == pytest.approx(30 / (30 + 3 + 4))
    # Patient 0 has three tiles scored as one image.
    assert summary["per_patient"]["num_patients"] == 2
    assert summary["per_patient"]["dice"] == pytest.approx((12 / 18 + third) / 2)


def test_order_and_grouping_of_tiles_do_not_matter():
    rng = np.random.default_rng(1)
    confusions = rng.integers(0, 50, (12, 3, 3))
    site, slide = np.repeat([0, 1, 2], 4), np.repeat(np.arange(6), 2)
    names = ("background", "tumour", "stroma")
    before = metrics.summarise(confusions, make_table(site, slide, slide), names)
    order = rng.permutation(12)
    after = metrics.summarise(
        confusions[order], make_table(site[order], slide[order], slide[order]), names
    )
    assert json.dumps(before, sort_keys=True) == json.dumps(after, sort_keys=True)
    halves = np.concatenate([confusions // 2, confusions - confusions // 2])
    merged = metrics.summarise(
        halves, make_table(np.tile(site, 2), np.tile(slide, 2), np.tile(slide, 2)), names
    )
    assert json.dumps(before, sort_keys=True) == json.dumps(merged, sort_keys=True)


def test_trivial_rows_know_the_truth_only():
    truth = np.array([[60, 20, 20], [10, 0, 0], [5, 2, 3]])
    table = make_table([0], [0], [0])
    names = ("background", "rare", "common")
    trivial = metrics.summarise(truth[None] + 0, table, names)["trivial"]
    assert trivial["all_background"]["dice"] == 0
    assert trivial["all_background"]["accuracy"] == pytest.approx(100 / 120)
    assert set(trivial["all_background"]) >= {"dice", "per_site", "worst_site", "pooled"}
    # The best constant foreground: a tie of 10 pixels each, so the first.
    assert trivial["all_foreground"]["class"] == "rare"
    assert trivial["all_foreground"]["dice"] == pytest.approx((20 / 130 + 0) / 2)
    other_prediction = np.diag(truth.sum(1))
    assert metrics.summarise(other_prediction[None], table, names)["trivial"] == trivial


def test_what_was_not_measured_is_none_not_nan():
    confusions = np.stack([binary(0, 0, 0, 4), binary(0, 0, 0, 0), binary(1, 0, 0, 3)])
    table = make_table([0, 1, 2], [0, 1, 2], [-1, -1, -1])
    summary = metrics.summarise(confusions, table, ("background", "nuclei"))
    json.dumps(summary, allow_nan=False)
    assert summary["per_patient"] is None
    assert summary["per_site"]["a"]["dice"] is None
    assert summary["per_site"]["a"]["accuracy"] == 1
    assert summary["per_site"]["b"]["accuracy"] is None
    assert summary["worst_site"]["site"] == "c"
    assert summary["dice"] == 1
    assert summary["dhunet"]["dice"] == 1
    nothing = metrics.summarise(np.zeros((1, 2, 2), int), make_table([0], [0], [0]), ("b", "n"))
    assert nothing["worst_site"] is None
    assert nothing["dice"] is None


def test_known_patients_are_scored_where_others_are_unknown():
    confusions = np.stack([binary(1, 0, 0, 3), binary(0, 1, 0, 3)])
    summary = metrics.summarise(confusions, make_table([0, 0], [0, 1], [0, -1]), ("b", "n"))
    assert summary["per_patient"] == {
        "dice": 1.0, "jaccard": 1.0, "accuracy": 1.0, "num_patients": 1,
    }  # fmt: skip


def test_an_empty_split_is_none_and_a_wrong_one_an_error():
    assert metrics.summarise(np.zeros((0, 2, 2)), make_table([], [], []), ("b", "n")) is None
    with pytest.raises(ValueError, match="Expected confusions of shape"):
        metrics.summarise(np.zeros((2, 2, 2)), make_table([0], [0], [0]), ("b", "n"))
