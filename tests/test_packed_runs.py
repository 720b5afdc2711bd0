"""Contract of `execution.pool`: a whole run is the same wherever its tiles lie."""

import dataclasses
from unittest import mock

import jax
import numpy as np
import pytest

from fedjax_dp import training
from fedjax_dp.assembly import pools
from fedjax_dp.assembly.pools import resolve_pool
from fedjax_dp.federated.cohort import client_mesh
from fedjax_dp.reporting.log import read_lines
from tests.runs import (
    charges,
    compiled,  # noqa: F401
    device,
    federation,
    no_pictures,  # noqa: F401
    read_json,
    run,
    saved,
    tiny,
    without_times,
)

CHANGES = {
    "dp_sgd": {
        "privacy.expected_batch_size": 2.0,
        "privacy.tiles_per_unit": 1,
        "federation.local_steps": 2,
    },
    "distributed": {"privacy.placement": "distributed", "privacy.tiles_per_unit": 1},
}


def assert_same_run(folder, whole):
    """All but the environment of the charges: two programs are two environments."""
    (state, position), (their_state, their_position) = saved(folder), saved(whole)
    jax.tree.map(np.testing.assert_array_equal, state, their_state)
    for name in ("round", "ledger", "tiles"):
        assert position[name] == their_position[name]
    apart = {"environment", "parent"}
    ours, theirs = (
        [{k: v for k, v in charge.items() if k not in apart} for charge in charges(f)]
        for f in (folder, whole)
    )
    assert ours == theirs
    lines, their_lines = (read_lines(f / "metrics.jsonl") for f in (folder, whole))
    assert [without_times(line) for line in lines] == [without_times(line) for line in their_lines]
    privacy, their_privacy = (read_json(f / "privacy.json") for f in (folder, whole))
    assert without_times(privacy) == without_times(their_privacy)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_a_packed_run_is_the_resident_one_bit_for_bit(name, tmp_path, no_pictures):  # noqa: F811
    """Compiled as users compile: it is the compiler's fusions that could tell them apart."""
    changes = CHANGES[name] | {"federation.rounds": 3, "objective.hed_jitter": 0.1}
    for pool in ("resident", "packed"):
        run(tiny(**changes, **{"execution.pool": pool}), tmp_path / pool)
    assert_same_run(tmp_path / "packed", tmp_path / "resident")


@pytest.mark.slow
def test_a_packed_run_reads_its_tiles_from_a_file(tmp_path, compiled, no_pictures):  # noqa: F811
    """A table of `np.memmap`; and what is stopped goes on with the tiles wherever they are."""
    table = federation().train
    mapped = {}
    for name in ("images", "labels"):
        getattr(table, name).tofile(tmp_path / name)
        shape = getattr(table, name).shape
        mapped[name] = np.memmap(tmp_path / name, np.uint8, mode="r", shape=shape)
    there = dataclasses.replace(federation(), train=dataclasses.replace(table, **mapped))
    config = tiny(**{"execution.pool": "packed"})
    training.run(config, tmp_path / "file", federation=there, progress=False)
    run(config, tmp_path / "memory")
    assert_same_run(tmp_path / "file", tmp_path / "memory")


def test_packed_keeps_no_tile_on_the_devices():
    made = device(tiny(**CHANGES["dp_sgd"], **{"execution.pool": "packed"}))
    assert made.pool is None
    assert made.plan["pool"] == "packed"
    # Two steps of at most as many slots as the larger site has patients, of one tile each.
    assert made.packing.capacity == 12
    assert len(made.packing.source) == len(federation().train)
    resident = device(tiny())
    assert resident.packing is None
    assert resident.plan["pool"] == "resident"


@pytest.mark.parametrize(("spare", "expected"), [(0, "resident"), (-1, "packed")])
def test_auto_is_resident_where_it_fits(spare, expected):
    table = federation().train
    room = table.images.nbytes + table.labels.nbytes + spare
    mesh = client_mesh(1)
    with mock.patch.object(pools, "room", return_value=room):
        assert resolve_pool("auto", table, mesh) == expected
        assert resolve_pool("resident", table, mesh) == "resident"
        assert resolve_pool("packed", table, mesh) == "packed"


def test_room_is_a_share_of_the_devices_memory():
    class Device:
        platform = "gpu"

        def __init__(self, stats):
            self.memory_stats = lambda: stats

    def mesh(*stats):
        return mock.Mock(local_devices=[Device(each) for each in stats])

    assert pools.room(mesh({"bytes_limit": 100}, {"bytes_limit": 60})) == 30
    assert pools.room(mesh(None)) == 0  # one that does not tell gets its tiles chunk by chunk
    assert 2**28 < pools.room(client_mesh(1)) < 2**48
