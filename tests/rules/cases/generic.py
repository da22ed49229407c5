"""Operations without a closed form."""

from __future__ import annotations

import torch

from fxshap._compat import existing_packets
from fxshap.testing.rule_check import Case, Varying
from tests.rules.cases.base import AWAY, NEAR, constant, v

aten = torch.ops.aten

GENERIC = [
    Case(aten.sort.default, (v(5), 1)),
    Case(aten.sort.default, (v(4, 3), 1, True)),
    Case(aten.sort.stable, (v(5),), {"stable": True, "dim": 1}),
    Case(aten.topk.default, (v(5), 3)),
    Case(aten.topk.default, (v(4, 3), 2, 1, False)),
    Case(aten.median.dim, (v(5), 1)),
    Case(aten.median.dim, (v(4, 3), 1, True)),
    Case(aten.nanmedian.dim, (v(5), 1)),
    Case(aten.kthvalue.default, (v(5), 2, 1)),
    Case(aten.kthvalue.default, (v(4, 3), 3, 1, True)),
    Case(aten.atan2.default, (v(5), v(5))),
    Case(aten.pow.Tensor_Tensor, (v(5, **AWAY), v(5, **NEAR))),
    Case(aten.remainder.Scalar, (v(5), 0.7)),
    Case(aten.div.Tensor_mode, (v(3, 4), v(3, 4, **AWAY)), {"rounding_mode": "floor"}),
    Case(aten.div.Tensor_mode, (v(3, 4), constant(4, low=0.5)), {"rounding_mode": "trunc"}),
    Case(aten.divide.Tensor_mode, (v(3, 4), constant(4, low=0.5)), {"rounding_mode": "floor"}),
    Case(aten.div.Scalar_mode, (v(3, 4), 0.5), {"rounding_mode": "floor"}),
    Case(aten.divide.Scalar_mode, (v(3, 4), 0.5), {"rounding_mode": "floor"}),
    Case(aten.logcumsumexp.default, (v(5), 1)),
    Case(aten.clamp.Tensor, (v(5), v(5), constant(5))),
    Case(aten._prelu_kernel.default, (v(5), v(5)), note="with a computed weight"),
    Case(aten.xlogy.Tensor, (v(), v(low=0.1)), note="of one value a row"),
    Case(aten.linalg_svdvals.default, (v(3, 2),)),
    *(
        Case(t, (v(1, 1, low=0.5, high=9.0),))
        for t in (
            *(packet.default for packet in existing_packets("cholesky")),
            aten.linalg_cholesky.default,
            aten.linalg_cholesky_ex.default,
            aten.cholesky_inverse.default,
            aten._linalg_eigh.default,
            aten.linalg_eigh.default,
        )
    ),
    Case(aten.linalg_eigvalsh.default, (v(3, 3), "U")),
    Case(aten.cholesky_solve.default, (v(1, 2), v(1, 1, low=0.5, high=9.0))),
    Case(aten.gradient.scalarint, (v(5),), {"dim": 1}),
    Case(aten.linalg_inv.default, (Varying((1, 1), low=0.5, high=2.0),)),
]
