"""Maxima, minima and max pooling."""

from __future__ import annotations

import torch

from fxshap.testing.rule_check import Case
from tests.rules.cases.base import constant, v

aten = torch.ops.aten

MAXIMA = [
    *(
        Case(t, args, note=note)
        for top, whole, dim in (
            (aten.amax.default, aten.max.default, aten.max.dim),
            (aten.amin.default, aten.min.default, aten.min.dim),
        )
        for t, args, note in (
            (top, (v(3, 4), [1]), ""),
            (top, (v(3, 4), [1, 2], True), "over two"),
            (dim, (v(3, 4), 1), ""),
            (dim, (v(3, 4), -1, True), "kept"),
        )
    ),
    *(
        Case(t, args)
        for t in (aten.cummax.default, aten.cummin.default)
        for args in ((v(5), 1), (v(4, 3), -2))
    ),
    Case(aten.max.default, (v(3, 4, row=None),), output_row=None),
    Case(aten.min.default, (v(3, 4, row=None),), output_row=None),
    *(
        Case(t, args, note=note)
        for t in (
            aten.maximum.default, aten.max.other, aten.fmax.default,
            aten.minimum.default, aten.min.other, aten.fmin.default,
        )
        for args, note in (
            ((v(3, 4), v(3, 4)), ""),
            ((v(3, 4), v(1, 4)), "broadcast"),
            ((v(3, 4), constant(4)), "and a constant"),
            ((constant(4), v(3, 4)), "of a constant and"),
        )
    ),
    Case(aten.max_pool1d.default, (v(2, 9), [2])),
    Case(aten.max_pool1d.default, (v(2, 9), [3], [2], [1], [2], True), note="all options"),
    Case(aten.max_pool1d_with_indices.default, (v(2, 9), [3], [1])),
    Case(aten.max_pool2d.default, (v(2, 5, 6), [2])),
    Case(aten.max_pool2d.default, (v(1, 5, 6), [3, 2], [2, 1], [1, 0], [1, 2], True),
         note="all options"),
    Case(aten.max_pool2d_with_indices.default, (v(1, 5, 6), [3, 3], [2, 2], [1, 1])),
    Case(aten.max_pool3d.default, (v(1, 4, 4, 4), [2])),
    Case(aten.max_pool3d.default, (v(1, 4, 4, 5), [2, 2, 3], [1, 2, 2], [1, 0, 1], [2, 1, 1], True),
         note="all options"),
    Case(aten.max_pool3d_with_indices.default, (v(1, 4, 4, 4), [3, 3, 3], [2, 2, 2], [1, 1, 1])),
    Case(aten.adaptive_max_pool1d.default, (v(2, 7), [3])),
    Case(aten.adaptive_max_pool2d.default, (v(2, 5, 7), [3, 2])),
    Case(aten.adaptive_max_pool3d.default, (v(1, 3, 4, 5), [2, 2, 3])),
]  # fmt: skip
