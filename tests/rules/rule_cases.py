"""One case or more for every operation with a rule; `fxshap.testing.rule_check.check` passes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import fxshap.rules  # noqa: F401, it fills the table
from fxshap.testing.rule_check import EACH, ROWS, Case, Varying

aten = torch.ops.aten
inf = math.inf


def v(*shape: int, low: float = -inf, high: float = inf, row: int | None = 0) -> Varying:
    return Varying(shape, low, high, row)


def constant(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


# --- univariate functions -----------------------------------------------------------------------


def curve(target: Any, *constants: Any, low: float = -inf, high: float = inf, **kw: Any) -> Case:
    note = " ".join(str(c) for c in (*constants, *kw.values()) if not isinstance(c, Tensor))
    return Case(target, (v(40, low=low, high=high), *constants), kw, EACH, note=note)


ANYWHERE = [
    curve(getattr(aten, name).default)
    for name in (
        "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "hardshrink", "softshrink",
        "leaky_relu", "rrelu", "sigmoid", "special_expit", "tanh", "silu", "mish", "softplus",
        "log_sigmoid", "elu", "selu", "celu", "gelu", "erf", "special_erf", "erfc", "special_erfc",
        "special_ndtr", "sin", "cos", "square", "abs", "sign", "sgn", "floor", "ceil", "round",
        "trunc", "fix", "frac", "nan_to_num", "atan", "asinh", "sinc", "special_sinc",
        "special_i0e", "special_i1e", "deg2rad", "rad2deg",
    )
]  # fmt: skip

CURVES = [
    *ANYWHERE,
    curve(aten.gelu.default, approximate="tanh"),
    curve(aten.hardtanh.default, -0.5, 2.0),
    curve(aten.clamp.default, -1.0, 0.5),
    curve(aten.clamp.default, None, 0.5),
    curve(aten.clip.default, -1.0, 0.5),
    curve(aten.clamp_min.default, 0.5),
    curve(aten.clamp_max.default, 0.5),
    curve(aten.threshold.default, 0.5, 20.0),
    curve(aten.leaky_relu.default, 0.2),
    curve(aten.leaky_relu.default, -0.3),
    curve(aten.prelu.default, constant(40)),
    curve(aten._prelu_kernel.default, constant(1, 40)),
    curve(aten.heaviside.default, constant(1)),
    curve(aten.hardshrink.default, 1.5),
    curve(aten.softshrink.default, 0.3),
    curve(aten.softplus.default, 2.0, 5.0),
    curve(aten.elu.default, 0.7, 1.3, 0.6),
    curve(aten.celu.default, 1.7),
    curve(aten.round.decimals, decimals=1),
    *(
        curve(getattr(aten, name).default, high=80)
        for name in ("exp", "expm1", "exp2", "special_exp2", "special_expm1")
    ),
    *(
        curve(getattr(aten, name).default, low=-80, high=80)
        for name in ("sinh", "cosh", "i0", "special_i0", "special_i1")
    ),
    *(
        curve(getattr(aten, name).default, low=1e-6)
        for name in ("log", "log2", "log10", "sqrt", "rsqrt", "reciprocal", "special_entr")
    ),
    curve(aten.sqrt.default, low=0.0),
    curve(aten.reciprocal.default, high=-1e-3),
    curve(aten.log1p.default, low=-1 + 1e-6),
    curve(aten.special_log1p.default, low=-1 + 1e-6),
    *(
        curve(getattr(aten, name).default, low=-0.999, high=0.999)
        for name in ("asin", "acos", "atanh", "erfinv")
    ),
    curve(aten.tan.default, low=-1.5, high=1.5),
    curve(aten.acosh.default, low=1.001),
    *(
        curve(getattr(aten, name).default, low=0.1)
        for name in ("lgamma", "special_gammaln", "digamma", "special_digamma")
    ),
    *(
        curve(getattr(aten, name).default, None, low=1e-3, high=1 - 1e-3)
        for name in ("logit", "special_logit")
    ),
    curve(aten.logit.default, 0.01, low=0.0, high=1.0),
    curve(aten.special_ndtri.default, low=1e-3, high=1 - 1e-3),
    curve(aten.special_log_ndtr.default, low=-30),
    curve(aten.special_erfcx.default, low=-5),
    *(curve(aten.pow.Tensor_Scalar, n) for n in (0, 1, 2, 3, 4, 5, 7, 9)),
    *(
        curve(aten.pow.Tensor_Scalar, n, low=1e-3)
        for n in (-3, -2, -1, -0.5, 0.5, 1.5, 2.5, -0.7, 10)
    ),
    curve(aten.pow.Tensor_Scalar, 1.5, low=0.0),
    Case(aten.pow.Scalar, (2.5, v(40, high=80)), note="2.5"),
    Case(aten.pow.Scalar, (0.3, v(40, low=-60)), note="0.3"),
    curve(torch.ops.fxshap.step.default, "gt"),
    curve(torch.ops.fxshap.step.default, "le"),
]

# --- products and quotients ---------------------------------------------------------------------

NEAR = {"low": -4.0, "high": 4.0}
AWAY = {"low": 0.5, "high": 8.0}

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

# --- softmax ------------------------------------------------------------------------------------

LOGITS = {"ordinary": v(5, 6), "masked": Varying((5, 6), masked=True)}

SOFTMAX = [
    *(
        Case(t, (logits, 2), note=note)
        for note, logits in LOGITS.items()
        for t in (
            aten.softmax.int, aten.special_softmax.default, aten._safe_softmax.default,
            aten.log_softmax.int, aten.special_log_softmax.default,
        )
    ),
    Case(aten._softmax.default, (v(5, 6), 1, False)),
    Case(aten._log_softmax.default, (v(5, 6), 1, False)),
    Case(aten.logsumexp.default, (v(5, 6), [2])),
    Case(aten.logsumexp.default, (v(5, 6), [1, -1], True), note="over two"),
    Case(aten.logsumexp.default, (LOGITS["masked"], [2]), note="masked"),
    Case(aten.special_logsumexp.default, (v(5, 6), [1])),
]  # fmt: skip

# --- maxima -------------------------------------------------------------------------------------

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

# --- norms --------------------------------------------------------------------------------------

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

# --- varying indices and masks, which have no derivative ----------------------------------------

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

# --- operations without a closed form -----------------------------------------------------------

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
    Case(aten.linalg_inv.default, (Varying((1, 1), low=0.5, high=2.0),)),
]

# --- multivariate functions, norms of matrices, scatters and quantiles --------------------------

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
    Case(aten.angle.default, (v(5),)),
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

# --- recurrent networks -------------------------------------------------------------------------


def recurrent(
    target: Any,
    gates: int,
    *,
    layers: int = 1,
    directions: int = 1,
    projection: int = 0,
    biases: bool = True,
    batch_first: bool = False,
    state: bool = False,
    note: str = "",
) -> Case:
    """Return a case of recurrent layers over 5 steps of 3 features, with 4 hidden units."""
    features, hidden = 3, 4
    output = projection or hidden
    sizes = [features] + [output * directions] * (layers - 1)
    weights: list[Tensor] = []
    for size in (size for size in sizes for _ in range(directions)):
        shapes = [(gates * hidden, size), (gates * hidden, output)]
        shapes += [(gates * hidden,)] * 2 if biases else []
        shapes += [(projection, hidden)] if projection else []
        weights += [constant(*shape) for shape in shapes]
    count = layers * directions
    widths = (output, hidden) if target is aten.lstm.input else (output,)
    states = [v(count, w, row=1) if state else torch.zeros(count, ROWS, w) for w in widths]
    sequence = v(5, features, row=0 if batch_first else 1)
    initial = states if target is aten.lstm.input else states[0]
    options = (biases, layers, 0.0, False, directions == 2, batch_first)
    args = (sequence, initial, weights, *options)
    return Case(target, args, output_row=0 if batch_first else 1, state_row=1, note=note)


CELLS = [
    (aten.lstm.input, 4), (aten.gru.input, 3), (aten.rnn_tanh.input, 1), (aten.rnn_relu.input, 1),
]  # fmt: skip

RECURRENT = [
    *(
        recurrent(target, gates, note=note, **options)
        for target, gates in CELLS
        for note, options in {
            "": {},
            "batch first": {"batch_first": True},
            "without biases": {"biases": False},
            "bidirectional, stacked": {"layers": 2, "directions": 2},
            "of a computed state": {"layers": 2, "directions": 2, "state": True},
        }.items()
    ),
    recurrent(aten.lstm.input, 4, projection=2, note="projected"),
    recurrent(aten.lstm.input, 4, projection=2, layers=2, directions=2, biases=False, state=True,
              batch_first=True, note="with everything"),
]  # fmt: skip


ours = torch.ops.fxshap

CHOICES = [
    Case(ours.ranks.default, (v(5), "argmax", 0, 1), note="argmax"),
    Case(ours.ranks.default, (v(5), "argmin", 0, 1), note="argmin"),
    Case(ours.ranks.default, (v(4, 6), "topk", 0, 3), note="topk"),
    Case(ours.ranks.default, (v(6), "least", 0, 2), note="least"),
    Case(ours.ranks.default, (v(5), "ascending", 0, 5), note="ascending"),
    Case(ours.ranks.default, (v(3, 5), "descending", 0, 5), note="descending"),
    Case(ours.ranks.default, (v(5), "kth", 2, 1), note="kth"),
    Case(ours.one_hot_position.default, (v(5), 7)),
]

ALL = [
    *CURVES, *PRODUCTS, *SOFTMAX, *MAXIMA, *NORMS, *INDICES, *GENERIC, *MULTIVARIATE, *RECURRENT,
    *CHOICES,
]  # fmt: skip
