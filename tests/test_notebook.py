"""The notebook runs from top to bottom, and its two forms say the same."""

import json
import pathlib
import re
import subprocess
import sys

import jupytext
import nbformat
import pytest

NOTEBOOKS = pathlib.Path(__file__).resolve().parents[1] / "notebooks"
TEXT, NOTEBOOK = NOTEBOOKS / "feddp.py", NOTEBOOKS / "feddp.ipynb"

# In a process of its own: the kernel's libraries warn of matters that are not this project's.
RUN = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_the_notebook_is_made_from_the_text():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert cells(notebook) == cells(jupytext.read(TEXT)), (
        "notebooks/feddp.ipynb is not what notebooks/feddp.py says. Run: "
        ".venv/bin/jupytext --to ipynb notebooks/feddp.py"
    )


def test_the_notebook_is_kept_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_a_missing_package_asks_for_a_source_and_names_no_host():
    text = TEXT.read_text(encoding="utf-8")
    assert 'SOURCE = ""' in text
    assert not re.search(r"https?://|git@|\w\.(?:com|org|io|net)\b", text)


@pytest.mark.slow
def test_the_notebook_runs_in_a_kernel(tmp_path):
    done = tmp_path / "done.ipynb"
    ran = subprocess.run(
        [sys.executable, "-c", RUN, str(NOTEBOOK), str(done)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    outputs = [
        output
        for cell in nbformat.read(done, as_version=4).cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 5

    dice, trivial = re.search(r"test Dice ([\d.]+); .* gives ([\d.]+)", printed).groups()
    assert float(dice) > float(trivial), "private training learnt nothing"
    summary = json.loads((tmp_path / "runs/notebook/summary.json").read_text())
    assert summary["finished"]
    assert summary["privacy"]["is_private"]
    assert 0 < summary["privacy"]["epsilon"]["max"] <= 8.0
    for stated, recomputed in re.findall(r"stated ([\d.]+), recomputed ([\d.]+)", printed):
        assert stated == recomputed
