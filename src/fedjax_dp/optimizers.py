"""Optax optimisers by name, with the few settings experiments turn."""

import inspect

import optax


def make_optimizer(
    name: str,
    learning_rate: float,
    momentum: float = 0.0,
    *,
    decay_steps: int = 0,
) -> optax.GradientTransformation:
    """An optax optimiser.

    Args:
        name: a function of `optax` that takes a learning rate: "sgd", "adam", "yogi", "lion", ...
        learning_rate: its learning rate.
        momentum: passed as `momentum`, or as `b1` where the optimiser has that.
        decay_steps: cosine decay of the learning rate to zero over so many steps; 0 = constant.

    Raises:
        ValueError: optax has no such optimiser, or a number is out of range.
    """
    factory = getattr(optax, name, None)
    parameters = inspect.signature(factory).parameters if callable(factory) else {}
    required = {n for n, p in parameters.items() if p.default is p.empty} - {"learning_rate"}
    if factory is None or "learning_rate" not in parameters or required or name == "lbfgs":
        raise ValueError(
            f"Expected the name of an optax optimiser with a learning rate, got {name!r}. Use for "
            "instance 'sgd', 'adam', 'adamw' or 'yogi'."
        )
    if not learning_rate > 0 or not 0 <= momentum < 1:
        raise ValueError(
            f"Expected a learning rate > 0 and 0 <= momentum < 1 for {name!r}, got "
            f"{learning_rate=}, {momentum=}."
        )
    rate = optax.cosine_decay_schedule(learning_rate, decay_steps) if decay_steps else learning_rate
    if "momentum" in parameters:
        # Where None is the default it means without; elsewhere it is an error.
        without = None if parameters["momentum"].default is None else 0.0
        return factory(rate, momentum=momentum or without)
    if "b1" in parameters:
        return factory(rate, b1=momentum)
    return factory(rate)
