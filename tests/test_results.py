import math

import pytest

from fedjax_dp.results import comparison_row


def summary(tile=None, patient=None, epsilon=8.0):
    scores = {"dice": 0.7, "jaccard": 0.6, "accuracy": 0.9}
    converted = {
        f"{unit}_epsilon": None if worst is None else {"max": worst, "per_client": {}}
        for unit, worst in (("tile", tile), ("patient", patient))
    }
    privacy = {"epsilon": {"max": epsilon}, **converted}
    return {"test": scores, "external": None, "privacy": privacy}


def test_a_row_shows_what_the_statement_proves_and_no_more():
    compared = comparison_row("update", summary(tile=19.0, patient=12.0))
    assert (compared.tile_epsilon, compared.patient_epsilon) == (19.0, 12.0)
    compared = comparison_row("dp_sgd", summary(tile=8.0))
    assert (compared.tile_epsilon, compared.patient_epsilon) == (8.0, None)


def test_where_nothing_is_promised_nothing_is_unstated():
    compared = comparison_row("none", summary(epsilon="infinity"))
    assert (compared.tile_epsilon, compared.patient_epsilon) == (math.inf, math.inf)


def test_scores_of_the_split():
    compared = comparison_row("run", summary())
    assert compared.dice == pytest.approx(0.7)
    assert comparison_row("run", summary(), "external").dice is None
