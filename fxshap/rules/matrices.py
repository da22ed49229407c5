"""Factorisations and solvers that read one triangle of a matrix.

PyTorch's derivative of the eigenvalues of a symmetric matrix is symmetric too. But only the
triangle that is read can matter, so the generic rule gets a function of that triangle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxshap._compat import existing_packets
from fxshap.ops.schemas import named_arguments
from fxshap.rules.core.generic import generic
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Tensors, rule

aten = torch.ops.aten


class Triangle(NamedTuple):
    """Which triangle of which argument an operator reads.

    Attributes
    ----------
    matrix, upper : str
        The names of the matrix, and of the argument that is True or "U" for its upper triangle.
    hermitian : bool
        Whether the other triangle is the conjugate transpose of the one that is read, and not 0.
    """

    matrix: str
    upper: str = "upper"
    hermitian: bool = False


TRIANGLES: dict[Any, Triangle] = {
    **dict.fromkeys(existing_packets("cholesky"), Triangle("self", hermitian=True)),
    aten.linalg_cholesky_ex: Triangle("self", hermitian=True),
    aten._linalg_eigh: Triangle("A", "UPLO", hermitian=True),
    aten.linalg_cholesky: Triangle("self", hermitian=True),
    aten.linalg_eigh: Triangle("self", "UPLO", hermitian=True),
    aten.linalg_eigvalsh: Triangle("self", "UPLO", hermitian=True),
    aten.cholesky_inverse: Triangle("self"),
    aten.cholesky_solve: Triangle("input2"),
}


def of_triangle(target: Any, triangle: Triangle) -> Callable[..., Any]:
    """Return an operator as a function of one triangle of its matrix."""

    def function(*args: Any, **kwargs: Any) -> Any:
        arguments = named_arguments(target, args, kwargs)
        matrix: Tensor = arguments[triangle.matrix]
        upper = arguments[triangle.upper] in (True, "U")
        half = matrix.triu() if upper else matrix.tril()
        if triangle.hermitian:
            strict = half.triu(1) if upper else half.tril(-1)
            diagonal = half.diagonal(dim1=-2, dim2=-1)
            if half.is_complex():  # the diagonal of a Hermitian matrix is real
                diagonal = torch.complex(diagonal.real, torch.zeros_like(diagonal.real))
            half = strict + strict.mH + torch.diag_embed(diagonal)
        return target(**{**arguments, triangle.matrix: half})

    return function


@rule(*TRIANGLES, closed_form=False, name="generic")
def triangle(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor | None, ...]:
    """The generic rule for the function of one triangle."""
    target: Any = operation.target
    function = of_triangle(target, TRIANGLES[target.overloadpacket])
    return generic(replace(operation, target=function), reference, sample, grad)
