"""Whole tiny runs in one of several processes; started by `experiments.processes`.

    python -m tests.two_processes FOLDER '{"none": {"privacy.placement": "none"}}'

runs each of the named changes into a folder of its name.
"""

import json
import pathlib
import sys

from experiments.processes import from_environment


def main(folder, changes):
    """Joins the others, then runs; the pictures are left out."""
    from fedjax_dp import processes, results, training
    from tests.runs import federation, tiny

    processes.join(*from_environment())
    results.draw_overlays = results.draw_curves = lambda *args, **kwargs: None
    for name, changed in json.loads(changes).items():
        made = training.run(
            tiny(**changed), pathlib.Path(folder) / name, federation=federation(), progress=False
        )
        assert bool(made) == processes.is_leader()


if __name__ == "__main__":
    main(*sys.argv[1:])
