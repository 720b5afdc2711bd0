"""What the experiments share: flags over `Config`, devices set up before jax starts, exit codes."""

import os
import signal
import sys
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from experiments import processes
from fedjax_dp.config import Config
from fedjax_dp.processor import cores, use_huge_pages

EXIT_STOPPED = 130


def main(experiment: str, **defaults: Any) -> None:
    """Parses flags and runs `experiment`; does not return.

    Args:
        experiment: its name, for reports.
        **defaults: dotted names of `Config` and what this experiment sets them to by default.
    """
    config = Config()
    for name, value in defaults.items():
        *sections, field = name.split(".")
        target: Any = config
        for section in sections:
            target = getattr(target, section)
        setattr(target, field, value)
    workdir = flags.DEFINE_string(
        "workdir", None, "Folder of the run; a second call goes on.", required=True
    )
    try:
        holder = config_flags.DEFINE_config_dataclass("config", config)
    except KeyError as error:  # it looks at the command line, and found a field that is not there
        print(f"{error.args[0]}. `--help` lists the flags.", file=sys.stderr)
        sys.exit(1)

    # Orbax tells of every file it writes; the run's own lines would drown.
    logging.set_verbosity(logging.WARNING)

    def call(argv: list[str]) -> int:
        if len(argv) > 1:
            raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
        use_huge_pages()
        count = holder.value.execution.processes
        if count > 1 and processes.from_environment() is None:
            # The command as it was given, interpreter options and all.
            return processes.run_processes([sys.executable, *sys.orig_argv[1:]], count)
        return run_and_report(holder.value, workdir.value, experiment)

    app.run(call)


def run_and_report(config: Config, workdir: str, experiment: str) -> int:
    """Runs, prints the summary; returns the exit code: 0, 1 for a user's mistake, 130 stopped."""
    split_cpu(config.execution.devices)
    # jax starts here, after the devices are set up.
    from fedjax_dp import training
    from fedjax_dp.interrupts import Stopped
    from fedjax_dp.processes import join
    from fedjax_dp.reporting.summary import plain_table
    from fedjax_dp.results import comparison_row

    one_of_several = processes.from_environment()
    is_leader = one_of_several is None or one_of_several[2] == 0
    try:
        if one_of_several is not None:
            if not is_leader:  # a terminal's Ctrl-C reaches all; the leader tells when to end
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            join(*one_of_several)
        summary = training.run(config, workdir, experiment=experiment, progress=is_leader)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return EXIT_STOPPED
    except (ValueError, OSError, RuntimeError) as error:
        if is_leader:  # the others make the same mistake, or miss one that died
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        if one_of_several is not None:
            sys.stderr.flush()
            os._exit(1)  # to leave in good order would wait for processes that may be gone
        return 1
    if is_leader:
        print(plain_table([comparison_row(experiment, summary)]))
        print(f"Summary, statement, pictures and logs are in {workdir}.")
    return 0


def split_cpu(devices: int) -> None:
    """Gives XLA the CPU devices that the config asks for, if the user's XLA_FLAGS do not.

    Threads of one operation wait for each other at its end; devices only where they add up sums.

    Args:
        devices: 0 = one for every core that this process may use.
    """
    name = "--xla_force_host_platform_device_count"
    given = os.environ.get("XLA_FLAGS", "")
    devices = devices or cores()
    if devices > 1 and name not in given:
        os.environ["XLA_FLAGS"] = f"{given} {name}={devices}".strip()
