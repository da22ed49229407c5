"""Comparisons, logic and selection over 0/1 floats.

A boolean has no gradient, so attributions that pass through ``x > 0`` would be lost. The rewrite
turns booleans into floats (:mod:`fxshap.passes.relax_booleans`): a comparison u > v becomes a step
of u - v, whose multiplier is its secant, logic becomes products, and a choice becomes

    select(c, a, b) = b + c (a - b)

which is bilinear in c and (a, b), the Shapley value of the game between condition and branches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxshap.rules.core.cancellation import largest_other
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Tensors, rule
from fxshap.rules.core.secants import step_secant
from fxshap.rules.elementwise import elementwise

LIBRARY = torch.library.Library("fxshap", "DEF")
LIBRARY.define("step(Tensor d, str relation) -> Tensor")
LIBRARY.define("select(Tensor c, Tensor a, Tensor b) -> Tensor")

RELATIONS = {
    "gt": torch.gt,
    "ge": torch.ge,
    "lt": torch.lt,
    "le": torch.le,
    "eq": torch.eq,
    "ne": torch.ne,
}


def step(d: Tensor, relation: str) -> Tensor:
    """1 where ``d relation 0`` holds, else 0, in the dtype of `d`."""
    return RELATIONS[relation](d, 0).to(d.dtype)


def select(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A where c is 1, B where it is 0."""
    return torch.where(c > 0.5, a, b)


LIBRARY.impl("step", step, "CompositeExplicitAutograd")
LIBRARY.impl("select", select, "CompositeExplicitAutograd")


elementwise(torch.ops.fxshap.step, slope=step_secant)


def branch_mean(
    r: Tensor, x: Tensor, chosen_r: Tensor, chosen_x: Tensor, most: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the mean of a branch over both ends, and where (1, else 0) the branch moves at all."""
    known_r, known_x = ((end.abs() <= most) & end.isfinite() for end in (r, x))
    known_r, known_x = known_r | chosen_r, known_x | chosen_x
    still_r, still_x = torch.where(known_r, r, x), torch.where(known_x, x, r)
    mean = torch.where(known_r | known_x, (still_r + still_x) / 2, 0.0)
    return mean, (known_r & known_x).to(r.dtype)


@rule(torch.ops.fxshap.select, linear_in=((1, 2),))
def selection(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor, ...]:
    """Bilinear in the condition and in the difference of the branches.

    A branch that is huge or not finite at an end where it is not chosen, such as the logarithm in
    ``where(x > 0, log(x), 0)``, stands still at its other value: the condition is owed everything.
    """
    names = ("c", "a", "b")
    r = [operation[name] for name in names]
    x = list(r)
    for slot, value_r, value_x in zip(operation.slots, reference, sample, strict=True):
        r[slot], x[slot] = value_r, value_x
    (c_r, a_r, b_r), (c_x, a_x, b_x) = r, x
    c = (c_r + c_x) / 2
    most = largest_other(torch.maximum(select(*r).abs(), select(*x).abs()))
    a, moves_a = branch_mean(a_r, a_x, c_r > 0.5, c_x > 0.5, most)
    b, moves_b = branch_mean(b_r, b_x, c_r < 0.5, c_x < 0.5, most)
    grads = (grad * (a - b), grad * c * moves_a, grad * (1 - c) * moves_b)
    return tuple(
        grads[slot].sum_to_size(value.shape)
        for slot, value in zip(operation.slots, reference, strict=True)
    )
