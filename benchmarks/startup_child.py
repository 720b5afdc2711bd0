r"""Where does the time until the first finished round go? One start, alone in a process.

    python -m benchmarks.startup_child '{"begun": 0.0, "workdir": "runs/x", "config": {}}'

is what `benchmarks.startup` starts. It runs `training.run` with the configuration's changes, by
dotted names, up to the line of round one in its log, and prints the seconds of each phase, and
those from the process's start to the first client's first finished call.
"""

import json
import sys
import time

from experiments.launcher import split_cpu

MARK = "phases of the start: "


def main(argument: str) -> None:
    """Starts a run, prints phase -> seconds."""
    given = json.loads(argument)
    imported_from = given["begun"] or time.time()

    split_cpu(0)  # as experiments do
    # What a run imports is what is measured first.
    import functools
    from typing import Any
    from unittest import mock

    import jax
    from absl import logging

    from benchmarks.machine import compile_log
    from fedjax_dp import training
    from fedjax_dp.assembly.federation import load_federation
    from fedjax_dp.config import Config
    from fedjax_dp.reporting.log import MetricsLog

    logging.set_verbosity(logging.WARNING)
    seconds = {"import": time.time() - imported_from}
    config = Config()
    for name, value in given["config"].items():
        *sections, field = name.split(".")
        setattr(functools.reduce(getattr, sections, config), field, value)

    class Enough(Exception):  # noqa: N818, it is no error
        pass

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.time()
            result = function(*args, **kwargs)
            seconds[name] = time.time() - start
            seconds["last"] = time.time()
            return result

        return call

    compiled, append = training.compile_programs, MetricsLog.append

    def stepping(*args: Any) -> Any:
        made = compiled(*args)

        def visit(*given: Any) -> Any:
            result = made.visit(*given)
            if "to_first_step" not in seconds:
                jax.block_until_ready(result)
                seconds["to_first_step"] = time.time() - imported_from
            return result

        return made._replace(visit=visit)

    def appended(log: Any, line: dict[str, Any]) -> None:
        append(log, line)
        phase = "before_rounds" if line["round"] == 0 else "first_round"
        seconds[phase] = time.time() - seconds["last"]
        seconds["last"] = time.time()
        if line["round"]:
            raise Enough

    with (
        compile_log() as log,
        mock.patch.object(training, "make_sites", timed("calibration", training.make_sites)),
        mock.patch.object(training, "compile_programs", timed("programs", stepping)),
        mock.patch.object(MetricsLog, "append", appended),
    ):
        federation = timed("data", load_federation)(config)
        try:
            training.run(config, given["workdir"], federation=federation, progress=False)
        except Enough:
            seconds["whole"] = time.time() - imported_from
    del seconds["last"]
    # Of all programs, those of the initial parameters and the evaluation included.
    seconds |= {f"jax_{kind}": log.total(kind) for kind in log.seconds}
    print(MARK + json.dumps(seconds | {"compiles": log.compiles, "tiles": len(federation.train)}))


if __name__ == "__main__":
    main(sys.argv[1])
