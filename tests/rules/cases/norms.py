"""Normalisations, variances and vector norms."""

from __future__ import annotations

import torch

from fxshap.testing.rule_check import Case
from tests.rules.cases.base import constant, inf, v

aten = torch.ops.aten

WEIGHT, BIAS = constant(6), constant(6)

NORMS = [
    Case(aten.layer_norm.default, (v(4, 6), [6], WEIGHT, BIAS)),
    Case(aten.layer_norm.default, (v(4, 6), [4, 6]), note="over two"),
    Case(aten.rms_norm.default, (v(4, 6), [6], WEIGHT)),
    Case(aten.rms_norm.default, (v(4, 6), [4, 6]), note="over two"),
    Case(aten.group_norm.default, (v(6, 4), 3, WEIGHT, BIAS)),
    Case(aten.group_norm.default, (v(6), 2, None, None), note="without space"),
    Case(aten.instance_norm.default,
         (v(6, 5), WEIGHT, BIAS, None, None, True, 0.1, 1e-5, False)),
    Case(aten.instance_norm.default,
         (v(6, 3, 2), None, None, None, None, True, 0.1, 1e-5, False), note="2d"),
    *(
        Case(getattr(aten, name).correction, (v(4, 6), dims), kw)
        for name in ("var", "std", "var_mean", "std_mean")
        for dims, kw in (([2], {}), ([1, 2], {"correction": 0, "keepdim": True}))
    ),
    Case(aten.var.dim, (v(4, 6), [1], False, True)),
    Case(aten.std.dim, (v(4, 6), [-1], True)),
    Case(aten.std.default, (v(4, 6, row=None),), output_row=None),
    *(
        Case(aten.linalg_vector_norm.default, (v(4, 6), order, dims, keep), note=f"{order}")
        for order, dims, keep in (
            (2, [2], False), (1, [2], False), (inf, [1], True), (-inf, [2], False), (3, [2], False),
            (1.5, [1, 2], False), (0.5, [2], True), (4, [2], False),
        )
    ),
    Case(aten.linalg_vector_norm.default, (v(4, 6, low=0.1), 0, [2]), note="0"),
    Case(aten.linalg_vector_norm.default, (v(4, 6, low=0.1), -1, [2]), note="-1"),
    Case(aten.norm.ScalarOpt_dim, (v(4, 6), 2, [2])),
    Case(aten.norm.ScalarOpt_dim, (v(4, 6), None, [2], True), note="None"),
    Case(aten.norm.ScalarOpt_dim, (v(4, 6), inf, [2]), note="inf"),
    Case(aten.norm.Scalar, (v(4, 6, row=None),), output_row=None),
    *(
        Case(t, (v(3, 4), v(2, 4), order, None), note=f"{order}")
        for t in (aten.cdist.default, aten._cdist_forward.default)
        for order in (2.0, 1.0, inf)
    ),
]  # fmt: skip
