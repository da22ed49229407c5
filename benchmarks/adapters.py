"""The attribution methods that the benchmarks compare, behind one signature.

A method takes a model, the references and the number of outputs, and returns a function that
explains samples. Inputs are sequences with one tensor an input of the model, of shape (rows, ...).
Attributions are one tensor of shape (samples, features, outputs): the features of all inputs one
after another, the mean over the references.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import captum.attr
import shap
import torch
from tangermeme.deep_lift_shap import _nonlinear, deep_lift_shap, integrated_gradients_op
from torch import Tensor, nn

import fxshap
from tests.networks.network import Shape

Inputs = Sequence[Tensor]
Explain = Callable[[Inputs], Tensor]
Method = Callable[[nn.Module, Inputs, int], Explain]

#: Rules of tangermeme's own that a user can give it for modules that its table does not list.
TANGERMEME_OPS = {
    module: _nonlinear
    for module in (
        nn.Hardshrink,
        nn.Hardsigmoid,
        nn.Hardswish,
        nn.Hardtanh,
        nn.Softsign,
        nn.Tanhshrink,
        nn.Threshold,
    )
} | {
    module: integrated_gradients_op(K=32)
    for module in (
        nn.AdaptiveMaxPool1d,
        nn.GroupNorm,
        nn.InstanceNorm1d,
        nn.LogSoftmax,
        nn.MaxPool3d,
    )
}


def join(tensors: Inputs) -> Tensor:
    """Join the inputs of a network into one (rows, features) tensor."""
    return torch.cat([tensor.flatten(1) for tensor in tensors], dim=1)


def split(flat: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
    """Undo :func:`join`."""
    pieces = flat.split([math.prod(shape) for shape in shapes], dim=1)
    return tuple(piece.reshape(-1, *shape) for piece, shape in zip(pieces, shapes, strict=True))


class Flat(nn.Module):
    """A network behind one input of shape (rows, 1, features), which tangermeme wants."""

    def __init__(self, model: nn.Module, shapes: Sequence[Shape]) -> None:
        super().__init__()
        self.model = model
        self.shapes = shapes

    def forward(self, x: Tensor) -> Tensor:
        """Split the input and call the network."""
        return self.model(*split(x.flatten(1), self.shapes))


def with_shap(
    model: nn.Module, references: Inputs, outputs: int, *, check_additivity: bool = False
) -> Explain:
    """Explain with unmodified ``shap.DeepExplainer``."""
    one = len(references) == 1
    explainer = shap.DeepExplainer(model, references[0] if one else list(references))

    def explain(samples: Inputs) -> Tensor:
        values = explainer.shap_values(
            samples[0] if one else list(samples), check_additivity=check_additivity
        )
        pieces = [torch.from_numpy(value).flatten(1, -2) for value in ([values] if one else values)]
        return torch.cat(pieces, dim=1)

    return explain


def with_fxshap(
    model: nn.Module,
    references: Inputs,
    outputs: int,
    *,
    check_additivity: bool = False,
    **options: Any,
) -> Explain:
    """Explain with unmodified SHAP on the explainable model."""
    explainable = fxshap.make_explainable(model, **options)
    return with_shap(explainable, references, outputs, check_additivity=check_additivity)


def with_captum(
    model: nn.Module, references: Inputs, outputs: int, *, at_once: int | None = None
) -> Explain:
    """Explain with Captum's DeepLiftShap, output by output, all or `at_once` samples at a time."""
    method = captum.attr.DeepLiftShap(model)
    if len(references[0]) == 1:  # it wants two at least
        references = [torch.cat([reference, reference]) for reference in references]
    baselines = tuple(references)

    def explain_part(samples: Inputs) -> Tensor:
        columns = [
            join(method.attribute(tuple(samples), baselines, k)).detach().cpu()
            for k in range(outputs)
        ]
        return torch.stack(columns, dim=-1)

    def explain(samples: Inputs) -> Tensor:
        parts = zip(*(x.split(at_once or len(x)) for x in samples), strict=True)
        return torch.cat([explain_part(part) for part in parts])

    return explain


def with_integrated_gradients(model: nn.Module, references: Inputs, outputs: int) -> Explain:
    """Explain with Captum's integrated gradients, 64 Gauss-Legendre steps a reference."""
    method = captum.attr.IntegratedGradients(model)
    rows = [tuple(row) for row in zip(*(tensor.split(1) for tensor in references), strict=True)]

    def attribute(samples: Inputs, target: int) -> Tensor:
        each = [join(method.attribute(tuple(samples), row, target, n_steps=64)) for row in rows]
        return torch.stack(each).mean(0)

    return lambda samples: torch.stack(
        [attribute(samples, target) for target in range(outputs)], dim=-1
    ).detach()


def with_expected_gradients(
    model: nn.Module, references: Inputs, outputs: int, *, points: int = 64
) -> Explain:
    """Explain with SHAP's GradientExplainer: gradients at random points to random references."""
    one = len(references) == 1
    model = copy.deepcopy(model).float()  # it converts what it draws to float32
    background = [reference.float() for reference in references]
    explainer = shap.GradientExplainer(model, background[0] if one else background)

    def explain(samples: Inputs) -> Tensor:
        rows = [sample.float() for sample in samples]
        values = explainer.shap_values(rows[0] if one else rows, nsamples=points, rseed=0)
        pieces = [torch.from_numpy(value).flatten(1, -2) for value in ([values] if one else values)]
        return torch.cat(pieces, dim=1)

    return explain


def with_tangermeme(
    model: nn.Module, references: Inputs, outputs: int, *, at_once: int = 1
) -> Explain:
    """Explain with tangermeme's deep_lift_shap, output by output, `at_once` samples at a time."""
    flat = Flat(model, [tuple(reference.shape[1:]) for reference in references])
    r = join(references)

    def explain(samples: Inputs) -> Tensor:
        x = join(samples)
        change = (x.unsqueeze(1) - r).cpu()
        columns = []
        for target in range(outputs):
            multipliers = deep_lift_shap(
                flat,
                x.unsqueeze(1),
                target=target,
                references=r.expand(len(x), *r.shape).unsqueeze(2),
                batch_size=at_once * len(r),
                additional_nonlinear_ops=TANGERMEME_OPS,
                warning_threshold=math.inf,
                raw_outputs=True,
                only_warn=True,
                device=x.device.type,
            )
            columns.append((multipliers.squeeze(2) * change).mean(1))
        return torch.stack(columns, dim=-1).detach()

    return explain
