import json

import pytest
from dp_accounting import dp_event, gaussian_mechanism

from fedjax_dp.privacy import accounting, calibration
from tests.privacy.dp_events import DELTA, gaussian, poisson, truncated


@pytest.mark.parametrize("event", [gaussian(10.0), truncated(300, 0.1, 60, 2.0)])
@pytest.mark.parametrize("rounds", [1, 7, 64])
def test_max_rounds_is_exact_at_the_edge(event, rounds):
    budget = accounting.epsilon(event, rounds, DELTA)
    assert calibration.max_rounds(event, budget, DELTA) == rounds
    assert calibration.max_rounds(event, budget * (1 - 1e-6), DELTA) == rounds - 1
    assert accounting.epsilon(event, rounds + 1, DELTA) > budget


def test_max_rounds_of_the_limits():
    assert calibration.max_rounds(dp_event.NonPrivateDpEvent(), 8.0, DELTA) == 0
    assert calibration.max_rounds(dp_event.NoOpDpEvent(), 8.0, DELTA, limit=77) == 77
    assert calibration.max_rounds(gaussian(1e4), 8.0, DELTA, limit=100) == 100


@pytest.mark.parametrize(
    "make_event",
    [gaussian, lambda z: poisson(0.05, z), lambda z: truncated(400, 0.1, 72, z)],
    ids=["gaussian", "poisson", "truncated"],
)
@pytest.mark.parametrize("target", [0.5, 8.0])
def test_calibration_meets_the_target_from_above(make_event, target):
    z = calibration.calibrate_noise_multiplier(make_event, 50, target, DELTA)
    assert accounting.epsilon(make_event(z), 50, DELTA) <= target
    assert accounting.epsilon(make_event(z * (1 - 2e-4)), 50, DELTA) > target


def test_calibration_of_the_gaussian_is_the_analytic_one():
    exact = gaussian_mechanism.get_sigma_gaussian(3.0, DELTA)
    z = calibration.calibrate_noise_multiplier(gaussian, 1, 3.0, DELTA)
    assert exact <= z <= exact * (1 + 1.1e-4)


def test_calibrations_are_kept_and_verified(tmp_path, monkeypatch):
    def calibrate():
        return calibration.calibrate_noise_multiplier(gaussian, 9, 3.0, DELTA, cache_dir=tmp_path)

    z = calibrate()
    (file,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "_bracket", None)
        assert calibrate() == z
    file.write_text(json.dumps(z / 2))
    assert calibrate() == z


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calibration.max_rounds(gaussian(1.0), float("nan"), DELTA), "target_epsilon"),
        (lambda: calibration.calibrate_noise_multiplier(gaussian, 0, 1.0, DELTA), "count"),
        (lambda: calibration.calibrate_noise_multiplier(gaussian, 1, 0.0, DELTA), "target_epsilon"),
        (
            lambda: calibration.calibrate_noise_multiplier(
                lambda z: dp_event.NonPrivateDpEvent(), 1, 1.0, DELTA
            ),
            "No noise multiplier",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("start", [1, 2, 99, 100, 101, 5000, 10**7])
def test_where_the_rounds_are_looked_for_does_not_matter(start):
    event = gaussian(10.0)
    expected = calibration.max_rounds(event, 4.377178, DELTA, limit=1000)
    assert calibration.max_rounds(event, 4.377178, DELTA, limit=1000, start=start) == expected
    assert calibration.max_rounds(event, 1e6, DELTA, limit=64, start=start) == 64
    assert calibration.max_rounds(event, 1e-6, DELTA, start=start) == 0
