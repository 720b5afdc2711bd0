"""Kills a run at random moments, goes on with it, and holds what it left against what it charged.

    python -m tests.random_kills FOLDER KILLS SEED '{"privacy.placement": "central"}'

runs `tests.runs.tiny` in FOLDER/run, kills it KILLS times by SIGKILL and lets it end. After every
kill all traces of rounds are looked for: what was computed (the child notes a digest of the
parameters after each round, before anything else can happen), log, TensorBoard, checkpoint.

Half of the kills come at moments between charge, release and checkpoint, the others at random times
after a charge. Every other process computes in other microbatches, which is another environment:
what it replays is another message, and must be charged again.
"""

import collections
import hashlib
import json
import math
import os
import pathlib
import random
import signal
import struct
import subprocess
import sys
import time
from unittest import mock

import jax
import numpy as np
from tensorboardX.proto.event_pb2 import Event

from fedjax_dp import results, training
from fedjax_dp.assembly.sites import make_sites
from fedjax_dp.privacy.ledger import ChargeLog
from fedjax_dp.reporting.log import read_lines
from tests import runs

ROUNDS = 30  # more than are run between so many kills


def settings(changes, attempt):
    """Changes for `runs.tiny` of the process `attempt`."""
    base = {
        "seed": -1, "federation.rounds": ROUNDS, "checkpoint_every": 2, "eval_every": ROUNDS,
        "execution.microbatch_size": 1 + attempt % 2,
    }  # fmt: skip
    return base | changes


# --- what is killed


def child(folder, moment, changes):
    """One process: notes what it computes, dies at `moment`, says when it has finished."""
    with open(folder / "computed", "ab", buffering=0) as notes:
        one_round = training._one_round

        def noting(this, made, *rest):
            done = one_round(this, made, *rest)
            if done is not None:
                notes.write(f"{made.round_index} {digest(done[0].params)}\n".encode())
                reached(f"computed {made.round_index}")
            return done

        def reached(name):
            if name == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            if name.startswith("charged"):
                print(name, flush=True)

        for name in ("draw_overlays", "draw_curves"):
            setattr(results, name, lambda *_: None)
        with (
            runs.moments(folder / "run", reached),
            mock.patch.object(training, "_one_round", noting),
        ):
            runs.run(runs.tiny(**changes), folder / "run")


def digest(params):
    state = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(jax.device_get(params)):
        state.update(np.ascontiguousarray(leaf).tobytes())
    return state.hexdigest()


# --- what it left


def whole_lines(path):
    """Lines that end; a kill may tear the last."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def charged(folder):
    return [json.loads(line) for line in whole_lines(folder / "run" / "charges.jsonl")]


def computed(folder):
    """Round -> the different parameters that were computed after it."""
    found = collections.defaultdict(set)
    for line in whole_lines(folder / "computed"):
        index, value = line.decode().split()
        found[int(index)].add(value)
    return found


def events(folder):
    """Rounds, from 1, of which TensorBoard shows anything."""
    found = set()
    for path in (folder / "run" / "tensorboard").glob("events.out.tfevents.*"):
        data, start = path.read_bytes(), 0
        while start + 12 <= len(data):
            (size,) = struct.unpack_from("<Q", data, start)
            record = data[start + 12 : start + 12 + size]
            if len(record) < size:
                break
            event = Event.FromString(record)
            if event.HasField("summary"):
                found.add(event.step)
            start += 16 + size
    return found


def traces(folder):
    """Rounds, from 0, of which anything is left anywhere."""
    run = folder / "run"
    reported = {line["round"] for line in read_lines(run / "metrics.jsonl")} | events(folder)
    saved = {int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit()}
    last = max(saved, default=0)
    return {number - 1 for number in reported if number} | set(range(last)) | set(computed(folder))


def check(folder, before, epsilon):
    """Raises AssertionError where a trace is not paid for; returns the charges.

    Args:
        folder: of the run and the notes.
        before: charges after the kill before this one.
        epsilon: `epsilon(client, rounds)`.
    """
    now = charged(folder)
    assert now[: len(before)] == before, "a charge was changed or is gone"
    by_round = collections.Counter(charge["round"] for charge in now)
    unpaid = {index for index in traces(folder) if not by_round[index]}
    assert not unpaid, f"rounds {unpaid} left traces and are not charged"
    for index, values in computed(folder).items():
        assert len(values) <= by_round[index], (
            f"round {index} was computed with {len(values)} noises and charged {by_round[index]}"
        )
    nonces = {(charge["round"], charge["nonce"]) for charge in now}
    assert len(nonces) == len(now), "two charges have one nonce"
    totals = collections.Counter(client for charge in now for client in charge["clients"])
    previous = collections.Counter(client for charge in before for client in charge["clients"])
    released = sum(map(len, computed(folder).values()))
    for client, total in totals.items():
        assert total >= max(previous[client], released, len(traces(folder)))
        spent = epsilon(client, max(previous[client], released))
        assert epsilon(client, total) >= spent
    return now


# --- the killing


def moment_after(rng, folder):
    """A moment that the next process will come to, somewhere between charge and checkpoint."""
    run = folder / "run"
    saved = max(
        (int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit()), default=0
    )
    ahead = saved + rng.randrange(3)
    even = saved + 2
    return rng.choice(
        [
            f"charged {ahead}", f"computed {ahead}", f"logged {ahead + 1}",
            f"visited {1 + rng.randrange(4)}", "after a part of a checkpoint",
            f"before checkpoints/{even}", f"after checkpoints/{even}",
        ]
    )  # fmt: skip


def start(folder, moment, changes, cache):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.random_kills",
            "child",
            str(folder),
            moment,
            json.dumps(changes),
        ],
        cwd=runs.ROOT,
        env=runs.subprocess_environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_again_and_again(folder, kills, seed, changes, cache):
    """Kills a run `kills` times, checks after each, and lets it end; returns what happened.

    Returns:
        Counts: "named" and "timed" kills, "charges", "replays" (charges beyond one a round).

    Raises:
        AssertionError: something was released that is not charged, or a process failed otherwise.
    """
    rng, before, happened = random.Random(seed), [], collections.Counter()
    config = runs.tiny(**settings(changes, 0))
    epsilon = epsilons(config)
    folder.mkdir(parents=True, exist_ok=True)
    attempt = 0
    while sum(happened.values()) < kills:
        named = attempt % 4 < 2
        moment = moment_after(rng, folder) if named else ""
        process = start(folder, moment, settings(changes, attempt), cache)
        if not named:
            for _ in range(rng.randrange(1, 4)):  # charges, which run ahead by two rounds
                process.stdout.readline()
            time.sleep(rng.uniform(0.0, 0.1))
            process.kill()
        _, errors = process.communicate()
        if process.returncode == 0:
            raise AssertionError(f"The run ended before it was killed {kills} times.")
        assert process.returncode == -signal.SIGKILL, errors
        happened["named" if named else "timed"] += 1
        before = check(folder, before, epsilon)
        attempt += 1
    process = start(folder, "", settings(changes, attempt), cache)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    now = check(folder, before, epsilon)
    assert_stated(folder, now, epsilon)
    replays = len(now) - ROUNDS
    return dict(happened) | {"charges": len(now), "replays": replays}


def epsilons(config):
    sites = make_sites(config, runs.federation()).sites
    mechanisms = {site.name: site.mechanism for site in sites}
    found = {}

    def epsilon(client, rounds):
        if (client, rounds) not in found:
            delta = config.privacy.target_delta
            found[client, rounds] = mechanisms[client].epsilon(rounds, delta) if rounds else 0.0
        return found[client, rounds]

    return epsilon


def assert_stated(folder, now, epsilon):
    """The last word counts every charge."""
    stated = runs.read_json(folder / "run" / "privacy.json")
    summary = runs.read_json(folder / "run" / "summary.json")
    totals = collections.Counter(client for charge in now for client in charge["clients"])
    assert summary["rounds"] == ROUNDS
    for client, total in totals.items():
        assert stated["clients"][client]["rounds"] == total
        final = summary["privacy"]["epsilon"]["per_client"][client]
        assert math.isclose(final, epsilon(client, total), rel_tol=1e-9)
    assert not (folder / "run" / "secrets").exists()
    with ChargeLog(folder / "run" / "charges.jsonl") as log:
        assert log.counts() == totals


def main():
    if sys.argv[1] == "child":
        folder, moment, changes = sys.argv[2:]
        child(pathlib.Path(folder), moment, json.loads(changes))
        return
    folder, kills, seed, changes = sys.argv[1:]
    folder = pathlib.Path(folder)
    happened = kill_again_and_again(
        folder, int(kills), int(seed), json.loads(changes), folder / "cache"
    )
    print(happened)


if __name__ == "__main__":
    main()
