import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from fedjax_dp.reporting import contours, pictures


def make_tile(seed=0, size=48):
    rng = np.random.default_rng(seed)
    image = rng.integers(170, 230, (size, size, 3)).astype(np.uint8)
    image[..., 1] -= 60  # pink
    rows, columns = np.mgrid[:size, :size]
    labels = ((rows - 20) ** 2 + (columns - 24) ** 2 < 120).astype(np.uint8)
    return image, labels


def count_colour(pixels, colour):
    return (np.abs(pixels / 255 - np.array(to_rgb(colour))).max(-1) < 0.15).sum()


def panels(pixels, number):
    """The columns of one row of panels, roughly."""
    return np.array_split(pixels, number, axis=1)


def test_overlay_outlines_truth_and_prediction_in_their_own_panels(tmp_path):
    image, labels = make_tile()
    pixels = pictures.overlay(image, labels, labels, title="a", path=tmp_path / "new" / "tile.png")
    with Image.open(tmp_path / "new" / "tile.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), pixels)
    bare, truth, prediction = panels(pixels, 3)
    for panel, green, cyan in ((bare, 0, 0), (truth, 1, 0), (prediction, 0, 1)):
        assert (count_colour(panel, contours.TRUTH_COLOUR) > 100) == green
        assert (count_colour(panel, contours.PREDICTION_COLOUR) > 100) == cyan


@pytest.mark.parametrize("fill", [0, 1])
def test_constant_predictions_are_drawn_without_a_warning(fill):
    image, labels = make_tile()
    pixels = pictures.overlay(image, labels, np.full_like(labels, fill))
    outlined = count_colour(panels(pixels, 3)[2], contours.PREDICTION_COLOUR)
    assert (outlined > 100) == fill  # everything foreground: a frame around the tile


def test_ignored_pixels_are_grey_and_without_outline():
    image, labels = make_tile()
    ignored = np.full_like(labels, 255)
    pixels = pictures.overlay(image, ignored, labels)
    assert count_colour(pixels, contours.PREDICTION_COLOUR) < 20
    assert count_colour(pixels, contours.TRUTH_COLOUR) < 20
    middle = panels(pixels, 3)[0][pixels.shape[0] // 2 - 20 :][:40, 100:300]
    spread = np.ptp(middle.astype(int), axis=-1).mean()
    clear = pictures.overlay(image, labels, labels)
    assert spread < 0.6 * np.ptp(panels(clear, 3)[0][200:240, 100:300].astype(int), axis=-1).mean()


def test_float_and_byte_images_look_the_same():
    image, labels = make_tile()
    np.testing.assert_allclose(
        pictures.overlay(image, labels, labels).astype(int),
        pictures.overlay((image / 255).astype(np.float32), labels, labels).astype(int),
        atol=2,
    )


def test_site_overlays_has_a_row_per_site_with_tiles():
    image, labels = make_tile()
    one = pictures.site_overlays({"a": [(image, labels, labels)]}, None)
    more = pictures.site_overlays(
        {"a": [(image, labels, labels)] * 2, "b": [(image, labels, labels)], "none": []}, None
    )
    assert more.shape[0] > 1.7 * one.shape[0]
    assert more.shape[1] > 1.9 * one.shape[1]
    with pytest.raises(ValueError, match="at least one tile"):
        pictures.site_overlays({"a": []}, None)


def test_comparison_has_a_column_per_prediction(tmp_path):
    image, labels = make_tile()
    predictions = {"no privacy": labels, "tile-level": labels, "patient-level": 0 * labels}
    pixels = pictures.comparison(image, labels, predictions, tmp_path / "comparison.png")
    drawn = [count_colour(p, contours.PREDICTION_COLOUR) > 100 for p in panels(pixels, 5)]
    assert drawn == [False, False, True, True, False]
    rows = pictures.comparison(
        np.stack([image] * 2),
        np.stack([labels] * 2),
        {name: np.stack([p] * 2) for name, p in predictions.items()},
        None,
        row_names=("a", "b"),
    )
    assert rows.shape[0] > 1.7 * pixels.shape[0]


def test_several_classes_have_a_colour_each():
    image, labels = make_tile()
    labels = labels + (np.arange(48) > 36).astype(np.uint8) * 2
    pixels = pictures.overlay(image, labels, labels, class_names=("other", "tumour", "stroma"))
    for panel in panels(pixels, 3)[1:]:
        for colour in contours.CLASS_COLOURS[:2]:
            assert count_colour(panel, colour) > 100


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [([1, 1, 0, 0], "Dice 0.67"), ([0, 0, 0, 1], "Dice 0.00"), ([1, 0, 0, 1], "Dice 1.00")],
)
def test_dice_in_the_title_ignores_what_is_ignored(prediction, expected):
    truth = np.array([[1, 0, 0, 255]])
    assert contours.dice_text(np.array([prediction]), truth, 2) == expected
    assert contours.dice_text(np.array([prediction]), np.full((1, 4), 255), 2) == "nothing there"


def line(number, epsilon, **nonprivate):
    return {"round": number, "epsilon": {"max": epsilon}, "nonprivate": nonprivate}


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [line(1, "infinity")],
        [line(1, 0.5, loss=1.0)],
        [line(1, 0.5, loss="nan", validation=None), line(2, 0.7, validation={"dice": None})],
        [
            line(i, i / 3, loss=1 / i, validation={"dice": 0.5, "per_site": {
                f"site-{k}": {"dice": 0.1 * k} for k in range(10)}})
            for i in range(1, 30)
        ],
    ],
)  # fmt: skip
def test_curves_are_drawn_from_whatever_there_is(tmp_path, lines):
    pictures.plot_curves(lines, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as saved:
        assert saved.size[0] > 1500


def test_a_site_moves_the_validation_curves(tmp_path):
    def curves(dice):
        validation = {"dice": 0.5, "per_site": {"a": {"dice": dice}}}
        pictures.plot_curves([line(i, 1.0, validation=validation) for i in (1, 2)], tmp_path / "c")
        with Image.open(tmp_path / "c") as saved:
            return np.asarray(saved)

    left, right = np.split(np.nonzero((curves(0.2) != curves(0.8)).any((0, 2)))[0], [1])
    assert left.size
    assert right.max() < curves(0.2).shape[1] / 2  # loss and epsilon stay


def test_pyplot_is_left_alone(tmp_path):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    image, labels = make_tile()
    pictures.overlay(image, labels, labels)
    pictures.plot_curves([], tmp_path / "curves.png")
    assert plt.get_fignums() == []
