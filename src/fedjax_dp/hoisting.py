"""What does not change from one turn of a loop to the next is computed once, before the loop.

XLA's CPU backend leaves such work inside. In a loop over units that is, for every unit anew,
whatever depends on the parameters alone: kernels turned round for the gradients of images, weight
standardisation, casts to a narrower type.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal


def hoisted(fn: Callable[..., Any], *examples: Any) -> tuple[Callable[..., Any], Any]:
    """`fn` as the body of a loop, with all that does not depend on its arguments computed here.

    Guarantee: the body returns what `fn` returns, by the same operations. An operation that gives
    more bytes than it takes stays in the body: to keep an array's copies, or a widened one, would
    cost more memory than the time is worth.

    Args:
        fn: pure; what it closes over is what stays the same.
        examples: its arguments, or `jax.ShapeDtypeStruct`s of them.

    Returns:
        The body, of the same arguments, and the shapes of what it returns.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*examples)
    whole, structure = closed.jaxpr, jax.tree.structure(shapes)
    known = set(whole.constvars)
    before: list[Any] = []
    inside: list[Any] = []
    for equation in whole.eqns:
        stays = _stays_the_same(equation, known)
        (before if stays else inside).append(equation)
        known |= set(equation.outvars) if stays else set()
    needed = {var for equation in inside for var in equation.invars if not _is_literal(var)}
    needed |= {var for var in whole.outvars if not _is_literal(var)}
    kept = [var for equation in before for var in equation.outvars if var in needed]
    first = whole.replace(invars=[], outvars=kept, eqns=before)
    rest = whole.replace(constvars=[*whole.constvars, *kept], eqns=inside)
    constants = [*closed.consts, *jax.core.eval_jaxpr(first, closed.consts)]

    def body(*arguments: Any) -> Any:
        results = jax.core.eval_jaxpr(rest, constants, *jax.tree.leaves(arguments))
        return jax.tree.unflatten(structure, results)

    return body, shapes


def _stays_the_same(equation: Any, known: set[Any]) -> bool:
    """Whether all it takes is known, and what it gives is no larger."""
    inputs = [var for var in equation.invars if not _is_literal(var)]
    if not inputs or equation.effects or not known.issuperset(inputs):
        return False
    return sum(map(_bytes, equation.outvars)) <= sum(map(_bytes, inputs))


def _is_literal(var: Any) -> bool:
    return isinstance(var, Literal)


def _bytes(var: Any) -> int:
    return var.aval.size * var.aval.dtype.itemsize
