"""One process for each slide: a codec that crashes takes its slide with it and nothing else."""

import multiprocessing
import multiprocessing.connection
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """What became of one job.

    Attributes:
        number: of the job.
        value: what the function returned; None where it failed.
        error: why it failed; empty where it did not.
    """

    number: int
    value: Any
    error: str


def each_in_a_process(
    function: Callable[[Any], Any], jobs: Sequence[Any], workers: int
) -> Iterator[Outcome]:
    """Calls `function(job)` for every job, each in a process of its own, `workers` at a time.

    Guarantees: outcomes come as jobs finish, every job has one, and none changes another. A process
    that crashes, or is killed for memory, is an outcome with the signal's name. Where the caller
    stops early, running processes are ended.

    Args:
        function: of a module, so that another process can import it; it and its jobs are pickled.
            An expected failure is a ValueError or OSError, whose text becomes the error.
        jobs: its arguments.
        workers: processes at once, at least one.
    """
    if workers < 1:
        raise ValueError(f"Expected workers >= 1, got {workers}.")
    # A server that never started a thread forks the workers: quick, and safe after any import.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    running: dict[Any, tuple[int, Any]] = {}
    waiting = list(enumerate(jobs))[::-1]
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                number, job = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(function, job, sender), daemon=True)
                process.start()
                sender.close()
                running[receiver] = number, process
            for ready in multiprocessing.connection.wait(list(running)):
                number, process = running.pop(ready)
                yield _outcome(number, process, ready)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()


def _work(function: Callable[[Any], Any], job: Any, sender: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    try:
        sender.send((function(job), ""))
    except (ValueError, OSError) as error:
        sender.send((None, str(error)))
    except BaseException as error:
        sender.send((None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


def _outcome(number: int, process: Any, receiver: Any) -> Outcome:
    try:
        value, error = receiver.recv()
    except (EOFError, OSError):
        process.join()
        value, error = None, _death(process.exitcode)
    finally:
        receiver.close()
    process.join()
    return Outcome(number, value, error)


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (often: out of memory; use fewer workers)" if name == "SIGKILL" else ""
        return (
            f"The worker was ended by {name}{hint}: the file may crash its decoder. Copy it again."
        )
    return f"The worker ended with code {code} and no result."
