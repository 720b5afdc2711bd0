"""Sites made by hand draw what a run's rounds draw, and warn as a run does."""

import dataclasses

import jax
import numpy as np
import pytest

from fedjax_dp.data.tiles import UNKNOWN_PATIENT, TileTable
from fedjax_dp.federated import sites
from fedjax_dp.federated.cohort import stack_chunk
from fedjax_dp.federated.rounds import client_input
from fedjax_dp.privacy.secrets import Secrets
from tests.oracles import flat

SETTINGS = {
    "placement": "dp_sgd",
    "expected_batch_size": 3.0,
    "local_steps": 2,
    "rounds": 5,
    "l2_clip_norm": 0.5,
    "noise_multiplier": 2.0,
    "target_delta": 1e-3,
}


def table(patients=(8, 5), tiles_per_patient=3):
    """Two sites with unlike numbers of patients, every patient with the same number of tiles."""
    owners = np.arange(sum(patients))
    count = len(owners) * tiles_per_patient
    return TileTable(
        images=np.zeros((count, 4, 4, 3), np.uint8),
        labels=np.zeros((count, 4, 4), np.uint8),
        site=np.repeat(np.repeat([0, 1], patients), tiles_per_patient).astype(np.int32),
        slide=np.repeat(owners, tiles_per_patient).astype(np.int32),
        patient=np.repeat(owners, tiles_per_patient).astype(np.int32),
        sites=("north", "south"),
        slides=tuple(f"s{owner}" for owner in owners),
        patients=tuple(f"p{owner}" for owner in owners),
    )


def data(chunk):
    """The chunk as numbers: keys by their data."""
    return flat(chunk._replace(keys=jax.tree.map(jax.random.key_data, chunk.keys)))


@pytest.mark.parametrize(("unit", "counts"), [("patient", [8, 5]), ("tile", [24, 15])])
def test_the_units_of_the_table_are_what_is_accounted(unit, counts):
    made, pool = sites.protect(table(), unit=unit, **SETTINGS)
    assert [site.name for site in made] == ["north", "south"]
    assert [site.mechanism.num_units for site in made] == counts
    assert [site.weight for site in made] == counts
    for site in made:
        assert site.mechanism.unit == unit
        assert site.mechanism.expected_batch_size == pytest.approx(3.0)
    owned = np.concatenate([tiles for site in made for tiles in site.unit_tiles])
    assert sorted(owned) == list(range(len(pool.images)))


def test_a_draw_is_what_the_rounds_of_a_run_draw():
    made, _ = sites.protect(table(), unit="patient", **SETTINGS)
    secrets = Secrets.from_seed(["north", "south"], 7)
    slots = max(site.mechanism.capacity for site in made)
    expected = stack_chunk([client_input(site, secrets, 3, num_slots=slots) for site in made])
    np.testing.assert_array_equal(data(sites.draw(made, secrets, 3)), data(expected))
    assert not np.array_equal(data(sites.draw(made, secrets, 4)), data(expected))


def test_without_secrets_every_draw_has_fresh_ones():
    made, _ = sites.protect(table(), unit="patient", **SETTINGS)
    noise = [jax.random.key_data(sites.draw(made).keys.noise) for _ in range(3)]
    assert len({tuple(key) for keys in noise for key in np.asarray(keys)}) == 6


def test_a_delta_that_promises_nothing_is_a_warning():
    with pytest.warns(UserWarning, match="target_delta 0.15 is not below 1/n"):
        sites.protect(table(), unit="patient", **{**SETTINGS, "target_delta": 0.15})


def test_unknown_patients_are_refused_by_name():
    known = table()
    patient = known.patient.copy()
    patient[-1] = UNKNOWN_PATIENT
    with pytest.raises(ValueError, match="unknown ones at south"):
        sites.protect(dataclasses.replace(known, patient=patient), unit="patient", **SETTINGS)
