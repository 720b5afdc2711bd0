import math

import pytest

from fedjax_dp.reporting.summary import (
    ComparisonRow,
    comparison_table,
    cost_sentence,
    plain_table,
    round_up,
)

ROWS = [
    ComparisonRow(
        name="FedAvg", dice=0.8, jaccard=0.7, accuracy=0.9,
        tile_epsilon=math.inf, patient_epsilon=math.inf,
    ),
    ComparisonRow(name="tile", dice=0.76, jaccard=0.65, accuracy=0.9, tile_epsilon=7.98),
    ComparisonRow(
        name="patient", dice=0.6, jaccard=None, accuracy=0.91,
        tile_epsilon=None, patient_epsilon=1234.501,
    ),
]  # fmt: skip


def parse(markdown):
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in markdown.splitlines()]
    assert set(lines[1]) <= {"---", "---:"}
    assert len({len(line) for line in lines}) == 1
    return lines[0], {line[0]: line[1:] for line in lines[2:]}


def test_table_shows_scores_and_the_difference_in_points_and_relative():
    header, runs = parse(comparison_table(ROWS, baseline="FedAvg"))
    assert header[0] == "run"
    assert runs["FedAvg"] == ["0.800", "", "0.700", "", "0.900", "", "infinite", "infinite"]
    assert runs["tile"] == [
        "0.760", "-4.0 (-5.0 %)", "0.650", "-5.0 (-7.1 %)", "0.900", "+0.0 (+0.0 %)",
        "7.98", "not stated",
    ]  # fmt: skip
    assert runs["patient"][2:6] == ["-", "-", "0.910", "+1.0 (+1.1 %)"]
    assert runs["patient"][-1] == "1234.51"


def test_without_a_baseline_there_are_no_differences():
    header, runs = parse(comparison_table(ROWS))
    assert header == ["run", "Dice", "Jaccard", "Accuracy", "epsilon, tile", "epsilon, patient"]
    assert len(runs) == 3


@pytest.mark.parametrize(
    ("epsilon", "shown"), [(8.0, 8.0), (7.98, 7.98), (8.001, 8.01), (0.0, 0.0)]
)
def test_epsilon_is_never_rounded_down(epsilon, shown):
    assert round_up(epsilon) == shown


def test_plain_table_says_the_same_in_aligned_columns():
    lines = plain_table(ROWS, baseline="FedAvg").splitlines()
    assert len({len(line) for line in lines}) == 1
    _, runs = parse(comparison_table(ROWS, baseline="FedAvg"))
    for line in lines[2:]:
        name = line.split()[0]
        assert " ".join(line.split()) == " ".join([name, *" ".join(runs[name]).split()])


def test_sentence_says_what_each_unit_cost():
    sentence = cost_sentence(ROWS, baseline="FedAvg", tile="tile", patient="patient")
    assert "0.800 Dice without privacy" in sentence
    assert "epsilon 7.98) cost 4.0 points, 5.0 % (0.760)" in sentence
    assert "epsilon 1234.51) cost 20.0 points, 25.0 % (0.600)" in sentence
    assert sentence.endswith(".")
    better = [ROWS[0], ComparisonRow(name="tile", dice=0.81, jaccard=0.7, accuracy=0.9), ROWS[2]]
    assert "cost nothing (0.810)" in cost_sentence(
        better, baseline="FedAvg", tile="tile", patient="patient"
    )


def test_errors_name_the_runs_there_are():
    with pytest.raises(ValueError, match=r"'fedavg', got \['FedAvg', 'tile', 'patient'\]"):
        comparison_table(ROWS, baseline="fedavg")
    with pytest.raises(ValueError, match="different names"):
        comparison_table([ROWS[0], ROWS[0]])
    with pytest.raises(ValueError, match="one or more"):
        plain_table([])
