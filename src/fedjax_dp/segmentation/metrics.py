"""What a segmentation is worth: counts on the device, scores on the host.

A tile's confusion matrix is the one statistic; matrices of tiles, images, patients and sites are
merged by addition, so evaluation in any batch size or order gives the same numbers. The headline
is the mean over a site's images, then the unweighted mean over sites: a large hospital cannot
hide a small one. Background (class 0) never enters a mean over classes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from fedjax_dp.data.tiles import UNKNOWN_PATIENT, TileTable


def confusion_matrix(
    logits: Float[Array, "H W K"], labels: UInt8[Array, "H W"]
) -> Int32[Array, "K K"]:
    """Pixels of one tile by (truth, prediction), on the device; pixels labelled 255 are left out.

    Exact: the counts are a product of 0/1 matrices accumulated in float32.

    Args:
        logits: class scores; the prediction is the largest, the first of equals.
        labels: class index per pixel; 255, and any other label >= K, is counted nowhere.

    Returns:
        Counts, rows truth, columns prediction.

    Raises:
        ValueError: the tile has more than 2^24 pixels, beyond which float32 cannot count.
    """
    height, width, num_classes = logits.shape
    if height * width > 2**24:
        raise ValueError(
            f"Expected a tile of at most 2^24 pixels, got {height=} and {width=}. Cut the image "
            "into tiles and add their matrices."
        )
    classes = jnp.arange(num_classes)
    truth = (labels.reshape(-1, 1) == classes).astype(jnp.float32)
    prediction = (logits.argmax(-1).reshape(-1, 1) == classes).astype(jnp.float32)
    return (truth.T @ prediction).astype(jnp.int32)


def count_pixels(prediction: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """The same counts on the host, int64 [K, K], from a label map of any shape."""
    is_valid = labels < num_classes
    pairs = labels[is_valid].astype(np.int64) * num_classes + prediction[is_valid]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


class Scores(NamedTuple):
    """Scores per class, float64 [..., K]; NaN where a class does not count."""

    dice: np.ndarray
    jaccard: np.ndarray
    accuracy: np.ndarray  # one class against the rest, all valid pixels


def strict_scores(confusion: np.ndarray) -> Scores:
    """Scores in which a false positive on an absent class counts.

    A class in neither truth nor prediction does not count (NaN, not a free 1); one that is
    predicted where the truth has none scores Dice and Jaccard 0.

    Args:
        confusion: counts [..., K, K], rows truth.
    """
    hit, truth, predicted, total = _margins(confusion)
    union = truth + predicted - hit
    with np.errstate(invalid="ignore"):
        accuracy = np.where(union > 0, (total - union + hit) / total, np.nan)
        return Scores(2 * hit / (truth + predicted), hit / union, accuracy)


def dhunet_scores(confusion: np.ndarray) -> Scores:
    """Scores as the code of the paper's group (DHUnet) counts them, to compare with their tables.

    Per class and slide: in neither truth nor prediction 1, 1, 1; in the truth but never predicted
    0, 0, 0, accuracy too; predicted where the truth has none NaN, that is forgiven. Accuracy is
    one class against the rest with the background's pixels. A slide without a valid pixel is NaN.

    Args:
        confusion: counts [..., K, K], rows truth.
    """
    hit, truth, predicted, total = _margins(confusion)
    union = truth + predicted - hit

    def rule(score: np.ndarray) -> np.ndarray:
        score = np.where((truth == 0) & (predicted == 0), 1.0, score)
        score = np.where((truth > 0) & (predicted == 0), 0.0, score)
        return np.where(((truth == 0) & (predicted > 0)) | (total == 0), np.nan, score)

    with np.errstate(invalid="ignore"):
        return Scores(
            rule(2 * hit / (truth + predicted)),
            rule(hit / union),
            rule((total - union + hit) / total),
        )


class ImageCounts(NamedTuple):
    """Counts of I images, and whose they are: all that an interval needs, and no pixel.

    Attributes:
        confusions: int64 [I, K, K], rows truth.
        site: int32 [I], index into `sites`.
        patient: int32 [I], alike for images of one patient; -1 where unknown.
        sites: names.
    """

    confusions: np.ndarray
    site: np.ndarray
    patient: np.ndarray
    sites: tuple[str, ...]


def image_counts(confusions: np.ndarray, table: TileTable) -> ImageCounts:
    """Counts [N, K, K] of the table's tiles, added up within each image."""
    merged, first = _merge(np.asarray(confusions, np.int64), table.slide)
    return ImageCounts(merged, table.site[first], table.patient[first], table.sites)


def image_scores(counts: ImageCounts) -> np.ndarray:
    """Foreground Dice, Jaccard and pixel accuracy of each image, float64 [I, 3]; NaN if nothing."""
    return _headline(counts.confusions, strict_scores(counts.confusions))


def summarise(
    confusions: np.ndarray, table: TileTable, class_names: Sequence[str]
) -> dict[str, Any] | None:
    """All that is reported of one split, from the counts of its tiles.

    Args:
        confusions: counts [N, K, K] of the table's tiles, in table order.
        table: whose tiles they are. An image is a slide of the table.
        class_names: K names; class 0 is the background.

    Returns:
        None for an empty table, else a dict of plain numbers, None where nothing was measured:
        "dice", "jaccard", "accuracy" (the headline), "per_site" {site: {..., "num_images",
        "per_class"}}, "worst_site" {"site", ...} (lowest Dice), "pooled" (all pixels as one image),
        "per_patient" {..., "num_patients"} (mean over known patients) or None, "dhunet", and
        "trivial" {"all_background", "all_foreground"}: the same for predictors that know nothing.
        With several foreground classes "all_foreground" is the best of them, "class" names it.

    Raises:
        ValueError: shapes of `confusions`, `table` and `class_names` disagree.
    """
    num_classes = len(class_names)
    if np.shape(confusions) != (len(table), num_classes, num_classes):
        raise ValueError(
            f"Expected confusions of shape {(len(table), num_classes, num_classes)} for "
            f"{len(table)} tiles and {class_names=}, got {np.shape(confusions)}."
        )
    if not len(table):
        return None
    confusions = np.asarray(confusions, np.int64)
    summary = _summarise(confusions, table, class_names)
    constants = [
        _summarise(_constant_predictor(confusions, k), table, class_names)
        for k in range(num_classes)
    ]
    best = max(range(1, num_classes), key=lambda k: constants[k]["dice"] or 0.0)
    summary["trivial"] = {
        "all_background": constants[0],
        "all_foreground": {"class": class_names[best]} | constants[best],
    }
    return summary


def _summarise(
    confusions: np.ndarray, table: TileTable, class_names: Sequence[str]
) -> dict[str, Any]:
    """`summarise` without the trivial rows."""
    images, first_tile = _merge(confusions, table.slide)
    site_of_image = table.site[first_tile]
    scores = strict_scores(images)
    headline = _headline(images, scores)  # [images, 3]
    per_site, site_means = {}, []
    for index in np.unique(site_of_image):
        of_site = site_of_image == index
        site_means.append(_nanmean(headline[of_site]))
        per_class = np.stack([_nanmean(score[of_site]) for score in scores], axis=-1)  # [K, 3]
        per_site[table.sites[index]] = _named(site_means[-1]) | {
            "num_images": int(of_site.sum()),
            "per_class": {n: _named(s) for n, s in zip(class_names, per_class, strict=True)},
        }
    measured = {s: v for s, v in per_site.items() if v["dice"] is not None}
    worst = min(measured, key=lambda s: measured[s]["dice"], default=None)
    pooled = images.sum(0)
    theirs = np.stack([_nanmean(s[:, 1:]) for s in dhunet_scores(images)], axis=-1)  # [K - 1, 3]
    return _named(_nanmean(np.stack(site_means))) | {
        "per_site": per_site,
        "worst_site": None
        if worst is None
        else {"site": worst} | {name: per_site[worst][name] for name in Scores._fields},
        "pooled": _named(_headline(pooled, strict_scores(pooled))),
        "per_patient": _per_patient(confusions, table.patient),
        "dhunet": _named(_nanmean(theirs)),
    }


def _per_patient(confusions: np.ndarray, patient: np.ndarray) -> dict[str, Any] | None:
    """Mean over the known patients, each scored on all of its tiles as one image."""
    is_known = patient != UNKNOWN_PATIENT
    if not is_known.any():
        return None
    merged, _ = _merge(confusions[is_known], patient[is_known])
    means = _nanmean(_headline(merged, strict_scores(merged)))
    return _named(means) | {"num_patients": len(merged)}


def _margins(confusion: np.ndarray) -> tuple[np.ndarray, ...]:
    """True positives, truth and prediction per class, and all pixels: float64 [..., K]."""
    counts = np.asarray(confusion, np.float64)
    total = counts.sum((-2, -1))[..., None]
    return np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2), total


def _headline(confusion: np.ndarray, scores: Scores) -> np.ndarray:
    """Foreground Dice and Jaccard and overall pixel accuracy of each matrix: [..., 3]."""
    hit, _, _, total = _margins(confusion)
    with np.errstate(invalid="ignore"):
        accuracy = hit.sum(-1) / total[..., 0]
    dice, jaccard = (_nanmean(score[..., 1:], axis=-1) for score in scores[:2])
    return np.stack([dice, jaccard, accuracy], axis=-1)


def _merge(confusions: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts added within each group, and the index of each group's first tile."""
    _, first, inverse = np.unique(group, return_index=True, return_inverse=True)
    merged = np.zeros((len(first), *confusions.shape[1:]), np.int64)
    np.add.at(merged, inverse, confusions)
    return merged, first


def _constant_predictor(confusions: np.ndarray, predicted_class: int) -> np.ndarray:
    """The counts had every pixel been given one class: known from the truth alone."""
    constant = np.zeros_like(confusions)
    constant[..., predicted_class] = confusions.sum(-1)
    return constant


def _nanmean(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean over what was measured; NaN, without a warning, where nothing was."""
    count = (~np.isnan(values)).sum(axis)
    return np.where(count > 0, np.nansum(values, axis) / np.maximum(count, 1), np.nan)


def _named(values: np.ndarray) -> dict[str, Any]:
    """Dice, Jaccard and accuracy as plain floats, None for NaN."""
    return {
        name: None if np.isnan(value) else float(value)
        for name, value in zip(Scores._fields, values, strict=True)
    }
