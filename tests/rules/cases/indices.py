"""Varying indices and masks, which have no derivative."""

from __future__ import annotations

import torch

from fxshap.testing.rule_check import Case, Varying
from tests.rules.cases.base import constant, v

aten = torch.ops.aten

ROW = v(5, row=None)
THREE = v(3, row=None)
PLACES = Varying((3,), row=None, indices=5)
EACH_PLACES = Varying((3,), indices=5)
MASK = Varying((5,), indices=2)

INDICES = [
    Case(aten.index_select.default, (ROW, 0, PLACES), output_row=None),
    *(
        Case(t, (ROW, [PLACES]), output_row=None)
        for t in (aten.index.Tensor, aten._unsafe_index.Tensor)
    ),
    Case(aten.take.default, (ROW, PLACES), output_row=None),
    Case(aten.embedding.default, (v(5, 2, row=None), PLACES), output_row=None),
    Case(aten.gather.default, (v(5), 1, EACH_PLACES)),
    Case(aten.take_along_dim.default, (v(5), EACH_PLACES, 1)),
    Case(aten.scatter.src, (v(5), 1, EACH_PLACES, v(3))),
    Case(aten.scatter_add.default, (v(5), 1, EACH_PLACES, v(3))),
    *(
        Case(t, (ROW, 0, PLACES, THREE), output_row=None)
        for t in (aten.index_add.default, aten.index_copy.default)
    ),
    *(
        Case(t, (ROW, [PLACES], THREE), output_row=None)
        for t in (aten.index_put.default, aten._unsafe_index_put.default)
    ),
    Case(aten.index_fill.int_Scalar, (ROW, 0, PLACES, 1.5), output_row=None),
    Case(aten.masked_fill.Scalar, (v(5), MASK, 1.5)),
    Case(aten.masked_scatter.default, (v(5, row=None), Varying((5,), row=None, indices=2),
                                       v(7, row=None)), output_row=None),
    Case(aten.where.self, (MASK, v(5), v(5))),
    *(
        Case(t, (v(1, 4, 4), v(2, 2, 2), 0, 0, False))
        for t in (aten.grid_sampler.default, aten.grid_sampler_2d.default)
    ),
    Case(aten.grid_sampler_3d.default, (v(1, 3, 3, 3), v(2, 2, 2, 3), 0, 0, False)),
    Case(aten._native_batch_norm_legit_no_training.default,
         (v(8, 3, row=None), v(3, row=None), v(3, row=None), constant(3), constant(3, low=0.5),
          0.1, 1e-5), output_row=None),
    Case(aten.batch_norm.default,
         (v(8, 3, row=None), v(3, row=None), v(3, row=None), constant(3), constant(3, low=0.5),
          False, 0.1, 1e-5, False), output_row=None),
]  # fmt: skip
