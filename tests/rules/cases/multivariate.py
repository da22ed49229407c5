"""Functions of a few numbers, norms of matrices, scatters and quantiles."""

from __future__ import annotations

import torch

from fxshap.testing.rule_check import EACH, Case
from tests.rules.cases.base import AWAY, NEAR, constant, inf, v

aten = torch.ops.aten

INDEX = torch.arange(15).reshape(5, 3) * 7 % 4, torch.arange(20).reshape(4, 5) * 5 // 2 % 3

MULTIVARIATE = [
    Case(aten.arctan2.default, (v(5), v(5))),
    Case(aten.atan2.default, (v(4, 5), v(1, 5)), note="broadcast"),
    Case(aten.hypot.default, (v(5), v(5))),
    Case(aten.copysign.Tensor, (v(5), v(5))),
    Case(aten.xlogy.Tensor, (v(5), v(5, low=0.1))),
    Case(aten.special_xlogy.default, (v(5), v(5, low=0.1))),
    Case(aten.special_xlog1py.default, (v(5), v(5, low=-0.5))),
    Case(aten.pow.Tensor_Tensor, (constant(5, low=0.5), v(5, **NEAR)), note="of a constant"),
    Case(aten.fmod.Tensor, (v(5), v(5, **AWAY))),
    Case(aten.fmod.Scalar, (v(5), 0.7)),
    Case(aten.remainder.Tensor, (v(5), v(5, **AWAY))),
    Case(aten.clamp.Tensor, (v(5), v(5), v(5)), note="three numbers"),
    Case(aten.clip.Tensor, (v(5), v(5), None), note="two numbers"),
    *(
        Case(aten.grid_sampler.default, (v(2, 4, 4), v(3, 2, 2), mode, padding, align),
             note=f"{mode} {padding} {align}")
        for mode in (0, 1, 2) for padding in (0, 1, 2) for align in (False, True)
    ),
    Case(aten.grid_sampler.default, (constant(3, 2, 4, 4), v(3, 3, 2, 2, row=None), 0, 0, True),
         output_row=None, note="of constant images"),
    Case(aten.grid_sampler_3d.default, (v(2, 3, 3, 3), v(2, 2, 2, 3), 1, 1, True), note="nearest"),
    *(Case(t, (v(3, 3, low=-0.4, high=0.4),)) for t in (aten.linalg_det.default, aten.det.default)),
    Case(aten.angle.default, (v(40),), output_row=EACH),
    Case(aten.msort.default, (v(5, row=None),), output_row=None),
    *(Case(aten.linalg_norm.default, (v(4, 3), order, dim, keep), note=f"{order} {dim} {keep}")
      for order, dim, keep in ((None, [1, 2], True), (3, [1], False),
                               (1, [1, 2], False), (-inf, [2, 1], True), (2, [1, 2], True))),
    Case(aten.linalg_norm.default, (v(4, 3, row=None),), output_row=None, note="of everything"),
    Case(aten.linalg_norm.ord_str, (v(4, 3), "nuc", [1, 2], True)),
    *(Case(aten.linalg_matrix_norm.default, (v(4, 3), order), note=str(order))
      for order in (1, -1, 2, -2, inf, -inf)),
    *(Case(aten.linalg_matrix_norm.str_ord, (v(4, 3), name, [-2, -1], keep), note=f"{name} {keep}")
      for name in ("fro", "nuc") for keep in (False, True)),
    *(Case(aten.scatter_reduce.two, (v(4, 3, row=None), dim, INDEX[dim], src, reduce),
           {"include_self": own}, output_row=None, note=f"{reduce} {dim} {own}")
      for reduce in ("sum", "mean", "prod", "amax", "amin")
      for dim, src in ((0, v(5, 3, row=None)), (1, v(4, 5, row=None))) for own in (True, False)),
    *(Case(aten.quantile.default, (v(6, 3), constant(3, low=0.0), dim, keep),
           {"interpolation": mode}, output_row=1, note=f"{mode} {dim} {keep}")
      for mode, dim, keep in (("linear", 1, False), ("lower", -1, True), ("higher", 1, True),
                             ("nearest", 2, False), ("midpoint", 1, False))),
    *(Case(aten.quantile.scalar, (v(6, 3), 0.3, 1, keep), note=f"{keep}")
      for keep in (False, True)),
    *(Case(aten.quantile.default, (v(6, 3, row=None), constant(3, low=0.0), None, keep),
           output_row=None, note=f"of everything {keep}") for keep in (False, True)),
    *(Case(aten.quantile.scalar, (v(6, 3, row=None), 0.3, None, keep), output_row=None,
           note=f"of everything {keep}") for keep in (False, True)),
]  # fmt: skip
