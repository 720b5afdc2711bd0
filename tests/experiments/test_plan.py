"""The plan by command line: it says what a run would do, and what to think about before."""

import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from experiments.plan import WIDTH, make_config, plan
from fedjax_dp import planning
from fedjax_dp.assembly.federation import load_federation, load_outline
from fedjax_dp.assembly.sites import make_sites
from fedjax_dp.privacy.statement import decode
from tests.runs import ROOT

PATIENTS = {"north": 12, "south": 20, "hut": 2}


@pytest.fixture
def manifest(tmp_path):
    """Three sites of known patients, two images of 64 x 96 pixels each."""
    lines = ["image,mask,site,patient,split"]
    rng = np.random.default_rng(0)
    for site, patients in PATIENTS.items():
        for i in range(2 * patients):
            name = f"{site}_{i}"
            pixels = rng.integers(0, 256, (64, 96, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{name}.png", compress_level=0)
            mask = rng.integers(0, 2, (64, 96), np.uint8)
            Image.fromarray(mask).save(tmp_path / f"{name}_mask.png")
            lines.append(f"{name}.png,{name}_mask.png,{site},{site}{i // 2},train")
    Image.fromarray(pixels[::-1]).save(tmp_path / "test.png")
    Image.fromarray(mask).save(tmp_path / "test_mask.png")
    lines.append("test.png,test_mask.png,north,somebody,test")
    path = tmp_path / "m.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def config(manifest="", **changes):
    settings = {"tile_size": 32, "rounds": 20, "expected_batch_size": 4.0}
    return make_config(manifest=str(manifest), **settings | changes)


def rows(text):
    """The table's cells by client and column."""
    lines = [line.split() for line in text.splitlines()]
    start = next(i for i, line in enumerate(lines) if line[:1] == ["client"])
    # Names of columns may hold a blank; counting from the right needs none of them.
    names = text.splitlines()[lines.index(lines[start])].replace("one ", "one_")
    header = names.replace("noise z", "noise_z").split()
    found = {}
    for line in lines[start + 1 :]:
        if not line:
            break
        joined = " ".join(line).replace("none valid", "none_valid").split()
        joined[-2:] = [" ".join(joined[-2:])]  # the time and its unit
        found[joined[0]] = dict(zip(header, joined, strict=True))
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"unit": "tile", "max_tiles_per_patient": 3}, marks=pytest.mark.slow),
        {"placement": "distributed", "unit": "slide", "max_dropouts": 1},
        {"placement": "central", "cohort_prob": 0.5},
        {"placement": "update"},
    ],
)
def test_the_plan_is_what_a_run_does(manifest, changes):
    settings = config(manifest, **changes)
    printed = rows(plan(settings))
    federation = load_federation(settings)  # with pixels, as a run reads them
    made = make_sites(settings, federation)
    assert list(printed) == [site.name for site in made.sites]
    outline = load_outline(settings)
    planned = planning.site_plans(settings, outline, make_sites(settings, outline), 10.0)
    for site, of_site in zip(made.sites, planned, strict=True):
        m, row = site.mechanism, printed[site.name]
        assert (of_site.num_units, of_site.sampling_prob) == (m.num_units, m.sampling_prob)
        assert of_site.noise_multiplier == m.noise_multiplier
        assert of_site.rounds_allowed == m.max_rounds(8.0, 1e-5)
        assert of_site.epsilon == m.epsilon(20, 1e-5) <= 8.0
        assert row[f"{made.unit}s"] == str(m.num_units)
        assert row["q"] == f"{m.sampling_prob:.3g}"
        assert row["noise_z"] == f"{m.noise_multiplier:.3g}"
        assert row["rounds"] == f"{of_site.rounds_allowed:,}"
        assert float(row["epsilon"]) == pytest.approx(of_site.epsilon, abs=0.01)
        proven = [r for r in m.guarantees() if r.adversary == m.headline.adversary]
        for unit, found in (("tile", of_site.tile), ("patient", of_site.patient)):
            smallest = min(r.epsilon(20, 1e-5) for r in proven if r.covers(unit))
            assert math.isinf(smallest) == (found["epsilon"] is None)
            if found["epsilon"] is not None:
                assert decode(found["epsilon"]) == smallest


def test_the_page_fits_a_terminal_and_says_what_was_not_done(manifest):
    text = plan(config(manifest))
    assert all(len(line) <= WIDTH == 120 for line in text.splitlines())
    for words in ("no pixel was looked at", "of one patient", "Noise/signal:", "two CPU cores"):
        assert words in " ".join(text.split())
    assert "(as given)" in plan(config(manifest), tiles_per_second=100.0)


def test_advice(manifest):
    text = " ".join(plan(config(manifest, delta=0.01)).split())
    assert "hut: leave this site out: 2 patients" in text
    assert "hut: every step draws all patients" in text
    assert "hut: delta 0.01 is not below 1/n" not in text  # 1/2 is larger
    assert "delta 0.1 is not below 1/n" in plan(config(manifest, delta=0.1))
    assert "north: leave" not in text
    tiles = {"unit": "tile", "train_sites": "north"}
    text = " ".join(plan(config(manifest, **tiles)).split())
    assert "all patients are known, but the unit is the tile: no patient epsilon is valid" in text
    capped = " ".join(plan(config(manifest, max_tiles_per_patient=2, **tiles)).split())
    assert "a patient's epsilon is up to" in capped
    text = " ".join(plan(config(manifest, placement="update_unclipped")).split())
    assert "nothing is promised: epsilon is infinite" in text
    assert "infinite" in rows(plan(config(manifest, placement="none")))["hut"].values()


def test_few_sites_to_share_noise_and_what_the_shares_show(manifest):
    two = config(manifest, placement="distributed", train_sites="north,south")
    text = " ".join(plan(two).split())
    assert "2 sites, of which 0 may drop out, are few to share noise" in text
    assert "against a server that sees the single shares" in text
    three = config(manifest, placement="distributed")
    assert "are few to share" not in plan(three)


def test_unknown_patients_are_named(manifest):
    manifest.write_text(manifest.read_text().replace(",north3,", ",,"))
    text = " ".join(plan(config(manifest)).split())
    assert "unit patient is impossible: patients are unknown at north." in text
    assert rows(plan(config(manifest)))["north"]["patients"] == "unknown"
    with pytest.raises(ValueError, match="unknown ones at north"):
        plan(config(manifest, unit="patient"))


def test_noise_to_signal():
    """At two sites of q n = 3 and 5 units a step: what the mean of each placement holds."""
    federation = load_outline(config())
    for placement, expected in (
        ("dp_sgd", lambda z, m: z / m.expected_batch_size),
        ("distributed", lambda z, m: z / (5 * 4.0)),
        ("update", lambda z, m: z),
        ("central", lambda z, m: z / 5),
    ):
        made = make_sites(config(placement=placement), federation)
        for site in made.sites:
            m = site.mechanism
            got = planning.noise_to_signal(site, made.sites)
            assert got == pytest.approx(expected(m.noise_multiplier, m))
    made = make_sites(config(placement="update_unclipped"), federation)
    assert planning.noise_to_signal(made.sites[0], made.sites) is None


def test_time_follows_the_tiles_that_are_drawn():
    settings = config()
    made = make_sites(settings, load_outline(settings))
    # 4 of 200 patients a step, 4 tiles of each
    assert planning.tiles_per_round(settings, made.sites[0], 5) == pytest.approx(16.0)
    settings.federation.local_steps, settings.objective.multiplicity = 3, 2
    made = make_sites(settings, load_outline(settings))
    assert planning.tiles_per_round(settings, made.sites[0], 5) == pytest.approx(96.0)
    settings.federation.cohort, settings.federation.cohort_size = "fixed", 2
    assert planning.tiles_per_round(settings, made.sites[0], 5) == pytest.approx(0.4 * 96.0)
    speeds = [planning.estimated_tiles_per_second(config(tile_size=size), 2) for size in (128, 256)]
    assert speeds[0] == pytest.approx(33, rel=0.05)
    assert speeds[0] == pytest.approx(4 * speeds[1], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"manifest": "no/such.csv"}, "Cannot open the manifest"),
        ({"tile_size": 100}, "data.tile_size"),
        ({"epsilon": -1.0}, "target_epsilon"),
        ({"delta": 2.0}, "target_delta"),
        ({"rounds": 0}, "rounds"),
        ({"expected_batch_size": 0.0}, "expected_batch_size"),
        ({"placement": "distributed", "max_dropouts": 4}, "max_dropouts=4"),
        ({"cohort_prob": 2.0}, "prob"),
    ],
)
def test_what_a_run_would_refuse_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        plan(config(**changes))


def test_the_module_by_command(manifest, tmp_path):
    command = [
        sys.executable, "-W", "error", "-m", "experiments.plan", f"--manifest={manifest}",
        "--tile_size=32", "--epsilon=8", "--rounds=5", f"--cache={tmp_path / 'cache'}",
    ]  # fmt: skip
    good = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert "hut: leave this site out: 2 patients" in good.stdout
    assert list((tmp_path / "cache").glob("noise-*.json"))
    bad = subprocess.run([*command, "--tile_size=31"], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 1
    assert "data.tile_size" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_the_real_federation(real_data):
    settings = make_config(manifest=str(real_data / "federation" / "manifest.csv"))
    text = plan(settings)
    found = rows(text)
    assert {name: row["slides"] for name, row in found.items()} == {
        "uhcw": "19", "curie": "21", "emory": "25", "tcga-g9": "3", "tcga-b0": "3", "tcga-he": "3",
    }  # fmt: skip
    flat = " ".join(text.split())
    assert "unit patient is impossible: patients are unknown at emory, uhcw." in flat
    assert "tcga-b0: leave this site out: 3 slides of 3 patients" in flat
