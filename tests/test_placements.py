"""Whole runs at every placement: they end, are stated, go on after a kill, refuse mistakes."""

import dataclasses
import functools
import math
from unittest import mock

import jax
import numpy as np
import pytest

from fedjax_dp import training
from fedjax_dp.assembly.programs import compile_programs, examples, make_model
from fedjax_dp.assembly.sites import Sites, make_sites
from fedjax_dp.config import by_site
from fedjax_dp.federated.rounds import RoundMaker
from fedjax_dp.privacy.ledger import ChargeLog
from fedjax_dp.privacy.secrets import DistinctDerivations, Secrets
from fedjax_dp.privacy.statement import recompute_epsilon
from fedjax_dp.reporting.log import read_lines
from tests import runs
from tests.oracles import distance, flat
from tests.runs import (
    ALDER,
    BIRCH,
    charges,
    compiled,  # noqa: F401
    federation,
    no_pictures,  # noqa: F401
    read_json,
    run,
    run_with_crashes,
    saved,
    tiny,
)

pytestmark = pytest.mark.usefixtures("compiled", "no_pictures")

ROUNDS = 4


def privacy(**settings):
    """Changes for `tiny`, of `config.privacy`."""
    return {f"privacy.{name}": value for name, value in settings.items()}


POISSON = {"federation.cohort": "poisson", "federation.cohort_prob": 0.5}
# The number of units is private there: nothing may follow it.
PRIVATE_SIZES = privacy(relation="add_or_remove", sampling_prob=0.5, nominal_num_units=5) | {
    "federation.weights": "uniform"
}
# Few patients are counted, so little noise on their sum can be had.
ADAPTIVE = privacy(adaptive_clip=True, noise_multiplier=0.18)

CASES = {
    "update": privacy(placement="update") | {"federation.weights": "inverse_variance"},
    "update_unclipped": privacy(placement="update_unclipped", target_epsilon=8.0),
    "distributed": privacy(placement="distributed"),
    "discrete": privacy(placement="distributed", noise="discrete_gaussian"),
    "central": privacy(placement="central") | POISSON,
    "dp_sgd_adaptive": ADAPTIVE | {"federation.local_steps": 2},
    "distributed_adaptive": privacy(placement="distributed") | ADAPTIVE,
    "central_adaptive": privacy(placement="central", adaptive_clip=True, noise_multiplier=0.09)
    | POISSON,
    "dp_sgd_private_sizes": PRIVATE_SIZES,
    "distributed_private_sizes": privacy(placement="distributed") | PRIVATE_SIZES,
}
FAST = ("distributed", "central", "distributed_adaptive")


def marked(names):
    """Parameters, slow but for the placements that others are variants of."""
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


# What a kill leaves behind must be enough for each kind of state and randomness.
KILLED = ("distributed", "discrete", "central", "dp_sgd_adaptive", "distributed_adaptive")
MOMENTS = {
    "visited 1": 2,  # in the middle of the first round, with the second charged
    "logged 3": 4,  # the log is ahead of the checkpoint, and the charges of both
    "after checkpoints/2": 0,
}


@functools.cache
def _run_of(name, folder):
    moments = MOMENTS if name in KILLED else {}
    return run_with_crashes(tiny(**CASES[name]), folder / "run", moments, folder / "copies")


@pytest.fixture(scope="module")
def run_of(compiled, no_pictures, tmp_path_factory):  # noqa: F811
    """`run_of(case)`: summary, workdir and its copies at `MOMENTS`; each is run once."""
    base = tmp_path_factory.mktemp("placements")

    def make(name):
        summary, crashed = _run_of(name, base / name)
        return summary, base / name / "run", crashed

    return make


def lines(folder):
    return read_lines(folder / "metrics.jsonl")[1:]


# --- every placement


@pytest.mark.parametrize("name", marked(CASES))
def test_a_run_finishes_and_states_what_it_spent(run_of, name):
    summary, folder, _ = run_of(name)
    config = tiny(**CASES[name])
    assert summary["finished"]
    assert summary["rounds"] == ROUNDS
    assert summary["privacy"]["placement"] == config.privacy.placement
    # All are charged in every round, whoever is drawn.
    assert [c["clients"] for c in charges(folder)] == [[ALDER, BIRCH]] * ROUNDS
    assert [line["clients"] for line in lines(folder)] == [[ALDER, BIRCH]] * ROUNDS
    stated = read_json(folder / "privacy.json")
    found, spent = recompute_epsilon(stated), summary["privacy"]["epsilon"]["per_client"]
    if config.privacy.placement == "update_unclipped":
        assert set(spent.values()) == {"infinity"}
        assert set(found.values()) == {math.inf}
        assert summary["privacy"]["is_private"] is False
    else:
        assert found == pytest.approx(spent)
        assert all(0 < epsilon < 1000 for epsilon in spent.values())
    for site in made_sites(config):
        entry = stated["clients"][site.name]
        assert entry["rounds"] == ROUNDS
        assert entry["mechanism"] == site.mechanism.descriptor()
    state, position = saved(folder)
    assert position["round"] == state["round"] == ROUNDS
    assert distance(state["params"], runs.device(config).state.params) > 0.01


def made_sites(config):
    dimension = make_model(config, len(federation().class_names)).dimension
    return make_sites(config, federation(), dimension=dimension).sites


@pytest.mark.parametrize("name", marked(name for name in CASES if "adaptive" in name))
def test_the_clip_norms_are_kept_and_have_moved(run_of, name):
    scale = saved(run_of(name)[1])[0]["clip_scale"]
    assert scale.shape == (2,)
    assert (np.abs(np.log(scale)) > 1e-4).all()
    is_common = CASES[name].get("privacy.placement") is not None
    assert (scale[0] == scale[1]) == is_common


def test_a_fixed_clip_norm_leaves_no_scale(run_of):
    assert saved(run_of("distributed")[1])[0]["clip_scale"] in ((), None, [])


def test_who_was_drawn_by_a_trusted_server_is_nowhere_but_under_nonprivate(run_of):
    _, folder, _ = run_of("central")
    drawn = [set(line["nonprivate"]["update_norm"]) for line in lines(folder)]
    assert any(names != {ALDER, BIRCH} for names in drawn)
    for line in lines(folder):
        assert set(line) == {"round", "epsilon", "clients", "left", "dropped", "nonprivate"}
        assert set(line["epsilon"]["per_client"]) == {ALDER, BIRCH}
    for number, line in enumerate(lines(folder), start=1):
        for site in made_sites(tiny(**CASES["central"])):
            expected = site.mechanism.epsilon(number, 1e-5)
            assert line["epsilon"]["per_client"][site.name] == pytest.approx(expected)


# --- killed and resumed


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", marked(KILLED))
def test_a_killed_run_goes_on_to_the_same_end(run_of, name, moment):
    """Masks, integer noise, cohorts, the server's noise and clip norms are those of the first."""
    _, whole, crashed = run_of(name)
    assert not (crashed[moment] / "summary.json").exists()
    run(tiny(**CASES[name]), crashed[moment])
    runs.assert_same_end(crashed[moment], whole)
    assert "adaptive" not in name or saved(whole)[0]["clip_scale"].shape == (2,)


@pytest.mark.parametrize("name", ["distributed", "central"])
def test_another_seed_ends_elsewhere(run_of, name, tmp_path):
    run(tiny(**CASES[name], seed=1), tmp_path / "run")
    with pytest.raises(AssertionError):
        runs.assert_same_end(tmp_path / "run", run_of(name)[1])


# --- compile once


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distributed_adaptive", "discrete", "central_adaptive"])
def test_nothing_is_compiled_after_the_first_round(name, monkeypatch, tmp_path):
    """Empty cohorts, lost clients and clip norms that move included."""
    compiles, after_first = [], []

    def note(event, *_, **__):
        if "backend_compile" in event:
            compiles.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    monkeypatch.setattr(training, "compile_programs", runs.compile_programs)
    jax.clear_caches()  # else what an earlier test compiled could be used here without a trace

    def reached(moment):
        if moment == "logged 1":
            after_first.append(len(compiles))

    lost = {"federation.dropout_prob": 0.3} if name != "central_adaptive" else {}
    with runs.moments(tmp_path, reached):
        run(tiny(**CASES[name], **lost, eval_every=1), tmp_path)
    assert after_first[0] >= 4
    assert compiles[after_first[0] :] == []


# --- all placements take the same step where there is hardly any noise


@functools.cache
def endpoint(name, **changes):
    """Parameters after two rounds of the device programs, all with the same draws."""
    common = {
        "federation.server_optimizer": "sgd", "federation.server_learning_rate": 0.5,
        "federation.server_momentum": 0.0, "federation.ema_decay": 0.0,
    } | privacy(sampling_prob=0.5, l2_clip_norm=0.5, noise_multiplier=1e-6)  # fmt: skip
    config = tiny(**common | CLEAR[name] | changes)
    device, sites = runs.device(config), made_sites(config)
    chunk, release = examples(device, Sites(sites, "", "", ()), 1)
    programs = compile_programs(config, device, chunk, release)
    recorder, state = DistinctDerivations(), device.state
    with mock.MagicMock(spec=ChargeLog) as log:
        log.would_exceed.return_value, log.charge.return_value = (), 0
        maker = RoundMaker(
            sites=sites, secrets=Secrets.from_seed([ALDER, BIRCH], 0, recorder=recorder),
            charges=log, limits={}, environment="", context=b"the same for all",
            clients_per_chunk=1, num_words=device.num_words,
        )  # fmt: skip
        for index in range(2):
            acc, made = programs.begin(state), maker.make(index)
            for prepared in made.chunks:
                acc, _, _ = programs.visit(acc, state, prepared.chunk)
            state = programs.finish(state, acc, made.release())
    return flat(state.params) - flat(device.state.params)


CLEAR = {
    "none": privacy(placement="none", noise_multiplier=0.0),
    "dp_sgd": {},
    "update": privacy(placement="update"),
    "update_unclipped": privacy(placement="update_unclipped"),
    "central": privacy(placement="central"),
    "distributed": privacy(placement="distributed"),
    "discrete": privacy(placement="distributed", noise="discrete_gaussian"),
}
WIDE = privacy(l2_clip_norm=8.0, noise_multiplier=1e-8)  # clips nothing, and is lost in rounding


@pytest.mark.parametrize("name", marked(name for name in CLEAR if name != "none"))
def test_without_clip_and_noise_every_placement_is_federated_averaging(name):
    """Weights, divisors, signs and scales agree: sum n_k (g_k / (q n_k)) = sum g / (q n)."""
    expected = endpoint("none")
    found = endpoint(name, **WIDE)
    assert np.linalg.norm(expected) > 0.05
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", marked(["distributed", "discrete"]))
def test_shares_clip_as_dp_sgd_does(name):
    expected, found = endpoint("dp_sgd"), endpoint(name)
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)
    clipped = np.linalg.norm(endpoint("none") - expected)
    assert clipped > 0.05 * np.linalg.norm(expected)  # the clip did something


# --- clients that are lost


def test_rounds_that_lose_a_client_of_two_change_nothing_and_are_charged(tmp_path):
    """With nobody to spare every loss aborts: charged, nothing opened, and the run goes on."""
    changes = CASES["distributed"] | {"federation.dropout_prob": 0.98, "checkpoint_every": 1}
    config = tiny(**changes)
    summary = run(config, tmp_path)
    assert summary["rounds"] == ROUNDS
    assert [len(line["dropped"]) > 0 for line in lines(tmp_path)] == [True] * ROUNDS
    assert [c["clients"] for c in charges(tmp_path)] == [[ALDER, BIRCH]] * ROUNDS
    state, position = saved(tmp_path)
    start = runs.device(config).state.params
    assert distance(state["params"], start) == 0
    assert distance(state["averaged_params"], start) == 0
    assert (position["round"], state["round"]) == (ROUNDS, 0)
    for site in made_sites(config):
        spent = summary["privacy"]["epsilon"]["per_client"][site.name]
        assert spent == pytest.approx(site.mechanism.epsilon(ROUNDS, 1e-5))


def test_a_run_with_lost_rounds_goes_on_to_the_same_end(tmp_path, capsys):
    changes = CASES["distributed"] | {"federation.dropout_prob": 0.4, "federation.rounds": 6}
    folder = tmp_path / "run"
    _, crashed = run_with_crashes(tiny(**changes), folder, {"logged 3": 4}, tmp_path / "copies")
    dropped = [len(line["dropped"]) for line in lines(folder)]
    assert 0 in dropped
    assert max(dropped) > 0
    assert saved(folder)[0]["round"] == dropped.count(0)
    assert capsys.readouterr().out == ""  # nothing is printed without progress
    run(tiny(**changes), crashed["logged 3"])
    runs.assert_same_end(crashed["logged 3"], folder)
    assert [len(line["dropped"]) for line in lines(crashed["logged 3"])] == dropped


@functools.cache
def three_sites():
    """The same patients at three hospitals: one of them may be lost."""
    made = federation()
    patients = list(dict.fromkeys(made.train.patient.tolist()))
    site = np.array([patients.index(p) * 3 // len(patients) for p in made.train.patient.tolist()])
    train = dataclasses.replace(
        made.train, site=site.astype(np.int32), sites=(ALDER, BIRCH, "cedar")
    )
    return dataclasses.replace(made, train=train, sources=())


def test_a_client_to_spare_may_be_lost_and_the_sum_is_opened(tmp_path):
    changes = CASES["distributed"] | privacy(max_dropouts=1) | {"federation.dropout_prob": 0.3}
    config = tiny(**changes, **{"federation.rounds": 16})
    summary = training.run(config, tmp_path, federation=three_sites(), progress=False)
    assert summary["rounds"] == 16
    dropped = [len(line["dropped"]) for line in lines(tmp_path)]
    assert {0, 1} <= set(dropped)
    assert saved(tmp_path)[0]["round"] == sum(lost <= 1 for lost in dropped)
    stated = read_json(tmp_path / "privacy.json")
    assert recompute_epsilon(stated) == pytest.approx(summary["privacy"]["epsilon"]["per_client"])


# --- budgets of their own


def rounds_within(mechanism, target):
    """Counted one by one, up to four."""
    return sum(mechanism.epsilon(rounds, 1e-5) <= target for rounds in range(1, ROUNDS + 1))


@pytest.mark.parametrize(
    ("placement", "first"), [("dp_sgd", BIRCH), ("central", ALDER), ("distributed", BIRCH)]
)
def test_a_site_leaves_when_its_budget_is_spent(placement, first, tmp_path):
    """And the others go on: but for "distributed", where one cannot share with itself."""
    changes = privacy(placement=placement)
    mechanisms = {site.name: site.mechanism for site in made_sites(tiny(**changes))}
    target = mechanisms[first].epsilon(2, 1e-5) * 1.001
    within = {name: rounds_within(mechanism, target) for name, mechanism in mechanisms.items()}
    other = ALDER if first == BIRCH else BIRCH
    assert within[first] == 2 < within[other]
    summary = run(tiny(**changes, **privacy(target_epsilon=target)), tmp_path)
    last = 2 if placement == "distributed" else within[other]
    assert summary["rounds"] == last
    left = [[], [], [first], [first]]
    assert [line["left"] for line in lines(tmp_path)] == left[:last]
    spent = summary["privacy"]["epsilon"]["per_client"]
    assert 0.9 * target < spent[first] <= target
    counts = read_json(tmp_path / "privacy.json")["clients"]
    assert (counts[first]["rounds"], counts[other]["rounds"]) == (2, last)


def test_a_site_with_a_budget_of_its_own_leaves_for_it(tmp_path):
    """Rounds run again on another machine are paid for twice: one site cannot, the other can."""
    config = tiny(**privacy(target_epsilon=20.0, target_epsilon_by_site=f"{BIRCH}=4"))
    names = {"visited 5": ROUNDS}  # in the third round, with the fourth charged ahead
    _, crashed = run_with_crashes(config, tmp_path / "run", names, tmp_path / "copies")
    folder = crashed["visited 5"]
    config.execution.microbatch_size = 4
    summary = run(config, folder)
    assert summary["rounds"] == ROUNDS
    assert [line["left"] for line in lines(folder)] == [[], [], [BIRCH], [BIRCH]]
    counts = read_json(folder / "privacy.json")["clients"]
    assert (counts[ALDER]["rounds"], counts[BIRCH]["rounds"]) == (ROUNDS + 2, ROUNDS)
    spent = summary["privacy"]["epsilon"]["per_client"]
    assert 3.5 < spent[BIRCH] <= 4.0 < spent[ALDER] <= 20.0


@pytest.mark.slow
def test_each_budget_is_calibrated_and_kept(tmp_path):
    changes = privacy(noise_multiplier=0.0, target_epsilon=8.0, target_epsilon_by_site=f"{BIRCH}=4")
    summary = run(tiny(**changes), tmp_path)
    spent = summary["privacy"]["epsilon"]["per_client"]
    assert summary["rounds"] == ROUNDS
    assert 7.5 < spent[ALDER] <= 8.0
    assert 3.7 < spent[BIRCH] <= 4.0
    sites = Sites(made_sites(tiny(**changes)), "", "", ())
    assert training._limits(tiny(**changes), sites) == {ALDER: ROUNDS, BIRCH: ROUNDS}


def test_sites_have_noise_and_sampling_of_their_own():
    config = tiny(
        **privacy(noise_multiplier_by_site=f"{BIRCH}=3", sampling_prob_by_site=f"{ALDER}=0.25")
    )
    alder, birch = (site.mechanism for site in made_sites(config))
    assert (alder.noise_multiplier, birch.noise_multiplier) == (1.0, 3.0)
    assert (alder.sampling_prob, birch.sampling_prob) == (0.25, 3 / 4)


def test_weights_by_precision_follow_the_noise_on_a_delta():
    config = tiny(
        **privacy(noise_multiplier_by_site=f"{BIRCH}=2"),
        **{"federation.weights": "inverse_variance"},
    )
    alder, birch = made_sites(config)
    assert alder.weight / birch.weight == pytest.approx(4.0)  # both draw 3 units a step


# --- refusals, before anything is run

DISTRIBUTED, CENTRAL = privacy(placement="distributed"), privacy(placement="central")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            DISTRIBUTED | {"federation.cohort": "fixed", "federation.cohort_size": 1},
            r"federation.cohort in \('all',\) for placement distributed, got 'fixed'",
        ),
        (DISTRIBUTED | POISSON, "for placement distributed, got 'poisson'"),
        (
            CENTRAL | {"federation.cohort": "fixed", "federation.cohort_size": 1},
            r"\('all', 'poisson'\) for placement central, got 'fixed'",
        ),
        # A probability that nobody is drawn with would be accounted.
        (CENTRAL | {"federation.cohort_prob": 0.5}, '`prob` with mode "poisson" alone'),
        (
            PRIVATE_SIZES | {"federation.weights": "units"},
            "weights 'uniform' under the relation add_or_remove, got 'units'",
        ),
        (PRIVATE_SIZES | privacy(nominal_num_units=0), "sampling_prob and nominal_num_units"),
        (PRIVATE_SIZES | privacy(sampling_prob=0.0), "sampling_prob and nominal_num_units"),
        (PRIVATE_SIZES | privacy(placement="update"), "relation zero_out for placement update"),
        (
            CENTRAL | {"federation.weights": "inverse_variance"},
            "placement central, got 'inverse_variance': no delta there has noise",
        ),
        (DISTRIBUTED | {"federation.weights": "inverse_variance"}, "placement distributed, got"),
        ({"federation.dropout_prob": 0.1}, "0 without placement distributed, got 0.1"),
        (CENTRAL | {"federation.dropout_prob": 0.1}, "dropout_prob"),
        (DISTRIBUTED | {"federation.dropout_prob": 1.0}, "dropout_prob < 1"),
        (DISTRIBUTED | {"federation.local_steps": 2}, "local_steps 1 for placement distributed"),
        (DISTRIBUTED | privacy(max_dropouts=1), "more than twice max_dropouts"),
        (privacy(max_dropouts=1), 'They belong to placement "distributed"'),
        (privacy(noise="discrete_gaussian"), 'They belong to placement "distributed"'),
        (DISTRIBUTED | {"federation.pooled": True}, "at least 2 sites"),
        (privacy(sampling_prob_by_site="elm=0.5"), r"budgets of training sites .*'elm'"),
        (privacy(target_epsilon_by_site="elm=5"), r"budgets of training sites .*'elm'"),
        (privacy(target_epsilon_by_site="alder"), "target_epsilon_by_site like site=4"),
        (
            privacy(noise_multiplier_by_site="alder=x"),
            "noise_multiplier_by_site like.*at 'alder=x'",
        ),
        (privacy(sampling_prob_by_site="alder=.5,alder=.5"), "sampling_prob_by_site like"),
        (privacy(sampling_prob_by_site="=0.5"), "sampling_prob_by_site like"),
        (privacy(sampling_prob_by_site="alder=nan"), "sampling_prob_by_site like"),
        (
            privacy(sampling_prob_by_site="alder=1.5"),
            "client='alder', got 1.5",
        ),
        (DISTRIBUTED | privacy(noise_multiplier_by_site="alder=2"), "share the noise of one sum"),
        (CENTRAL | privacy(noise_multiplier_by_site="alder=2"), "share the noise of one sum"),
        (privacy(adaptive_clip=True), "alder: Adaptive clipping needs.*draw more units"),
        (CENTRAL | privacy(adaptive_clip=True), "alder: Adaptive clipping needs"),
        (privacy(placement="update") | ADAPTIVE, "Fix the clip norm"),
        (CASES["discrete"] | ADAPTIVE, "Fix the clip norm"),
        (ADAPTIVE | privacy(clip_quantile=1.0), "clip_quantile < 1"),
        (ADAPTIVE | privacy(clip_learning_rate=0.0), "clip_learning_rate > 0"),
        (
            privacy(placement="update_unclipped", noise_multiplier=0.0, target_epsilon=8.0),
            "no noise gives an epsilon",
        ),
    ],
    ids=str,
)
def test_a_mistake_is_named_and_claims_no_workdir(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        run(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    assert not (tmp_path / "run" / "charges.jsonl").exists()


def test_numbers_by_site_are_read():
    assert by_site("", "x") == {}
    assert by_site(" a = 4, b=0.5 ,", "x") == {"a": 4.0, "b": 0.5}
    assert by_site("a=b=4", "x") == {"a=b": 4.0}  # a name may hold what a number cannot
