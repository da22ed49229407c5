"""Functions of complex numbers."""

from __future__ import annotations

from typing import Any

import torch

from fxshap.testing.rule_check import EACH, Case, Varying
from tests.rules.cases.base import constant, v

aten = torch.ops.aten


def z(*shape: int, low: float = -8.0, high: float = 8.0, row: int | None = 0) -> Varying:
    """Complex numbers with parts between `low` and `high`."""
    return Varying(shape, low, high, row, is_complex=True)


def curve(target: Any, *constants: Any, low: float = -8.0, high: float = 8.0) -> Case:
    """A function of one complex number."""
    note = " ".join(["complex", *map(str, constants)])
    return Case(target, (z(40, low=low, high=high), *constants), {}, EACH, note=note)


WEIGHT = torch.complex(constant(3, 4), constant(3, 4, low=-0.5))

COMPLEX = [
    *(
        curve(getattr(aten, name).default)
        for name in (
            "abs", "sgn", "exp", "expm1", "sin", "cos", "sinh", "cosh", "square", "sqrt", "log1p",
            "asinh", "exp2", "sinc",
        )
    ),
    *(
        curve(getattr(aten, name).default, low=0.2)
        for name in ("log", "log2", "log10", "rsqrt", "reciprocal", "sigmoid", "tanh")
    ),
    curve(aten.tan.default, low=0.2, high=1.2),
    *(
        curve(getattr(aten, name).default, low=0.1, high=0.6)
        for name in ("asin", "acos", "atan", "atanh")
    ),
    curve(aten.acosh.default, low=1.5),
    *(curve(aten.pow.Tensor_Scalar, n, low=0.2) for n in (2, 3, 0.5, -1.5)),
    Case(aten.pow.Scalar, (2.5, z(40)), output_row=EACH, note="complex"),
    Case(aten.pow.Tensor_Tensor, (z(4, low=0.2), z(4, low=-1.0, high=1.0)), note="complex"),
    Case(aten.mul.Tensor, (z(3, 4), z(3, 4)), note="complex"),
    Case(aten.mul.Tensor, (z(3, 4), v(3, 4)), note="complex and real"),
    Case(aten.matmul.default, (z(3, 4), z(4, 2)), note="complex"),
    Case(aten.bmm.default, (z(3, 4), z(4, 2)), note="complex"),
    Case(aten.einsum.default, ("bij,bjk->bik", [z(3, 4), z(4, 2)]), note="complex"),
    Case(aten.einsum.default, ("bi,bi,bi->b", [z(3), z(3), z(3)]), note="three complex"),
    Case(aten.linear.default, (z(4), WEIGHT), note="complex"),
    Case(aten.conv1d.default, (z(2, 7, row=None), z(3, 2, 3, row=None)), output_row=None,
         note="complex"),
    Case(aten.prod.dim_int, (z(4, low=-2.0, high=2.0), 1), note="complex"),
    Case(aten.cumprod.default, (z(4, low=-2.0, high=2.0), 1), note="complex"),
    Case(aten.div.Tensor, (z(3, 4), z(3, 4, low=0.5)), note="complex"),
    Case(aten.div.Tensor, (z(3, 4), v(3, 4, low=0.5, high=8.0)), note="complex by real"),
    Case(aten.div.Tensor, (v(3, 4), z(3, 1, low=0.5)), note="real by complex"),
    Case(aten.div.Tensor, (constant(1), z(4, low=0.5)), note="a constant by complex"),
    *(
        Case(aten.linalg_vector_norm.default, (z(4, 6), order, [2]), note=f"complex {order}")
        for order in (2, 1, 3, float("inf"))
    ),
    *(
        Case(getattr(aten, name).correction, (z(4, 6), [2]), note="complex")
        for name in ("var", "std", "var_mean", "std_mean")
    ),
    Case(aten.stft.default, (v(3, 16, row=None), 8, 4, 8, v(8, row=None)), {"return_complex": True},
         output_row=None, note="of a computed window"),
    Case(aten.stft.default, (v(16), 8, 4, 8, constant(8)), {"return_complex": True}),
    Case(aten.istft.default, (z(5, 5), 8, 4, 8, constant(8, low=0.5))),
    Case(aten.polar.default, (v(4, low=0.0), v(4))),
]  # fmt: skip
