import json
from fractions import Fraction

import attr
import pytest
from dp_accounting import dp_event

from fedjax_dp.privacy import events
from tests.privacy.dp_events import EVENTS, discrete


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_events_survive_json(event):
    nested = dp_event.SelfComposedDpEvent(event, 3)
    assert events.event_from_json(json.loads(json.dumps(events.event_to_json(nested)))) == (nested)


def test_an_unknown_event_is_refused():
    with pytest.raises(ValueError, match="Unknown"):
        events.event_from_json({"kind": "attr"})


def test_a_share_of_noise_keeps_its_exact_variance():
    event = discrete(0.1, 1.0, shares=3)
    assert event.noise_stddev_squared == Fraction(10**6, 3)
    described = json.loads(json.dumps(events.event_to_json(event)))
    assert described["noise_stddev_squared"] == "1000000/3"
    assert events.event_from_json(described) == event


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sampling_probability": 1.1}, r"sampling_probability in \[0, 1\], got 1.1"),
        ({"noise_stddev_squared": -1}, "noise_stddev_squared >= 0"),
        ({"num_shares": 0}, "num_shares >= 1"),
        ({"l2_sensitivity": float("nan")}, "l2_sensitivity >= 0 and finite"),
        ({"dimension": 0}, "dimension >= 1"),
    ],
)
def test_impossible_noise_is_refused(wrong, message):
    good = discrete(0.1, 1.0)
    with pytest.raises(ValueError, match=message):
        attr.evolve(good, **wrong)
