"""What several test files need: SHAP's values, their exactness, a model's full state."""

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import shap
import torch
from torch import Tensor, fx, nn

import fxshap
from fxshap.autograd.rescale import RESCALES_OF_SUMS, rescale
from fxshap.integrations.libraries import belongs_to_library
from fxshap.verification.metrics import additivity_error

Arrays = list[np.ndarray]


class Between(nn.Module):
    """A function of six numbers a row, between two linear layers, of four numbers and to two."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Linear(4, 6), nn.Linear(6, 2)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(self.into(x)))


def sine_for(name: str, *dtypes: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Register a user's operator, a sine that has kernels only for some types."""

    @torch.library.custom_op(f"tests::{name}", mutates_args=())
    def sine(x: Tensor) -> Tensor:
        assert x.dtype in dtypes
        return x.sin()

    def keep_input(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()

    sine.register_fake(torch.empty_like)
    sine.register_autograd(backward, setup_context=keep_input)
    return sine


def as_list(value: Any) -> list[Any]:
    """A list of one, or the list itself."""
    return list(value) if isinstance(value, list | tuple) else [value]


def explain(
    model: nn.Module, background: Sequence[Tensor], samples: Sequence[Tensor], **options: Any
) -> Arrays:
    """SHAP values, one array an input of shape (samples, ..., outputs), with warnings as errors."""
    one = len(background) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # PyTorch warns of this once for the plain model, in float32 on a CPU.
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        explainer = shap.DeepExplainer(model, background[0] if one else list(background))
        return as_list(explainer.shap_values(samples[0] if one else list(samples), **options))


def assert_exact(
    model: nn.Module,
    explainable: nn.Module,
    background: Sequence[Tensor],
    samples: Sequence[Tensor],
    limit: float,
) -> Arrays:
    """Explain and check the additivity error; return the values."""
    values = explain(explainable, background, samples)
    assert all(np.isfinite(phi).all() for phi in values)
    assert additivity_error(model, background, samples, values) <= limit
    return values


def assert_same_values(found: Arrays, expected: Arrays) -> None:
    """Check that SHAP values are the same, bit for bit."""
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def hooks(module: nn.Module) -> list[Any]:
    """Every hook registered on one module."""
    tables = [table for name, table in vars(module).items() if name.endswith("_hooks")]
    return [hook for table in tables if isinstance(table, dict) for hook in table.values()]


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that an explanation must not change."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: hooks(module) for name, module in model.named_modules()},
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "tensors": {
            name: (id(t), t.data_ptr(), t._version, t.requires_grad, t.grad is None, t.clone())
            for name, t in tensors
        },
    }


def assert_same_state(model: nn.Module, before: dict[str, Any]) -> None:
    """Check that nothing of :func:`state_of` has changed."""
    after = state_of(model)
    for kind in ("modes", "hooks", "attributes"):
        assert after[kind] == before[kind], kind
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (*facts, value) in after["tensors"].items():
        *facts_before, value_before = before["tensors"][name]
        assert facts == facts_before, name
        assert torch.equal(value, value_before), name


def assert_no_shap_hooks(explainable: nn.Module) -> None:
    """Check that SHAP has left no hook on any module."""
    modules = list(explainable.modules())
    assert not [hook for module in modules for hook in hooks(module) if belongs_to_library(hook)]


def rewritten(explainable: nn.Module) -> list[fx.Node]:
    """The nodes of the rescaled graph that have a rule, without those of variances."""
    nodes = explainable.rescaled_graph.graph.nodes
    return [node for node in nodes if node.target in (rescale, *RESCALES_OF_SUMS)]


def multipliers(
    explainable: nn.Module, samples: list[Tensor], references: list[Tensor], output: int
) -> tuple[Tensor, list[Tensor]]:
    """Return outputs and multipliers as SHAP gets them, for rows of samples that differ."""
    joint = [torch.cat(pair).requires_grad_() for pair in zip(samples, references, strict=True)]
    with fxshap.multiplier_mode():
        outputs = explainable(*joint)
    grads = torch.autograd.grad(list(outputs[:, output]), joint)
    return outputs.detach(), [grad.chunk(2)[1] for grad in grads]
