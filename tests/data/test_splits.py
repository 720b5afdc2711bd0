"""The keyed split: patients stay together, and nobody moves when another leaves."""

import pytest

from fedjax_dp.data.splits import SPLIT_KEY, split_of


def _splits(count, key=SPLIT_KEY):
    return [split_of(patient=f"p{i}", image="x", split_key=key) for i in range(count)]


def test_images_of_a_patient_stay_together():
    for i in range(50):
        splits = {split_of(patient=f"p{i}", image=f"{i}-{j}.png") for j in range(20)}
        assert len(splits) == 1
    alone = {split_of(patient="", image=f"{j}.png") for j in range(50)}
    assert alone == {"train", "validation", "test"}


def test_proportions_hold_on_average():
    n = 20_000
    splits = _splits(n)
    for name, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        stddev = (n * share * (1 - share)) ** 0.5
        assert abs(splits.count(name) - n * share) < 5 * stddev
        assert abs(splits.count(name) - n * (share + 0.03)) > 5 * stddev  # the test has power


def test_another_key_is_another_split():
    agree = sum(a == b for a, b in zip(_splits(5000), _splits(5000, b"other"), strict=True))
    chance = 0.7**2 + 0.1**2 + 0.2**2
    assert abs(agree / 5000 - chance) < 5 * (chance * (1 - chance) / 5000) ** 0.5


def test_a_patient_is_no_image():
    """A patient named like a file is not the unknown patient of that file."""
    names = [f"{i}.png" for i in range(200)]
    one = [split_of(patient=name, image="x") for name in names]
    assert one != [split_of(patient="", image=name) for name in names]


def test_golden():
    """The split of a published manifest must never move."""
    names = ("TCGA-A2-A0CM", "TCGA-BH-A0B3", "p1", "p2", "p3", "p4")
    assert [split_of(patient=n, image="") for n in names] == [
        "train",
        "train",
        "test",
        "test",
        "test",
        "test",
    ]


@pytest.mark.parametrize("key", [b"", b"x" * 65])
def test_bad_keys(key):
    with pytest.raises(ValueError, match="split_key"):
        split_of(patient="p", image="", split_key=key)
