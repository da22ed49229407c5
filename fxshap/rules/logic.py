"""Rules of comparisons, logic and selection over 0/1 floats.

A boolean has no gradient, so attributions that pass through ``x > 0`` would be lost.
:mod:`fxshap.passes.relax_booleans` therefore turns booleans into floats. A comparison u > v becomes
a step of u - v, whose multiplier is its secant. Logic becomes products. A selection becomes

    select(c, a, b) = b + c (a - b)

which is bilinear in c and (a, b). The derivative at the midpoint is the Shapley value of the game
whose players are the condition and the branches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxshap.ops.library import select
from fxshap.rules.core.cancellation import intermediate_limit
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Tensors, rule
from fxshap.rules.core.secants import step_secant
from fxshap.rules.elementwise import elementwise

elementwise(torch.ops.fxshap.step, secant=step_secant)


def branch_mean(
    r: Tensor, x: Tensor, selected_r: Tensor, selected_x: Tensor, limit: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the mean of a branch over both endpoints, and a float: 1 where the branch varies.

    An endpoint at which the branch is neither selected nor within `limit` is replaced by the other.
    """
    usable_r, usable_x = ((value.abs() <= limit) & value.isfinite() for value in (r, x))
    usable_r, usable_x = usable_r | selected_r, usable_x | selected_x
    filled_r, filled_x = torch.where(usable_r, r, x), torch.where(usable_x, x, r)
    mean = torch.where(usable_r | usable_x, (filled_r + filled_x) / 2, 0.0)
    return mean, (usable_r & usable_x).to(r.dtype)


@rule(torch.ops.fxshap.select, linear_in=((1, 2),))
def selection(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor, ...]:
    """Bilinear in the condition and in the difference of the branches.

    A branch may be huge or not finite at an endpoint where it is not selected, such as the
    logarithm in ``where(x > 0, log(x), 0)``. It is then held constant at its value at the other
    endpoint, and the condition receives the whole change.
    """
    names = ("condition", "a", "b")
    r = [operation[name] for name in names]
    x = list(r)
    for slot, value_r, value_x in zip(operation.slots, reference, sample, strict=True):
        r[slot], x[slot] = value_r, value_x
    (c_r, a_r, b_r), (c_x, a_x, b_x) = r, x
    c = (c_r + c_x) / 2
    limit = intermediate_limit(torch.maximum(select(*r).abs(), select(*x).abs()))
    a, varies_a = branch_mean(a_r, a_x, c_r > 0.5, c_x > 0.5, limit)
    b, varies_b = branch_mean(b_r, b_x, c_r < 0.5, c_x < 0.5, limit)
    grads = (grad * (a - b), grad * c * varies_a, grad * (1 - c) * varies_b)
    return tuple(
        grads[slot].sum_to_size(value.shape)
        for slot, value in zip(operation.slots, reference, strict=True)
    )
