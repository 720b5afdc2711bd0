"""Contract of the choice of an execution plan: measured once, remembered, and never of results."""

import copy
import json

import pytest

from fedjax_dp.assembly import tuning
from fedjax_dp.assembly.programs import make_model
from fedjax_dp.assembly.sites import make_sites
from fedjax_dp.assembly.tuning import Plan, candidates, choose, remember, with_plan
from tests import runs
from tests.oracles import distance
from tests.runs import compiled, federation, no_pictures, read_json, run, tiny  # noqa: F401


def sites(config):
    dimension = make_model(config, len(federation().class_names)).dimension
    return make_sites(config, federation(), dimension=dimension)


class Clock:
    """Seconds by microbatch size, without running anything; counts the calls."""

    def __init__(self, seconds):
        self.seconds, self.compiled, self.called = seconds, [], []

    def __call__(self, config, tiles, made):
        execution = config.execution
        plan = execution.microbatch_size, execution.conv_variant
        self.compiled.append(plan)
        seconds = self.seconds[plan]
        if isinstance(seconds, Exception):
            raise seconds

        def one_round():
            self.called.append(plan)
            return seconds

        return one_round


SECONDS = {(1, "matmul"): 3.0, (2, "matmul"): 2.0, (8, "matmul"): 5.0, (8, "canonical"): 2.5}


def chosen(config=None, seconds=SECONDS, **kwargs):
    config, clock = config or tiny(), Clock(seconds)
    return choose(config, federation(), sites(config), clock=clock, **kwargs), clock


def test_the_fastest_is_chosen_and_the_hopeless_are_timed_once():
    choice, clock = chosen()
    assert choice.plan == Plan(1, 2, "matmul")
    assert set(choice.seconds.values()) == {3.0, 2.0, 5.0, 2.5}
    assert clock.called.count((8, "matmul")) == 1
    assert clock.called.count((2, "matmul")) == clock.called.count((1, "matmul")) == 3


def test_a_plan_that_does_not_run_is_passed_over():
    out_of_memory = RuntimeError("RESOURCE_EXHAUSTED")
    choice, _ = chosen(seconds=SECONDS | {(2, "matmul"): out_of_memory})
    assert choice.plan == Plan(1, 8, "canonical")
    assert "1 client x 2 units, matmul: RESOURCE_EXHAUSTED" in tuning.describe(choice)
    with pytest.raises(RuntimeError, match=r"No execution plan runs here.*RESOURCE_EXHAUSTED"):
        chosen(seconds=dict.fromkeys(SECONDS, out_of_memory))


def test_what_is_set_is_kept():
    config = tiny(**{"execution.microbatch_size": 4, "execution.conv_variant": "canonical"})
    assert candidates(config, "cpu", 9) == (Plan(1, 4, "canonical"),)
    choice, clock = chosen(config)
    assert (choice.plan, clock.compiled) == (Plan(1, 4, "canonical"), [])  # nothing to choose


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_plans_are_few_and_no_two_are_alike(backend):
    plans = candidates(tiny(), backend, 9)
    assert 2 <= len(plans) == len(set(plans)) <= 10
    if backend == "cpu":  # grouped convolutions
        assert {plan.clients_per_block for plan in plans} == {1}
    else:
        assert plans[0] == Plan(1, 32, "xla")


def test_a_choice_is_remembered_for_the_same_network_shapes_and_machine(tmp_path):
    own, cache = tmp_path / "run" / "plan.json", tmp_path / "cache" / "plan.json"
    choice, _ = chosen()
    remember(choice, [cache])
    other = tiny(**{"model.base_channels": 16})
    remember(chosen(other, SECONDS | {(8, "matmul"): 0.1})[0], [cache])
    for config, plan in ((tiny(), choice.plan), (other, Plan(1, 8, "matmul"))):
        again, clock = chosen(config, remembered=[own, cache])
        assert (again.plan, clock.compiled) == (plan, [])
    longer, clock = chosen(tiny(**{"privacy.expected_batch_size": 5.0}), remembered=[own, cache])
    assert clock.compiled
    assert longer.key != choice.key
    remember(choice._replace(plan=Plan(1, 8, "canonical")), [own])
    assert chosen(remembered=[own, cache])[0].plan == Plan(1, 8, "canonical")  # the run's own first


@pytest.mark.parametrize("text", ["", "{", "[]", '{"KEY": {"microbatch_size": 3}}'])
def test_a_damaged_memory_is_no_memory(text, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text.replace("KEY", chosen()[0].key))
    choice, clock = chosen(remembered=[path])
    assert (choice.plan, len(clock.compiled)) == (Plan(1, 2, "matmul"), 4)
    remember(choice, [path])
    assert json.loads(path.read_text())[choice.key] == choice.plan._asdict()


def test_the_configuration_stays_as_it_is():
    config = tiny()
    before = copy.deepcopy(config)
    planned = with_plan(config, Plan(2, 3, "canonical"))
    assert config == before
    assert planned.execution.microbatch_size == 3
    assert planned.privacy is config.privacy


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_the_clock_runs_what_a_client_does():
    config = with_plan(tiny(), Plan(1, 2, "matmul"))
    run_one = tuning._client_round(config, federation(), sites(config))
    assert 0 < run_one() < 60
    assert run_one() > 0  # its accumulator was not given away


@pytest.mark.slow
@pytest.mark.usefixtures("compiled", "no_pictures")
def test_a_run_chooses_once_says_so_and_ends_alike(tmp_path, capsys, monkeypatch):
    clock = Clock(SECONDS)
    monkeypatch.setattr(tuning, "_client_round", clock)
    config = tiny(**{"execution.auto": True, "federation.rounds": 2})
    before = copy.deepcopy(config)
    run(config, tmp_path / "auto", progress=True)
    assert config == before
    assert "Execution plan: 1 client x 2 units, matmul" in capsys.readouterr().out
    assert list(read_json(tmp_path / "auto" / "plan.json").values()) == [
        Plan(1, 2, "matmul")._asdict()
    ]
    # Going on, it is not timed again.
    longer = len(clock.compiled)
    with pytest.raises(ValueError, match="rounds"):  # another configuration is another run
        run(tiny(**{"execution.auto": True, "federation.rounds": 3}), tmp_path / "auto")
    (tmp_path / "auto" / "summary.json").unlink()
    run(config, tmp_path / "auto", progress=True)
    assert len(clock.compiled) == longer
    assert "remembered" in capsys.readouterr().out

    run(tiny(**{"federation.rounds": 2}), tmp_path / "plain")
    start = runs.device(tiny()).state.params
    auto, plain = (runs.saved(tmp_path / name)[0]["params"] for name in ("auto", "plain"))
    assert distance(auto, plain) <= 1e-4 * distance(plain, start)
