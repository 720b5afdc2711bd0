"""What the README says is so: its quickstart runs, its links, flags and columns exist."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from fedjax_dp.config import Config, ExecutionConfig, identity
from fedjax_dp.data import manifest
from tests.oracles import assert_trees_close, take

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST_SCREEN = "\n".join(README.splitlines()[:45])


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


QUICKSTART = blocks("python")[0]


@pytest.fixture(scope="module")
def ran():
    """The names the quickstart leaves behind."""
    names = {}
    exec(compile(QUICKSTART, "README.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def start(ran):
    """The parameters the quickstart's clients started from."""
    return ran["params"] - ran["deltas"].mean(0)


def test_the_quickstart_is_twelve_lines_and_maps_the_client_update():
    assert len([line for line in QUICKSTART.splitlines() if line.strip()]) <= 12
    assert "jax.vmap(client_update" in QUICKSTART


def test_vmap_over_the_clients_equals_a_loop(ran, start):
    chunk = ran["chunk"]
    one_by_one = [
        ran["client_update"](start, *take(tuple(chunk), index), ran["pool"])[0]
        for index in range(len(ran["clients"]))
    ]
    assert_trees_close(ran["deltas"], jnp.stack(one_by_one))
    with pytest.raises(AssertionError):  # neither the clients nor their noise are alike
        assert_trees_close(ran["deltas"], jnp.stack(one_by_one[::-1]))


def test_the_quickstart_clips_and_adds_noise(ran, start):
    """Without its noise, what a client sends is bounded by the clip; with it, it is another."""
    chunk, pool = ran["chunk"], ran["pool"]
    silent = chunk._replace(
        constants=chunk.constants._replace(noise_stddev=jnp.zeros(len(ran["clients"])))
    )
    deltas, _, info = jax.vmap(ran["client_update"], in_axes=(None, 0, 0, 0, 0, None))(
        start, *silent, pool
    )
    learning_rate, expected_batch_size = 0.5, 10
    bound = learning_rate * info.units.value.units / expected_batch_size
    assert (jnp.linalg.norm(deltas, axis=1) <= bound * (1 + 1e-5)).all()
    assert (jnp.abs(ran["deltas"] - deltas) > 0).all()


def test_the_price_is_of_one_round_and_twenty_fit_the_target(ran):
    mechanism = ran["clients"][0].mechanism
    assert 0 < ran["epsilon"] == mechanism.epsilon(1, 1e-5)
    assert ran["epsilon"] < mechanism.epsilon(20, 1e-5) <= 8.0 < mechanism.epsilon(21, 1e-5)


def test_the_first_screen_shows_commands_picture_and_quickstart():
    for needed in ("make demo", "make test", "![", "jax.vmap(client_update"):
        assert needed in FIRST_SCREEN
    assert len(re.findall(r"!\[", README)) == 1


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!#)([^)]+)\)", README)
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_the_tests_that_the_privacy_page_relies_on_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)`", (ROOT / "docs/privacy.md").read_text("utf-8"))
    assert named
    missing = [path for path in named if not (ROOT / path).is_file()]
    assert not missing


def test_flags_and_programs_exist():
    commands = "\n".join(blocks("sh"))
    for program in re.findall(r"python -m (\w+(?:\.\w+)*)", commands):
        assert (ROOT / f"{program.replace('.', '/')}.py").is_file(), program
    known = {f"--config.{name}" for name in identity(Config())}
    speed = dataclasses.fields(ExecutionConfig)  # of no one's identity
    known |= {f"--config.execution.{field.name}" for field in speed}
    assert set(re.findall(r"--config\.[\w.]+", README)) <= known
    for target in re.findall(r"make (\w+)", commands):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_the_table_of_columns_is_the_manifests():
    rows = re.findall(r"^\| `(\w+)` \| (required|optional) \|", README, re.MULTILINE)
    expected = [(name, "required") for name in manifest.REQUIRED_COLUMNS]
    expected += [(name, "optional") for name in manifest.OPTIONAL_COLUMNS]
    assert rows == expected


def test_the_picture_is_small():
    assert (ROOT / "docs/demo.png").stat().st_size < 400_000
