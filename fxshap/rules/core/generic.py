"""The rule of operations without one of their own: an averaged gradient with a correction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxshap.ops.dtypes import differentiable
from fxshap.rules.core.correction import correct
from fxshap.rules.core.operation import Operation, vjp
from fxshap.rules.core.registry import Rule, Tensors

#: Nodes and weights of 3-point Gauss-Legendre quadrature on [0, 1].
GAUSS_LEGENDRE = ((0.1127016653792583, 5 / 18), (0.5, 8 / 18), (0.8872983346207417, 5 / 18))


def generic(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor | None, ...]:
    """Average the vector-Jacobian products along the path and restore the finite difference.

    The average over 3 Gauss-Legendre points of the straight path from reference to sample is
    integrated gradients of one operation (Sundararajan et al. 2017, eq. 1). Indices and other
    arguments without a derivative are taken from either endpoint, and the results averaged. What
    the average lacks of the finite difference is added along the difference itself, the smallest
    correction that restores it, row by row (Broyden 1965, "good" update):

        grad_j += (<g, dy> - <grad, d>) * d_j / <d, d>
    """
    sample = [x.expand_as(r) for r, x in zip(reference, sample, strict=True)]
    moving = [differentiable(r) for r in reference]
    constants = (reference,) if all(moving) else (reference, sample)
    average = [torch.zeros_like(r) if m else None for r, m in zip(reference, moving, strict=True)]
    for endpoint in constants:
        for t, weight in GAUSS_LEGENDRE:
            point = [
                torch.lerp(r, x, t) if m else constant
                for r, x, constant, m in zip(reference, sample, endpoint, moving, strict=True)
            ]
            for total, part in zip(average, vjp(operation, point, grad), strict=True):
                if total is not None and part is not None:
                    # At a singularity on the path (an angle at 0) only the endpoints count.
                    total.add_(part.nan_to_num(0.0, 0.0, 0.0), alpha=weight / len(constants))
    return correct(operation, reference, sample, grad, average)


GENERIC = Rule("generic", generic, closed_form=False)
