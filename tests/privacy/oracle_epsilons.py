"""Epsilons by accountants that are not ours, for `test_accounting_oracles.py` to compare with.

What: random events from a fixed seed, and the epsilon of each according to

- prv-accountant (Microsoft; Gopi, Lee, Wutschitz 2021, arXiv 2106.02848): Fourier composition on a
  mesh of its own, in extended precision, with a proven lower and upper bound. It shares no line
  with dp-accounting, which ours is built on. It ships the sampled Gaussian under zero-out; the
  privacy loss under replace-one is derived here (`ReplaceOne`).
- closed forms, in 40 digits: the Gaussian mechanism (Balle and Wang 2018, arXiv 1805.06530,
  theorem 8), and a single step of any two mixtures of Gaussians whose likelihood ratio is monotone.
- jax-privacy, whose PLD accountant is dp-accounting as well: NOT independent. Its figures check
  what we make of q, steps, capacity and relation, not the composition.

Why a committed file: prv-accountant was last released in 2022, and neither it nor jax-privacy
belongs in the environment of the tests. Nothing of fedjax_dp is imported here. To make the file
anew, from the root of the repository, in a virtual environment of its own:

    pip install prv-accountant jax-privacy mpmath
    python -m tests.privacy.oracle_epsilons --output=tests/privacy/oracle_epsilons.json

It takes a quarter of an hour, and five gigabytes of memory for the smallest epsilons.
"""

import argparse
import importlib.metadata
import json
import math
import platform
from pathlib import Path

import mpmath
import numpy as np
from jax_privacy import accounting as jax_accounting
from prv_accountant import PRVAccountant
from prv_accountant.other_accountants import RDP
from prv_accountant.privacy_random_variables import (
    GaussianMechanism,
    PoissonSubsampledGaussianMechanism,
    PrivacyRandomVariable,
    PrivacyRandomVariableTruncated,
)
from scipy import special

SEED = 20240915
NUM_SAMPLES = 100_000
"""q is a whole number of these, since jax-privacy is told a batch size and not q."""
DELTAS = (1e-4, 1e-5, 1e-6, 1e-8)
EPSILONS = (0.05, 30.0)
"""Events whose epsilon lies outside are drawn again: nobody reports those."""

EPS_ERROR = 0.001
"""What prv-accountant is asked for, as a part of epsilon; in delta, it is a thousandth of delta."""
JAX_GRID = 1e-3
"""The cell of jax-privacy's privacy loss: our default, so that the figures are comparable."""

mpmath.mp.dps = 40

# prv-accountant 0.2.0 integrates the mean of a loss adaptively from 0.1 to the edge of its domain,
# and can miss all of a sharp distribution there (q = 0.18761, z = 0.501, 67 steps: mean 0.20 where
# 0.15 is true). A large error it notices, a small one times the steps would shift epsilon; so it
# is given the mean before the truncation to its domain, which cuts off less than 1e-13.
PrivacyRandomVariableTruncated.mean = lambda self: self.prv.mean()


def log_sampled(q, exponent):
    """log(1 - q + q e^exponent), also for q = 1."""
    with np.errstate(divide="ignore"):
        return np.logaddexp(np.log1p(-q), np.log(q) + exponent)


class Sampled(PoissonSubsampledGaussianMechanism):
    """The loss of (1-q) N(0, z^2) + q N(1, z^2) against N(0, z^2), with its mean."""

    def mean(self):
        q, z = self.p, self.sigma
        return mean_of(q, z, lambda x: log_sampled(q, (x - 0.5) / z**2))


class Gaussian(GaussianMechanism):
    def mean(self):
        return self.mu**2 / 2


class ReplaceOne(PrivacyRandomVariable):
    """The loss of (1-q) N(0, z^2) + q N(1, z^2) against (1-q) N(0, z^2) + q N(-1, z^2).

    With y = exp(x / z^2), b = 1 - q and c = q exp(-1 / (2 z^2)) the likelihood ratio at x is
    (b + c y) / (b + c / y); it equals e^t at the positive root of c y^2 - b (e^t - 1) y = c e^t.
    """

    def __init__(self, sampling_prob, noise_multiplier):
        self.q, self.z = np.longdouble(sampling_prob), np.longdouble(noise_multiplier)

    def cdf(self, t):
        q, z, t = self.q, self.z, np.asarray(t, np.longdouble)
        half = (1 - q) / q * np.exp(1 / (2 * z**2)) * np.expm1(t) / 2
        root = np.sqrt(half**2 + np.exp(t))
        # The two forms of the root are equal; each is free of cancellation where it is used.
        y = np.where(half > 0, half + root, np.exp(t) / (root - np.minimum(half, 0)))
        x = np.float64(z * np.log(y))
        return (1 - q) * special.ndtr(x) + q * special.ndtr(x - np.float64(1 / z))

    def mean(self):
        q, z = self.q, self.z

        def loss(x):
            return log_sampled(q, (x - 0.5) / z**2) - log_sampled(q, (-x - 0.5) / z**2)

        return mean_of(q, z, loss)

    def rdp(self, alpha):
        q, z = float(self.q), float(self.z)
        x, step = np.linspace(-12 * z, 2 * alpha + 12 * z, 40_001, retstep=True)
        upper, lower = (log_sampled(q, (sign * x - 0.5) / z**2) for sign in (1, -1))
        total = special.logsumexp(alpha * upper + (1 - alpha) * lower - x**2 / (2 * z**2))
        return (total + math.log(step / (z * math.sqrt(2 * math.pi)))) / (alpha - 1)


def mean_of(q, z, loss):
    """E loss(x) for x from (1-q) N(0, z^2) + q N(1, z^2), by the trapezoid rule.

    It converges faster than any power for such integrands, and 14 z is beyond 1e-43.
    """
    u = np.linspace(-14, 14, 20_001, dtype=np.longdouble)
    weight = np.exp(-(u**2) / 2)
    weight /= weight.sum()
    return np.sum(weight * ((1 - q) * loss(z * u) + q * loss(1 + z * u)))


def prv_variable(q, z, relation):
    if relation == "replace_one":
        return ReplaceOne(q, z)
    return Gaussian(z) if q == 1 else Sampled(q, z)


def prv_epsilons(q, z, steps, delta, relation="zero_out"):
    """Lower bound, estimate and upper bound; None where epsilon is outside `EPSILONS`."""
    variable = prv_variable(q, z, relation)
    _, looser, _ = RDP([variable]).compute_epsilon(delta, [steps])
    if not EPSILONS[0] < looser < 3 * EPSILONS[1]:
        return None

    def within(eps_error):
        accountant = PRVAccountant(
            variable, max_self_compositions=steps, eps_error=eps_error, delta_error=delta / 1000
        )
        return accountant.compute_epsilon(delta, [steps])

    _, estimate, _ = within(max(0.02 * looser, 0.05))
    lower, estimate, upper = within(EPS_ERROR * max(estimate, EPSILONS[0]))
    if not EPSILONS[0] < estimate < EPSILONS[1]:
        return None
    return {"lower": lower, "estimate": estimate, "upper": upper}


def jax_privacy_epsilon(batch_size, num_samples, z, steps, delta, capacity=None):
    accountant = jax_accounting.DpsgdTrainingAccountant(
        jax_accounting.PldAccountantConfig(value_discretization_interval=JAX_GRID)
    )
    params = jax_accounting.DpParams(
        noise_multipliers=z,
        num_samples=num_samples,
        delta=delta,
        batch_size=batch_size,
        truncated_batch_size=capacity,
    )
    return float(accountant.compute_epsilon(steps, params))


def root_of_decreasing(fn, low, high):
    """Bisection to 2^-100 of the bracket, which is far below a float's last digit."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if fn(middle) > 0 else (low, middle)
    return (low + high) / 2


def gaussian_epsilon(z, steps, delta):
    """Balle and Wang 2018, theorem 8, with `steps` Gaussians as one of noise z / sqrt(steps)."""
    mu = mpmath.sqrt(steps) / mpmath.mpf(z)

    def excess(epsilon):
        lost = mpmath.ncdf(mu / 2 - epsilon / mu)
        return lost - mpmath.exp(epsilon) * mpmath.ncdf(-mu / 2 - epsilon / mu) - delta

    return float(root_of_decreasing(excess, mpmath.mpf(0), mpmath.mpf(1000)))


def one_step_epsilon(upper, lower, z, delta):
    """The epsilon between two mixtures of N(mean, z^2), given as {mean: weight}; both directions.

    Their likelihood ratio must be monotone: then the hockey-stick divergence is attained by a
    threshold, and is a finite sum of normal tails.
    """

    def density(mixture, x):
        return sum(w * mpmath.exp(-((x - m) ** 2) / (2 * z**2)) for m, w in mixture.items())

    def tail(mixture, x):
        return sum(w * mpmath.ncdf((m - x) / z) for m, w in mixture.items())

    def one_way(p, q):
        def excess(epsilon):
            threshold = root_of_decreasing(
                lambda x: epsilon - mpmath.log(density(p, x) / density(q, x)),
                mpmath.mpf(-1000),
                mpmath.mpf(1000),
            )
            return tail(p, threshold) - mpmath.exp(epsilon) * tail(q, threshold) - delta

        return root_of_decreasing(excess, mpmath.mpf(0), mpmath.mpf(100))

    z = mpmath.mpf(z)
    mirrored = ({-m: w for m, w in mixture.items()} for mixture in (lower, upper))
    return float(max(one_way(upper, lower), one_way(*mirrored)))


def log_uniform(rng, low, high):
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def draw(rng, is_full):
    """Batch size, noise multiplier, steps, delta."""
    batch_size = round(NUM_SAMPLES * log_uniform(rng, 1e-3, 1.0))
    z = round(log_uniform(rng, 0.4, 20.0), 3)
    steps = round(log_uniform(rng, 1, 5000))
    return NUM_SAMPLES if is_full else batch_size, z, steps, float(rng.choice(DELTAS))


def sampled_cases(rng, count, relation):
    """Every eighth with q exactly 1; a closed form where there is one."""
    cases = []
    while len(cases) < count:
        batch_size, z, steps, delta = draw(rng, is_full=len(cases) % 8 == 0)
        q = batch_size / NUM_SAMPLES
        prv = prv_epsilons(q, z, steps, delta, relation)
        if prv is None:
            continue
        case = {"sampling_prob": q, "noise_multiplier": z, "steps": steps, "delta": delta}
        case["prv_accountant"] = prv
        if relation == "zero_out":
            case["jax_privacy"] = jax_privacy_epsilon(batch_size, NUM_SAMPLES, z, steps, delta)
        if q == 1:
            distance = 2 if relation == "replace_one" else 1
            case["closed_form"] = gaussian_epsilon(z / distance, steps, delta)
        elif steps == 1:
            without = {0: 1 - q, -1: q} if relation == "replace_one" else {0: 1.0}
            case["closed_form"] = one_step_epsilon({0: 1 - q, 1: q}, without, z, delta)
        cases.append(case)
        print(relation, case, flush=True)
    return cases


def truncated_cases(rng, count):
    """Capacities between twice the mean and the mean: where truncation costs little and much."""
    cases = []
    while len(cases) < count:
        num_samples = int(rng.integers(50, 1000))
        batch_size = int(rng.integers(1, num_samples // 2))
        capacity = round(batch_size * rng.uniform(1, 2))
        z = round(log_uniform(rng, 1.0, 20.0), 3)
        steps, delta = round(log_uniform(rng, 1, 1000)), float(rng.choice(DELTAS))
        epsilon = jax_privacy_epsilon(batch_size, num_samples, z, steps, delta, capacity)
        if not EPSILONS[0] < epsilon < EPSILONS[1]:
            continue
        cases.append(
            {
                "num_samples": num_samples,
                "sampling_prob": batch_size / num_samples,
                "capacity": capacity,
                "noise_multiplier": z,
                "steps": steps,
                "delta": delta,
                "jax_privacy": epsilon,
            }
        )
        print(cases[-1], flush=True)
    return cases


def one_step_cases(rng, count):
    """In turn: sampled under zero-out, sampled under replace-one, a patient of several tiles."""
    cases = []
    while len(cases) < count:
        q = round(log_uniform(rng, 1e-2, 1.0), 4)
        z = round(log_uniform(rng, 0.4, 2.0), 3)
        delta = float(rng.choice(DELTAS))
        kind = ("zero_out", "replace_one", "group")[len(cases) % 3]
        size = int(rng.integers(2, 9)) if kind == "group" else 1
        upper = {m: math.comb(size, m) * q**m * (1 - q) ** (size - m) for m in range(size + 1)}
        lower = {0: 1 - q, -1: q} if kind == "replace_one" else {0: 1.0}
        epsilon = one_step_epsilon(upper, lower, z, delta)
        if not EPSILONS[0] < epsilon < EPSILONS[1]:
            continue
        case = {"kind": kind, "sampling_prob": q, "noise_multiplier": z, "delta": delta}
        cases.append({**case, "group_size": size, "closed_form": epsilon})
        print(cases[-1], flush=True)
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    names = ("prv-accountant", "jax-privacy", "dp-accounting", "mpmath", "numpy", "scipy")
    streams = np.random.default_rng(SEED).spawn(4)
    figures = {
        "seed": SEED,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "prv_eps_error": EPS_ERROR,
        "jax_privacy_grid": JAX_GRID,
        "zero_out": sampled_cases(streams[0], 40, "zero_out"),
        "replace_one": sampled_cases(streams[1], 12, "replace_one"),
        "truncated": truncated_cases(streams[2], 8),
        "one_step": one_step_cases(streams[3], 18),
    }
    # One case a line, so that a change of a figure shows as one line.
    lines = []
    for name, value in figures.items():
        if isinstance(value, list):
            cases = ",\n".join(f"  {json.dumps(case)}" for case in value)
            lines.append(f" {json.dumps(name)}: [\n{cases}\n ]")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    output.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
