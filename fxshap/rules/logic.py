"""Comparisons, logic and selection over 0/1 floats.

A boolean has no gradient, so attributions that pass through ``x > 0`` would be lost. The rewrite
turns booleans into floats (:mod:`fxshap.booleans`): a comparison u > v becomes a step of u - v,
whose multiplier is its secant, logic becomes products, and a choice becomes

    select(c, a, b) = b + c (a - b)

which is bilinear in c and (a, b), the Shapley value of the game between condition and branches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxshap.rules.elementwise import elementwise
from fxshap.rules.operation import Operation
from fxshap.rules.table import Tensors, rule

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
    """1 where ``d relation 0`` holds, else 0, in the dtype of `d`.


    """
    return RELATIONS[relation](d, 0).to(d.dtype)


def select(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A where c is 1, B where it is 0."""
    return torch.where(c > 0.5, a, b)


LIBRARY.impl("step", step, "CompositeExplicitAutograd")
LIBRARY.impl("select", select, "CompositeExplicitAutograd")


def step_slope(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """Secant of a step: 0 where nothing crosses."""
    change = operation(x) - operation(r)  # type: ignore[operator]
    return torch.where(change == 0, 0.0, change / (x - r))


elementwise(torch.ops.fxshap.step, slope=step_slope)


@rule(torch.ops.fxshap.select, linear_in=((1, 2),))
def selection(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor, ...]:
    """Bilinear in the condition and in the difference of the branches.

    A branch that is not finite at an end where it is not chosen (the idea of a safe ``where``)
    stands still at its other value there, so that nothing infinite is multiplied by 0.
    """
    names = ("c", "a", "b")
    r = [operation[name] for name in names]
    x = list(r)
    for slot, value_r, value_x in zip(operation.slots, reference, sample, strict=True):
        r[slot], x[slot] = value_r, value_x
    (c_r, a_r, b_r), (c_x, a_x, b_x) = r, x
    a_r, a_x = (torch.where(a.isfinite() | (c > 0.5), a, other)
                for a, c, other in ((a_r, c_r, a_x), (a_x, c_x, a_r)))  # fmt: skip
    b_r, b_x = (torch.where(b.isfinite() | (c < 0.5), b, other)
                for b, c, other in ((b_r, c_r, b_x), (b_x, c_x, b_r)))  # fmt: skip
    c = (c_r + c_x) / 2
    grads = (grad * ((a_r + a_x) - (b_r + b_x)) / 2, grad * c, grad * (1 - c))
    return tuple(
        grads[slot].sum_to_size(value.shape)
        for slot, value in zip(operation.slots, reference, strict=True)
    )


