"""Functions of one number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxshap.testing.rule_check import EACH, Case
from tests.rules.cases.base import constant, inf, v

aten = torch.ops.aten


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
