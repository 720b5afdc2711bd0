"""What leaves the building: parameters that predict the same, a card that says the truth."""

import json

import jax
import numpy as np
import pytest

from experiments import bundle
from fedjax_dp.inference.model import load_run
from tests import runs
from tests.runs import compiled, no_pictures  # noqa: F401


@pytest.fixture(scope="module")
def trained(compiled, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("bundle")
    runs.run(runs.tiny(**{"federation.rounds": 2, "seed": -1}), folder / "private")
    runs.run(runs.tiny(**{"federation.rounds": 2}), folder / "seeded")
    return folder


def test_a_bundle_holds_the_parameters_and_a_card_with_its_epsilon(trained, tmp_path):
    bundle.write(trained / "private", tmp_path / "bundle")
    params = load_run(trained / "private").params
    with np.load(tmp_path / "bundle" / "parameters.npz") as arrays:
        paths = jax.tree.leaves_with_path(params)
        assert len(arrays.files) == len(paths)
        for path, leaf in paths:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            np.testing.assert_array_equal(arrays[name], leaf)
    card = (tmp_path / "bundle" / "MODEL_CARD.md").read_text()
    summary = json.loads((trained / "private" / "summary.json").read_text())
    assert "alder, birch" in card
    assert "**Nothing.**" not in card
    assert f"{summary['test']['per_site']['alder']['dice']:.3f}" in card
    assert "Epsilon, the worst site's" in card
    statement = (trained / "private" / "privacy.json").read_text()
    assert (tmp_path / "bundle" / "privacy.json").read_text() == statement


def test_a_run_that_protects_nobody_is_bundled_only_when_told_and_says_so(trained, tmp_path):
    with pytest.raises(ValueError, match="allow_not_private"):
        bundle.write(trained / "seeded", tmp_path / "bundle")
    bundle.write(trained / "seeded", tmp_path / "bundle", allow_not_private=True)
    assert "**Nothing.**" in (tmp_path / "bundle" / "MODEL_CARD.md").read_text()


def test_what_is_there_is_not_overwritten_and_what_is_no_run_refused(trained, tmp_path):
    (tmp_path / "kept").write_text("x")
    with pytest.raises(ValueError, match="new or empty"):
        bundle.write(trained / "private", tmp_path)
    with pytest.raises(ValueError, match="finished run"):
        bundle.write(tmp_path, tmp_path / "bundle")
