"""The host loop: what a run leaves behind, when it halts, and what may never change its result."""

import copy
import math
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from fedjax_dp import results, training
from fedjax_dp.assembly.federation import POOLED
from fedjax_dp.assembly.sites import make_sites
from fedjax_dp.checkpoint import Checkpoints, load_params
from fedjax_dp.config import Config
from fedjax_dp.privacy.ledger import Ledger
from fedjax_dp.privacy.statement import recompute_epsilon
from fedjax_dp.reporting.log import read_lines
from fedjax_dp.reporting.officer import statement_page
from tests import runs
from tests.oracles import distance
from tests.runs import (
    ALDER,
    BIRCH,
    charges,
    compiled,  # noqa: F401
    federation,
    limits,
    no_pictures,  # noqa: F401
    read_json,
    run,
    saved,
    tiny,
)

pytestmark = pytest.mark.usefixtures("compiled", "no_pictures")

ROUNDS = 4


@pytest.fixture(scope="module")
def plain(compiled, no_pictures, tmp_path_factory):  # noqa: F811
    """One run with everything as in `tiny()`: configuration, summary, workdir."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    config = tiny()
    return config, run(config, folder), folder


def lines(folder):
    """The log without its line of round 0, which is the untrained network's."""
    first, *rest = read_lines(folder / "metrics.jsonl")
    assert first["round"] == 0
    assert set(first) == {"round", "nonprivate"}
    return rest


# --- what a run leaves behind


def test_a_run_does_not_change_its_config(plain):
    assert plain[0] == tiny()
    fresh = copy.deepcopy(Config())
    assert fresh == Config()  # dataclasses compare by value, or the line above says nothing
    assert tiny(seed=1) != tiny()


def test_the_summary_is_the_one_that_is_specified(plain):
    _, summary, folder = plain
    assert summary == read_json(folder / "summary.json")
    assert (summary["experiment"], summary["finished"]) == ("feddp", True)
    assert (summary["rounds"], summary["seed"]) == (ROUNDS, 0)
    for split, sites in (("test", {ALDER, BIRCH}), ("external", set(federation().external.sites))):
        scores = summary[split]
        assert set(scores["per_site"]) == sites
        for part in (scores, scores["pooled"], scores["worst_site"], *scores["per_site"].values()):
            for metric in ("dice", "jaccard", "accuracy"):
                assert 0.0 <= part[metric] <= 1.0
        assert scores["worst_site"]["site"] in sites
    privacy = summary["privacy"]
    assert privacy["placement"] == "dp_sgd"
    assert privacy["unit"] == "patient"
    assert privacy["relation"] == "zero_out"
    assert privacy["target_delta"] == 1e-5
    assert privacy["accountant"].startswith("PLD, dp-accounting")
    assert set(privacy["epsilon"]["per_client"]) == {ALDER, BIRCH}
    assert privacy["epsilon"]["max"] == max(privacy["epsilon"]["per_client"].values()) < math.inf
    assert privacy["patient_epsilon"] == privacy["epsilon"]  # the unit is the patient
    throughput = summary["throughput"]
    for name in ("tiles_per_second", "seconds_per_round", "compile_seconds"):
        assert throughput[name] > 0
    assert 0 <= throughput["host_share"] < 1
    assert {"jax", "python", "fedjax_dp"} <= set(summary["versions"])


@pytest.mark.slow
def test_without_privacy_epsilon_is_infinite_and_every_output_says_so(tmp_path):
    changes = {"privacy.placement": "none", "privacy.noise_multiplier": 0.0}
    summary = run(tiny(**changes, **{"federation.rounds": 1}), tmp_path)
    privacy = summary["privacy"]
    assert privacy["epsilon"] == {
        "max": "infinity",
        "per_client": dict.fromkeys((ALDER, BIRCH), "infinity"),
    }
    assert privacy["patient_epsilon"] is None
    assert "adds no noise" in privacy["patient_epsilon_reason"]
    assert privacy["is_private"] is False
    (line,) = lines(tmp_path)
    assert line["epsilon"]["max"] == "infinity"
    assert set(recompute_epsilon(read_json(tmp_path / "privacy.json")).values()) == {math.inf}


def test_epsilon_is_recomputed_from_the_statement_alone(plain):
    _, summary, folder = plain
    stated = read_json(folder / "privacy.json")
    assert (folder / "privacy.md").read_text() == statement_page(stated)
    assert recompute_epsilon(stated) == pytest.approx(summary["privacy"]["epsilon"]["per_client"])
    for client, entry in stated["clients"].items():
        assert entry["rounds"] == sum(client in c["clients"] for c in charges(folder))


def test_each_round_has_its_line_with_an_epsilon_per_client(plain):
    _, summary, folder = plain
    assert [line["round"] for line in lines(folder)] == [1, 2, 3, 4]
    epsilons = []
    for line in lines(folder):
        assert set(line["epsilon"]["per_client"]) == {ALDER, BIRCH}
        assert line["epsilon"]["max"] == max(line["epsilon"]["per_client"].values())
        epsilons.append(line["epsilon"]["max"])
        assert line["nonprivate"]["seconds"] > 0
    assert epsilons == sorted(set(epsilons))  # every round costs
    assert epsilons[-1] == summary["privacy"]["epsilon"]["max"]
    evaluated = [line["round"] for line in lines(folder) if "validation" in line["nonprivate"]]
    assert evaluated == [2, 4]


def test_what_is_not_accounted_stays_under_nonprivate(plain):
    """Scores, losses, draws and durations; what stands beside them is counted or public."""
    for line in lines(plain[2]):
        assert set(line) == {"round", "epsilon", "clients", "left", "dropped", "nonprivate"}


def test_a_finished_run_is_not_run_again(plain, tmp_path, monkeypatch):
    config, summary, folder = plain
    folder = shutil.copytree(folder, tmp_path / "run")
    (folder / "secrets").write_bytes(b"left by a kill after the summary")
    monkeypatch.setattr(training, "make_sites", None)  # whatever would be computed begins here
    before = {path: path.read_bytes() for path in folder.rglob("*.json*")}
    assert run(config, folder) == summary
    assert before == {path: path.read_bytes() for path in folder.rglob("*.json*")}
    assert not (folder / "secrets").exists()


# --- budgets


def test_the_round_that_would_exceed_a_budget_is_never_run(tmp_path, capsys):
    """One site's budget ends first; it leaves, the others go on, and then the run halts."""
    target, delta = 6.0, tiny().privacy.target_delta
    allowed = limits(target)
    assert 1 <= allowed[BIRCH] < allowed[ALDER] < 8
    config = tiny(**{"privacy.target_epsilon": target, "federation.rounds": 8})
    summary = run(config, tmp_path, progress=True)
    last = allowed[ALDER]
    printed = capsys.readouterr().out
    assert f"The privacy budget of every client is spent after round {last}." in printed
    assert summary["rounds"] == len(lines(tmp_path)) == last
    for number, line in enumerate(lines(tmp_path), start=1):
        stays = number <= allowed[BIRCH]
        assert line["left"] == ([] if stays else [BIRCH])
        assert set(line["clients"]) == ({ALDER, BIRCH} if stays else {ALDER})
        assert line["epsilon"]["max"] <= target
    stated = read_json(tmp_path / "privacy.json")["clients"]
    assert {client: entry["rounds"] for client, entry in stated.items()} == allowed
    for site in make_sites(config, federation()).sites:
        final = summary["privacy"]["epsilon"]["per_client"][site.name]
        assert final == site.mechanism.epsilon(allowed[site.name], delta) <= target
        assert site.mechanism.epsilon(allowed[site.name] + 1, delta) > target
    assert saved(tmp_path)[1]["round"] == last


def test_a_budget_below_one_round_runs_none(tmp_path):
    summary = run(tiny(**{"privacy.target_epsilon": 0.1}), tmp_path)
    assert summary["rounds"] == 0
    assert summary["privacy"]["epsilon"] == {"max": 0.0, "per_client": {ALDER: 0.0, BIRCH: 0.0}}
    assert charges(tmp_path) == []


# --- compile once


@pytest.mark.slow
@pytest.mark.parametrize(("clients_per_block", "pool"), [(1, "auto"), (2, "auto"), (2, "packed")])
def test_nothing_is_compiled_after_the_first_round(clients_per_block, pool, monkeypatch, tmp_path):
    """Evaluation, checkpoints and the last summary included."""
    compiles, after_first = [], []

    def note(event, *_, **__):
        if "backend_compile" in event:
            compiles.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    monkeypatch.setattr(training, "compile_programs", runs.compile_programs)
    jax.clear_caches()  # else what an earlier test compiled could be used here without a trace
    changes = {"execution.clients_per_block": clients_per_block, "execution.pool": pool}
    changes["eval_every"] = 1

    def reached(name):
        if name == "logged 1":
            after_first.append(len(compiles))

    with runs.moments(tmp_path, reached):
        run(tiny(**changes), tmp_path)
    assert after_first[0] >= 4  # begin, visit, finish and evaluation, and what makes the state
    assert compiles[after_first[0] :] == []
    jax.jit(lambda x: x + len(after_first))(np.ones(3))
    assert len(compiles) > after_first[0]  # the listener still hears


# --- execution never changes a result


@pytest.fixture(scope="module")
def two_devices(compiled, tmp_path_factory):  # noqa: F811
    """The plain run on two devices of another process; slots of a chunk without a client too."""
    folder = tmp_path_factory.mktemp("two") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "tests.runs", str(folder), "", '{"execution.devices": 2}'],
        cwd=runs.ROOT,
        env=runs.subprocess_environment(
            compiled, XLA_FLAGS="--xla_force_host_platform_device_count=2"
        ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def assert_same_result(folder, whole):
    """Equal up to rounding, measured against what training changed."""
    (state, position), (their_state, their_position) = saved(folder), saved(whole)
    start = runs.device(tiny()).state.params
    change = distance(start, their_state["params"])
    assert change > 0.01
    for name in ("params", "averaged_params"):
        assert distance(state[name], their_state[name]) < 1e-4 * change
    assert position["ledger"] == their_position["ledger"]
    mine, theirs = (read_json(f / "summary.json") for f in (folder, whole))
    assert mine["privacy"] == theirs["privacy"]
    for name in ("dice", "jaccard", "accuracy"):
        assert mine["test"][name] == pytest.approx(theirs["test"][name], abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"clients_per_block": 2}, {"microbatch_size": 4}],
    ids=str,
)
def test_the_execution_plan_changes_nothing_but_rounding(changes, plain, tmp_path):
    run(tiny(**{f"execution.{name}": value for name, value in changes.items()}), tmp_path)
    assert_same_result(tmp_path, plain[2])


@pytest.mark.slow
def test_a_second_device_changes_nothing_but_rounding(plain, two_devices):
    assert_same_result(two_devices, plain[2])


@pytest.mark.slow
def test_parameters_of_two_devices_can_be_loaded_on_one(two_devices):
    like = runs.device(tiny(), seed=1).state.params
    loaded = load_params(two_devices / "checkpoints", like)
    assert distance(loaded, saved(two_devices)[0]["averaged_params"]) == 0


@pytest.mark.slow
def test_a_run_of_two_devices_goes_on_on_one(two_devices, plain, tmp_path):
    folder = shutil.copytree(two_devices, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "4")
    (folder / "summary.json").unlink()
    before = charges(folder)
    run(tiny(), folder)
    # Two devices round otherwise, so what is replayed on one is charged again, with other noise.
    assert [(c["round"], c["nonce"]) for c in charges(folder)[len(before) :]] == [(2, 1), (3, 1)]
    theirs = saved(plain[2])[0]["params"]
    change = distance(saved(two_devices)[0]["params"], theirs)
    assert distance(saved(folder)[0]["params"], theirs) > 100 * change


def test_another_result_would_be_noticed(plain, tmp_path):
    run(tiny(**{"privacy.noise_multiplier": 1.001}), tmp_path)
    with pytest.raises(AssertionError):
        assert_same_result(tmp_path, plain[2])


# --- who takes part, and from where


def test_only_who_takes_part_is_charged(tmp_path):
    changes = {"federation.cohort": "fixed", "federation.cohort_size": 1, "federation.rounds": 6}
    summary = run(tiny(**changes), tmp_path)
    clients = [line["clients"] for line in lines(tmp_path)]
    assert [len(members) for members in clients] == [1] * 6
    assert {name for members in clients for name in members} == {ALDER, BIRCH}
    assert [c["clients"] for c in charges(tmp_path)] == clients
    stated = read_json(tmp_path / "privacy.json")["clients"]
    for client, entry in stated.items():
        assert entry["rounds"] == clients.count([client])
    # Who sits out pays nothing: an epsilon moves in its client's rounds alone.
    before = dict.fromkeys((ALDER, BIRCH), 0.0)
    for line in lines(tmp_path):
        now = line["epsilon"]["per_client"]
        assert {client for client in now if now[client] > before[client]} == set(line["clients"])
        before = now
    assert summary["privacy"]["epsilon"]["per_client"] == before


def test_a_poisson_cohort_may_be_empty(tmp_path):
    changes = {
        "federation.cohort": "poisson", "federation.cohort_prob": 0.5, "federation.rounds": 8,
    }  # fmt: skip
    summary = run(tiny(**changes), tmp_path)
    sizes = [len(line["clients"]) for line in lines(tmp_path)]
    assert set(sizes) == {0, 1, 2}  # of seed 0
    assert summary["rounds"] == 8
    stated = read_json(tmp_path / "privacy.json")["clients"]
    assert sum(entry["rounds"] for entry in stated.values()) == sum(sizes)
    empty = lines(tmp_path)[sizes.index(0)]["nonprivate"]
    assert (empty["units"], empty["tiles"], empty["update_norm"]) == (0, 0, {})


def test_pooled_training_from_a_finished_run(plain, tmp_path):
    """One client with all patients, which starts from the averaged parameters of another run."""
    changes = {
        "federation.pooled": True, "federation.rounds": 1, "federation.weights": "uniform",
        "model.init_from": str(plain[2]),
        "privacy.expected_batch_size": 0.5,  # as many slots as the two sites have: one program
    }  # fmt: skip
    config = tiny(**changes)
    summary = run(config, tmp_path, experiment="centralized")
    assert summary["experiment"] == "centralized"
    assert list(summary["privacy"]["epsilon"]["per_client"]) == [POOLED]
    entry = read_json(tmp_path / "privacy.json")["clients"][POOLED]
    assert entry["mechanism"]["num_units"] == 6 + 4
    assert set(summary["test"]["per_site"]) == {ALDER, BIRCH}  # measured site by site all the same
    first, last = (read_lines(f / "metrics.jsonl") for f in (tmp_path, plain[2]))
    assert first[0]["nonprivate"]["validation"] == last[-1]["nonprivate"]["validation"]
    (note,) = (n for n in read_json(tmp_path / "privacy.json")["not_accounted"] if "started" in n)
    assert str(plain[2]) in note


def test_weights_are_units_or_uniform():
    for weights, expected in (("units", [6.0, 4.0]), ("uniform", [1.0, 1.0])):
        made = make_sites(tiny(**{"federation.weights": weights}), federation())
        assert [site.weight for site in made.sites] == expected
    with pytest.raises(ValueError, match=r"federation.weights 'units', .*, got 'tiles'"):
        make_sites(tiny(**{"federation.weights": "tiles"}), federation())


# --- numbers that are none


def test_a_message_that_is_not_finite_is_an_error(tmp_path):
    """The first server step ends far out, where the next gradient is NaN."""
    config = tiny(
        **{
            "privacy.placement": "none", "privacy.noise_multiplier": 0.0, "checkpoint_every": 1,
            "federation.server_optimizer": "sgd", "federation.server_learning_rate": 1e30,
            "federation.server_momentum": 0.0,
        }
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"Round 2: the message of client '(alder|birch)'"):
        run(config, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    like = runs.device(config).state
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state, position = checkpoints.restore(like)
    checkpoints.close()
    assert position.round == 1
    assert Ledger.from_json(position.ledger).counts == {ALDER: 1, BIRCH: 1}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))


def test_a_server_that_is_not_finite_is_an_error(tmp_path):
    """Messages of a private client are finite whatever the parameters: its noise is."""
    changes = {
        "checkpoint_every": 1, "federation.server_optimizer": "sgd",
        "federation.server_learning_rate": 3e38, "federation.server_momentum": 0.9,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=r"Round 2: the server's parameters are not finite"):
        run(tiny(**changes), tmp_path)
    assert not (tmp_path / "summary.json").exists()


# --- refusals, before anything is run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy.placement": "dpsgd"}, "placement.*'dpsgd'"),
        ({"privacy.unit": "person"}, "unit.*'person'"),
        ({"privacy.noise_multiplier": 0.0}, "target_epsilon"),
        ({"privacy.l2_clip_norm": 0.0}, "l2_clip_norm > 0"),
        ({"privacy.target_delta": 0.0}, "target_delta"),
        ({"federation.rounds": 0}, "rounds >= 1"),
        ({"federation.local_steps": 0}, "local_steps >= 1"),
        ({"federation.server_optimizer": "adamn"}, "'adamn'"),
        ({"federation.server_schedule": "step"}, "server_schedule.*'step'"),
        ({"federation.ema_decay": 1.0}, "ema_decay"),
        ({"federation.cohort": "some"}, "'some'"),
        ({"federation.cohort": "fixed"}, "'fixed'"),
        ({"federation.cohort": "fixed", "federation.cohort_size": 3}, "size=3"),
        ({"execution.devices": 64}, "execution.devices"),
        ({"execution.microbatch_size": -1}, "microbatch_size >= 1"),
        ({"execution.clients_per_block": 0}, "clients_per_block >= 1"),
        ({"execution.pool": "disk"}, "execution.pool.*'disk'"),
        ({"eval_every": 0}, "eval_every >= 1"),
        ({"checkpoint_every": 0}, "checkpoint_every >= 1"),
        ({"model.init_from": "nowhere"}, "init_from.*nowhere"),
    ],
    ids=str,
)
def test_a_mistake_is_named_and_claims_no_workdir(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
        run(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    assert not (tmp_path / "run" / "charges.jsonl").exists()
    assert not (tmp_path / "nowhere").exists()


def test_another_network_is_refused_as_a_start(plain, tmp_path):
    changes = {"model.base_channels": 4, "model.init_from": str(plain[2])}
    with pytest.raises(ValueError, match=r"another network.*base_channels"):
        run(tiny(**changes), tmp_path / "run")


def test_a_workdir_of_another_configuration_is_refused(plain, tmp_path):
    folder = shutil.copytree(plain[2], tmp_path / "run")
    with pytest.raises(ValueError, match=r"privacy.noise_multiplier: 1.0 there, 2.0 now"):
        run(tiny(**{"privacy.noise_multiplier": 2.0}), folder)
    with pytest.raises(ValueError, match="experiment: 'feddp' there, 'other' now"):
        run(tiny(), folder, experiment="other")
    assert run(tiny(**{"execution.microbatch_size": 7, "eval_every": 1}), folder) == plain[1]
    assert results.finished(tmp_path) is None
