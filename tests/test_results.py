import pytest

from fedjax_dp.results import comparison_row


def summary(rows):
    scores = {"dice": 0.7, "jaccard": 0.6, "accuracy": 0.9}
    return {"test": scores, "external": None, "privacy": {"guarantees": rows}}


def row(unit, epsilon, relation="zero_out"):
    return {"unit": unit, "relation": relation, "epsilon": epsilon}


def test_zeroing_the_client_says_nothing_of_its_patients():
    rows = {"client": row("client", 8.0), "client_replace": row("client", 19.0, "replacement")}
    compared = comparison_row("update", summary(rows))
    assert (compared.tile_epsilon, compared.patient_epsilon) == (19.0, 19.0)
    without = comparison_row("update", summary({"client": row("client", 8.0)}))
    assert (without.tile_epsilon, without.patient_epsilon) == (None, None)


def test_a_slide_or_patient_guarantee_is_not_a_tile_guarantee():
    compared = comparison_row("dp_sgd", summary({"slide": row("slide", 8.0)}))
    assert (compared.tile_epsilon, compared.patient_epsilon) == (None, None)
    rows = {"patient": row("patient", 8.0), "tile_of_patient": row("tile", 12.0)}
    compared = comparison_row("dp_sgd", summary(rows))
    assert (compared.tile_epsilon, compared.patient_epsilon) == (12.0, 8.0)


def test_the_smallest_of_several_proven_rows_and_none_where_a_client_has_none():
    rows = {"record_tile": row("tile", 1.5), "client_replace": row("client", 19.0)}
    assert comparison_row("update", summary(rows)).tile_epsilon == 1.5
    rows["record_tile"]["epsilon"] = None
    assert comparison_row("update", summary(rows)).tile_epsilon == 19.0


def test_scores_of_the_split():
    compared = comparison_row("run", summary({}))
    assert compared.dice == pytest.approx(0.7)
    assert comparison_row("run", summary({}), "external").dice is None
