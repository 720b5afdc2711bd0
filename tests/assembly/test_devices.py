import pytest

from fedjax_dp.assembly.devices import devices_per_client
from fedjax_dp.federated.cohort import client_mesh


@pytest.mark.parametrize(
    ("devices", "clients", "units", "is_cpu", "expected"),
    [
        (1, 3, 64, True, 1),
        (2, 3, 64, True, 2),  # nobody waits for the client that drew most
        (2, 3, 8, True, 1),  # too little to share
        (2, 1, 8, True, 2),  # but better than a device without a client
        (2, 1, 1, True, 1),  # a unit is not divided
        (3, 6, 64, True, 3),
        (64, 6, 64, True, 8),
        (8, 10, 256, False, 1),  # a card wants many units at once
        (8, 3, 256, False, 2),
        (8, 1, 256, False, 8),
        (6, 2, 256, False, 3),
    ],
)
def test_how_many_devices_share_a_client(devices, clients, units, is_cpu, expected):
    found = devices_per_client(devices, clients, units=units, tiles=units, is_cpu=is_cpu)
    assert found == expected
    assert devices % found == 0


def test_tiles_count_where_a_unit_has_many():
    assert devices_per_client(2, 6, units=2.0, tiles=16.0, is_cpu=True) == 2
    assert devices_per_client(2, 6, units=1.0, tiles=16.0, is_cpu=True) == 1


@pytest.mark.parametrize("together", [2, 0, -1])
def test_devices_that_make_no_groups_are_refused(together):
    with pytest.raises(ValueError, match=f"devices_per_client={together}"):
        client_mesh(1, devices_per_client=together)
