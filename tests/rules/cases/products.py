"""Products and quotients."""

from __future__ import annotations

import torch

from fxshap.testing.rule_check import Case
from tests.rules.cases.base import AWAY, NEAR, constant, v

aten = torch.ops.aten

PRODUCTS = [
    *(Case(t, (v(3, 4), v(3, 4))) for t in (aten.mul.Tensor, aten.multiply.Tensor)),
    Case(aten.mul.Tensor, (v(3, 4), v(1, 4)), note="broadcast"),
    *(Case(t, (v(3, 4), v(4, 2))) for t in (aten.matmul.default, aten.linalg_matmul.default)),
    Case(aten.bmm.default, (v(3, 4), v(4, 2))),
    Case(aten.matmul.default, (v(2, 3, 4), v(1, 4, 2)), note="broadcast"),
    *(
        Case(t, (v(3, 4, row=None), v(4, 2, row=None)), output_row=None)
        for t in (aten.mm.default, aten.kron.default)
    ),
    Case(aten.inner.default, (v(3, 4, row=None), v(2, 4, row=None)), output_row=None),
    Case(aten.mv.default, (v(3, 4, row=None), v(4, row=None)), output_row=None),
    *(
        Case(t, (v(5, row=None), v(5, row=None)), output_row=None)
        for t in (aten.dot.default, aten.vdot.default, aten.outer.default, aten.ger.default)
    ),
    Case(aten.cross.default, (v(3), v(3), 1)),
    Case(aten.linalg_cross.default, (v(3), v(3))),
    Case(aten.linalg_vecdot.default, (v(3, 4), v(3, 4))),
    Case(
        aten.tensordot.default, (v(3, 4, row=None), v(4, 2, row=None), [1], [0]), output_row=None
    ),
    Case(aten.linear.default, (v(5, 4, row=None), v(3, 4, row=None), v(3, row=None)),
         output_row=None),
    Case(aten.conv1d.default, (v(2, 7, row=None), v(3, 2, 3, row=None), v(3, row=None)),
         output_row=None),
    Case(aten.conv2d.default, (v(1, 4, 5, row=None), v(2, 1, 3, 2, row=None), None, [2, 1], [1, 0]),
         output_row=None),
    Case(aten.conv3d.default, (v(1, 3, 3, 3, row=None), v(2, 1, 2, 2, 2, row=None)),
         output_row=None),
    Case(aten.convolution.default,
         (v(2, 4, 6, row=None), v(4, 1, 3, row=None), None, [1], [2], [2], False, [0], 4),
         output_row=None, note="depthwise"),
    Case(aten.conv_transpose1d.default, (v(2, 5, row=None), v(2, 3, 3, row=None)), output_row=None),
    Case(aten.conv_transpose2d.input, (v(1, 3, 3, row=None), v(1, 2, 2, 2, row=None)),
         output_row=None),
    Case(aten.conv_transpose3d.input, (v(1, 2, 2, 2, row=None), v(1, 2, 2, 2, 2, row=None)),
         output_row=None),
    Case(aten.addmm.default, (constant(2), v(3, 4, row=None), v(4, 2, row=None)),
         {"alpha": 0.5, "beta": 2.0}, output_row=None),
    Case(aten.addmv.default, (v(3, row=None), v(3, 4, row=None), v(4, row=None)), output_row=None),
    Case(aten.addbmm.default, (v(3, 2, row=None), v(5, 3, 4, row=None), v(5, 4, 2, row=None)),
         output_row=None),
    Case(aten.baddbmm.default, (v(3, 2), v(3, 4), v(4, 2))),
    Case(aten.addr.default, (constant(3, 4), v(3, row=None), v(4, row=None)), output_row=None),
    Case(aten.addcmul.default, (v(3), v(3), v(3)), {"value": -0.5}),
    Case(aten.bilinear.default, (v(3), v(4), constant(2, 3, 4), constant(2))),
    Case(aten.bilinear.default, (constant(5, 3), v(5, 4, row=None), v(2, 3, 4, row=None)),
         output_row=None, note="of computed weights"),
    Case(aten.bilinear.default, (v(5, 3, row=None, **NEAR), v(5, 4, row=None, **NEAR),
                                 v(2, 3, 4, row=None, **NEAR), v(2, row=None)),
         output_row=None, note="of everything"),
    Case(aten.einsum.default, ("bij,bjk->bik", [v(3, 4), v(4, 2)])),
    Case(aten.einsum.default, ("bij,bj,j->bi", [v(3, 4), v(4), constant(4)]),
         note="and a constant"),
    Case(aten.einsum.default, ("bi,bi,bi->b", [v(3, **NEAR), v(3, **NEAR), v(3, **NEAR)]),
         note="of three"),
    Case(aten.prod.dim_int, (v(5, **NEAR), 1)),
    Case(aten.prod.dim_int, (v(3, 12, low=-1.5, high=1.5), 2, True), note="of many"),
    Case(aten.prod.default, (v(2, row=None, **NEAR),), output_row=None),
    Case(aten.cumprod.default, (v(5, **NEAR), 1)),
    Case(aten.cumprod.default, (v(9, 2, low=-1.5, high=1.5), -2), note="of many"),
    Case(aten.lerp.Tensor, (v(3), v(3), v(3))),
    Case(aten.lerp.Tensor, (constant(3), v(3), v(3)), note="from a constant"),
    *(
        Case(t, (v(3, 4), v(3, 4, **AWAY)))
        for t in (aten.div.Tensor, aten.divide.Tensor, aten.true_divide.Tensor)
    ),
    Case(aten.div.Tensor, (constant(1), v(4, low=1e-2)), note="of a constant"),
    Case(aten.div.Tensor, (v(3, 4), v(3, 1, **AWAY)), note="broadcast"),
    Case(aten.copysign.Tensor, (v(3, 4), v(3, 1, **AWAY))),
    Case(aten.copysign.Tensor, (constant(3), v(3, **AWAY)), note="of a constant"),
    Case(aten.copysign.Scalar, (v(3), -2.0)),
    Case(torch.ops.fxshap.select.default, (v(5, low=0.0, high=0.0), v(5), v(5))),
]  # fmt: skip
