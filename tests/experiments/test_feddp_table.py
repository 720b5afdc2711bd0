"""The paper's comparison, small: its rows, its figures, and that it goes on."""

import json
import math

import numpy as np
import pytest

from experiments import feddp_table_report, feddp_table_runs, report_content
from experiments.feddp_table_runs import BASELINE, Options
from fedjax_dp import training
from fedjax_dp.config import Config, DataConfig, FederationConfig, ModelConfig, PrivacyConfig
from fedjax_dp.results import load_image_counts
from fedjax_dp.segmentation import intervals
from tests import runs
from tests.runs import no_pictures  # noqa: F401

CONFIG = Config(
    data=DataConfig(tile_size=32),
    model=ModelConfig(base_channels=8, depth=1),
    privacy=PrivacyConfig(unit="tile", l2_clip_norm=0.5, target_delta=1e-2),
    federation=FederationConfig(rounds=2),
    seed=0,
    eval_every=2,
    checkpoint_every=2,
)
OPTIONS = Options(
    seeds=(0, 1), epsilons=(8.0,), tiles_per_round=8, fedavg_steps=2,
    rows=(BASELINE, "distributed-8", "alone"),
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feddp_table_runs, "load_federation", lambda *_, **__: runs.federation())
        rows = feddp_table_runs.rows(CONFIG, OPTIONS, folder, train=True)
        yield folder, rows


def test_rows_have_the_same_rounds_and_expected_tiles():
    planned = {
        row.name: row.config
        for row in feddp_table_runs.plan(CONFIG, Options(tiles_per_round=8, fedavg_steps=2),
                                         runs.federation())
    }  # fmt: skip
    units = len(runs.federation().train)
    assert list(planned)[:3] == [BASELINE, "distributed-8", "dp_sgd-8"]
    assert {"update-3", "update_unclipped", "centralised", "alone"} < set(planned)
    assert {config.federation.rounds for config in planned.values()} == {2}
    for name in (BASELINE, "dp_sgd-8", "update-8"):
        privacy, steps = planned[name].privacy, planned[name].federation.local_steps
        assert privacy.expected_batch_size * steps * 2 == pytest.approx(8)  # two sites
    assert planned["distributed-8"].privacy.sampling_prob * units == pytest.approx(8)
    pooled = planned["centralised"]
    assert pooled.privacy.expected_batch_size * pooled.federation.local_steps == pytest.approx(8)
    assert planned["update_unclipped"].privacy.noise_multiplier > 0


def test_a_row_that_is_none_is_refused():
    with pytest.raises(ValueError, match="--rows among"):
        feddp_table_runs.plan(CONFIG, Options(rows=("fedprox",), tiles_per_round=8,
                                              fedavg_steps=2), runs.federation())  # fmt: skip
    with pytest.raises(ValueError, match="--tiles_per_round"):
        feddp_table_runs.plan(CONFIG, Options(tiles_per_round=2), runs.federation())


def test_the_table_holds_what_the_runs_hold(trained):
    _, rows = trained
    report = feddp_table_report.collect(rows, resamples=20)
    assert report["missing"] == {}
    test = report["splits"]["test"]["rows"]
    folders = {row.name: row.folders for row in rows}
    for name in (BASELINE, "distributed-8"):
        for seed, (where,) in folders[name].items():
            summary = json.loads((where / "summary.json").read_text())["test"]
            assert test[name]["seeds"][str(seed)]["dice"] == pytest.approx(summary["dice"])
    each = [test[name]["mean"]["dice"] for name in (BASELINE, "distributed-8")]
    change = test["distributed-8"]["difference"]["points"]
    assert change["mean"]["dice"] == pytest.approx(each[1] - each[0])
    assert change["low"]["dice"] <= change["mean"]["dice"] <= change["high"]["dice"]
    privacy = report["rows"]["distributed-8"]
    assert 7.5 < privacy["tile_epsilon"] <= 8.0
    assert privacy["all_seeds_epsilon"] > privacy["tile_epsilon"]  # two seeds cost more than one
    assert privacy["patient_epsilon"] is None or privacy["patient_epsilon"] > 8
    assert report["rows"][BASELINE]["tile_epsilon"] == math.inf
    assert len(privacy["by_adversary"]) == 2  # with shares seen, too


def test_each_site_alone_is_scored_on_its_own_patients(trained):
    _, rows = trained
    alone = next(row for row in rows if row.name == "alone")
    report = feddp_table_report.collect(rows, resamples=20)
    entry = report["splits"]["test"]["rows"]["alone"]
    for seed, folders in alone.folders.items():
        own = []
        for where in folders:
            counts = load_image_counts(where, "test")
            site = counts.sites.index(where.parent.name.removeprefix("alone-"))
            of_site = intervals.site_means(counts)[np.unique(counts.site).tolist().index(site)]
            own.append(of_site[0])
        assert entry["seeds"][str(seed)]["dice"] == pytest.approx(np.mean(own))


def test_the_text_names_rows_intervals_and_epsilons(trained):
    folder, rows = trained
    text = feddp_table_report.write(rows, folder, resamples=20)
    assert "| distributed-8 | 2 |" in text
    assert "if all seeds are released" in text
    assert "all background" in text
    kept = json.loads((folder / "table.json").read_text())
    assert feddp_table_report.markdown(kept) == text


def test_the_page_shows_the_table_and_its_interval(trained):
    folder, rows = trained
    feddp_table_report.write(rows, folder, resamples=20)
    content = report_content.read([folder])
    assert set(content.runs) == {BASELINE, "distributed-8", "alone"}
    assert "95 %" in report_content.verdict(content)
    page = report_content.render(
        content, title="A table", with_pixels=False, with_training_pixels=False
    )
    assert "if all seeds are released" in page


def test_what_has_finished_is_not_trained_again(trained, monkeypatch):
    folder, rows = trained
    called = []
    real = training.run
    monkeypatch.setattr(training, "run", lambda *a, **k: called.append(real(*a, **k)))
    again = feddp_table_runs.rows(CONFIG, OPTIONS, folder, train=True)
    assert again == rows
    assert all(summary["finished"] for summary in called)
    assert feddp_table_runs.rows(CONFIG, OPTIONS, folder, train=False) == rows


def test_nothing_finished_is_said(tmp_path):
    with pytest.raises(ValueError, match="train first"):
        feddp_table_report.collect([feddp_table_runs.Row(BASELINE, {}, 3)])
