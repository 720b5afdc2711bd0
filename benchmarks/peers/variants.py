"""Which arrangements of which library are tried?

    python -m benchmarks.peers.clipping --list

A name's best arrangement stands for it. Opacus's hooks and ghost modes are left out in the memory
format channels_last, for they are wrong there (Opacus 1.6.0, PyTorch 2.13.0): their clipped sums
are off by more than their own size. With torch.compile Opacus's modes give the same sums and are
slower: hooks are compiled anew for every layer, and what `torch.func` maps gains nothing.

`torch_func` is no mode of Opacus: it hands the gradients of `torch.func.vmap` over the whole
network to Opacus's optimiser, which clips, adds and noises them. It has a name of its own.
"""

import dataclasses

from benchmarks.peers.interleave import Variant

_TORCH = "benchmarks.peers.torch_steps:make"
_OURS, _JAX_PRIVACY = (f"benchmarks.peers.jax_steps:{name}" for name in ("ours", "jax_privacy"))

OURS = {"private": "dp_sgd", "nonprivate": "none"}
"""Names that are ours, and their placements."""


def step_variants() -> list[Variant]:
    """Arrangements of one step in one process; `split` makes the others. Ours come first."""
    variants = [
        Variant(
            name=name,
            label=label,
            factory=_OURS,
            options={"placement": placement, "microbatch_size": microbatch_size},
        )
        for name, placement in OURS.items()
        for label, microbatch_size in (("one by one", 1), ("two by two", 2), ("all at once", 0))
    ]
    variants += [
        Variant(name="jax_privacy", label=label, factory=_JAX_PRIVACY, options={"up": up})
        for label, up in (("ConvTranspose", "transpose"), ("Dense", "dense"))
    ]
    for mode, channels_last, compiled in (  # see the module's docstring for what is missing
        ("none", False, False),
        ("none", True, False),
        ("none", True, True),
        ("hooks", False, False),
        ("ghost", False, False),
        ("functorch", False, False),
        ("functorch", True, False),
        ("func", False, False),
    ):
        parts = [*([mode] if mode not in ("none", "func") else []), _format(channels_last)]
        parts += ["torch.compile"] * compiled
        variants.append(
            Variant(
                name={"none": "torch", "func": "torch_func"}.get(mode, "opacus"),
                label=", ".join(parts),
                factory=_TORCH,
                options={"mode": mode, "channels_last": channels_last, "compile": compiled},
                # In the process itself: a pool of compilers would outlive it.
                environment={"TORCHINDUCTOR_COMPILE_THREADS": "1"} if compiled else {},
            )
        )
    return variants


def round_variants(cores: int) -> list[Variant]:
    """Arrangements of one round: ours over one or more XLA devices, Flower over its actors."""
    variants = [
        Variant(
            name="private",
            label=f"{devices} XLA devices, {together} on a client",
            factory="benchmarks.peers.jax_round:make",
            options={"devices": devices, "devices_per_client": together},
            environment={"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
        )
        for devices, together in ((1, 1), (cores, 1), (cores, cores))
    ]
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    variants += [
        Variant(
            name="flower_func" if mode == "func" else "flower",
            label=f"{mode}, {_format(channels_last)}",
            factory="benchmarks.peers.flower_round:make",
            options={"mode": mode, "channels_last": channels_last, "actors": cores},
            environment={**quiet, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
        )
        for mode, channels_last in (("hooks", False), ("functorch", True), ("func", False))
    ]
    return variants


def split(variant: Variant, processes: int) -> Variant:
    """The same with the batch shared by as many processes, each with its share of the cores."""
    label = f"{processes} processes, {variant.label}"
    return dataclasses.replace(variant, label=label, processes=processes)


def _format(channels_last: bool) -> str:
    return "channels_last" if channels_last else "contiguous"
