"""Small models of one PyTorch operator each, from the sample inputs of PyTorch's own tests.

``python -m tests.tools.operators add qr`` judges some operators and prints one JSON object a line.
"""

from __future__ import annotations

import gc
import json
import random
import signal
import sys
import types
import unittest
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import shap
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxshap
from fxshap.errors import FxshapError

#: The types of numbers that are tried; the features are their real and imaginary parts.
DTYPES = (torch.float64, torch.complex128)
#: The largest additivity error, and attribution of a dummy, relative to the largest output.
LIMIT = 1e-9
MAX_FEATURES = 2000
#: How many sample inputs of an operator are tried, in each type of numbers.
SAMPLES = 3
SECONDS = 60
#: How many features are tried whether they can matter.
MAX_TRIED = 40


@dataclass(frozen=True)
class Verdict:
    """What happened with one sample input of one operator.

    Attributes
    ----------
    operator, dtype : str
        The operator's name in PyTorch's tests, and the type of its numbers.
    outcome : str
        One of ``OUTCOMES``.
    error, dummies : float
        The additivity error, and the largest attribution of a feature that cannot matter.
    message : str
        The first line of the error that was raised.
    """

    operator: str
    dtype: str
    outcome: str
    error: float = 0.0
    dummies: float = 0.0
    message: str = ""


#: From the best to the worst.
OUTCOMES = ("additive", "refused", "no second point", "dummies", "not additive", "another error")


class OperatorModel(nn.Module):
    """An operator of everything that its sample input differentiates, one row after another.

    The first output is a weighted sum of all results, the second is one of them alone.

    Parameters
    ----------
    operator : callable
    sample : SampleInput
        Tensors that require a gradient are computed from the features, all others are constant.
    """

    def __init__(self, operator: Any, sample: Any) -> None:
        super().__init__()
        self.operator, self.process = operator, sample.output_process_fn_grad
        arguments = (sample.input, tuple(sample.args), dict(sample.kwargs))
        self.leaves, self.structure = pytree.tree_flatten(arguments)
        self.slots = [
            slot
            for slot, leaf in enumerate(self.leaves)
            if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        self.leaves = [v.detach() if isinstance(v, Tensor) else v for v in self.leaves]
        self.sizes = [parts(self.leaves[slot]).numel() for slot in self.slots]
        #: A number of rows that is no size in the sample input, so that none is taken for it.
        taken = {v.shape[0] for v in self.leaves if isinstance(v, Tensor) and v.dim()}
        self.rows = min({2, 3, 4, 7, 11} - taken)
        self.weights: Tensor | None = None
        self.single = 0

    def features(self) -> Tensor:
        """Return the features of the sample input."""
        return torch.cat([parts(self.leaves[slot]).flatten() for slot in self.slots])

    def results(self, row: Tensor) -> Tensor:
        """Return all differentiable results for one row of features."""
        leaves = list(self.leaves)
        for slot, piece in zip(self.slots, row.split(self.sizes), strict=True):
            like = leaves[slot]
            piece = piece.reshape(parts(like).shape).clone()
            leaves[slot] = torch.view_as_complex(piece) if like.is_complex() else piece
        value, args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        outputs = pytree.tree_leaves(self.process(self.operator(value, *args, **kwargs)))
        kept = [parts(y).flatten() for y in outputs if isinstance(y, Tensor) and differentiable(y)]
        return torch.cat(kept)

    def forward(self, x: Tensor) -> Tensor:
        """Take features of shape (rows, features)."""
        rows = []
        for row in x.unbind(0):
            results = self.results(row)
            rows.append(torch.stack([results @ self.weights, results[self.single]]))
        return torch.stack(rows)


def parts(value: Tensor) -> Tensor:
    """Return a tensor of real numbers, with the parts of complex numbers in the last dimension."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def differentiable(value: Tensor) -> bool:
    """Return True if autograd gives gradients to tensors of this dtype."""
    return value.is_floating_point() or value.is_complex()


# --- PyTorch's sample inputs ----------------------------------------------------------------------


def operator_database() -> list[Any]:
    """Return PyTorch's descriptions of its operators, those that have a derivative.

    Their module imports ``expecttest`` for a base class of tests, which nothing here uses.
    """
    sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
    from torch.testing._internal.common_methods_invocations import op_db

    gc.freeze()  # a capture collects garbage, and this is a large database
    return [info for info in op_db if info.supports_autograd]


def dtypes_of(info: Any) -> list[torch.dtype]:
    """Return the types of numbers in which an operator has a derivative."""
    return [dtype for dtype in DTYPES if dtype in info.supported_backward_dtypes("cpu")]


def models(info: Any, dtype: torch.dtype, count: int = SAMPLES) -> Iterator[OperatorModel]:
    """Return models of the first sample inputs of an operator that are small."""
    seed()
    found = 0
    for sample in islice(info.sample_inputs("cpu", dtype, requires_grad=True), 200):
        if not is_dense(sample):
            continue
        model = OperatorModel(info.op, sample)
        if not 0 < sum(model.sizes) <= MAX_FEATURES:
            continue
        found += 1
        yield model
        if found == count:
            return


def is_dense(sample: Any) -> bool:
    """Return True if all tensors of a sample input are dense."""
    leaves = pytree.tree_leaves((sample.input, sample.args, sample.kwargs))
    return all(v.layout is torch.strided for v in leaves if isinstance(v, Tensor))


def seed() -> None:
    """Seed the generators that sample inputs are drawn with."""
    torch.manual_seed(0)
    random.seed(0)


# --- verdicts -------------------------------------------------------------------------------------


def judge(info: Any, dtype: torch.dtype, model: OperatorModel) -> Verdict:
    """Explain a model with SHAP and compare its attributions with its output."""
    name, kind = info.full_name, str(dtype).removeprefix("torch.")
    try:
        with time_limit(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            endpoints = two_points(model)
            if endpoints is None:
                return Verdict(name, kind, "no second point")
            sample, references = endpoints
            explainable = fxshap.make_explainable(model, progress=False)
            values = shap.DeepExplainer(explainable, references).shap_values(
                sample, check_additivity=False
            )[0]
            with torch.no_grad():
                f_x, f_r = model(sample)[0], model(references)
            change = (f_x - f_r.mean(0)).numpy()
            largest = max(float(f_x.abs().max()), float(f_r.abs().max()), 1e-300)
            error = float(abs(values.sum(0) - change).max()) / largest
            dummies = [
                abs(values[j, 1]) / largest for j in dummy_features(model, sample, references)
            ]
    except FxshapError as refusal:
        return Verdict(name, kind, "refused", message=first_line(refusal))
    except Exception as other:
        message = f"{type(other).__name__}: {first_line(other)}"
        return Verdict(name, kind, "another error", message=message)
    given = float(max(dummies, default=0.0))
    if not error <= LIMIT:
        return Verdict(name, kind, "not additive", error, given)
    return Verdict(name, kind, "additive" if given <= LIMIT else "dummies", error, given)


def two_points(model: OperatorModel) -> tuple[Tensor, Tensor] | None:
    """Return a sample of one row and references; ``None`` if no other point is found.

    A reference is the sample moved at random, by less where the operator has no finite result.
    """
    generator = torch.Generator().manual_seed(1)
    x = model.features()
    with torch.no_grad():
        results = model.results(x)
        finite = results.isfinite()
        if not results.numel() or not finite.any():
            return None
        weights = torch.rand(results.shape, generator=generator, dtype=torch.float64) + 0.5
        model.weights = weights.to(results.dtype) * finite
        model.single = int(finite.nonzero()[len(finite.nonzero()) // 2])
        for distance in (0.3, 0.03, 1e-3):
            noise = torch.randn(model.rows, len(x), generator=generator, dtype=torch.float64)
            references = x + distance * noise * (x.abs() + 0.1)
            if all(same_kind(model, row, results) for row in references):
                return x[None], references
    return None


def same_kind(model: OperatorModel, row: Tensor, like: Tensor) -> bool:
    """Return True if a row has as many results as another, and finite ones."""
    try:
        results = model.results(row)
    except (RuntimeError, ValueError):
        return False
    return results.shape == like.shape and bool(results.isfinite().all())


def dummy_features(model: OperatorModel, sample: Tensor, references: Tensor) -> list[int]:
    """Return features that never change the second output, whatever value they take."""
    generator = torch.Generator().manual_seed(2)
    (x,) = sample
    mixed = torch.where(torch.rand(x.shape, generator=generator) < 0.5, x, references[0])
    bases = [x, *references, mixed]
    values = [(base, single_result(model, base)) for base in bases]
    dummies = []
    for j in torch.randperm(len(x), generator=generator)[:MAX_TRIED].tolist():
        for base, value in values:
            far = (x[j] + 10, x[j] - 10, -x[j], 0 * x[j])
            changes = (references[0, j], references[1, j], x[j], *far)
            if any(single_result(model, with_value(base, j, v)) != value for v in changes):
                break
        else:
            dummies.append(j)
    return dummies


def single_result(model: OperatorModel, row: Tensor) -> float:
    """Return the second output, NaN if the operator raises."""
    try:
        with torch.no_grad():
            return float(model.results(row)[model.single])
    except (RuntimeError, ValueError, IndexError):
        return float("nan")


def with_value(row: Tensor, feature: int, value: Tensor) -> Tensor:
    """Return a copy of a row with another value of one feature."""
    row = row.clone()
    row[feature] = value
    return row


def first_line(error: Exception) -> str:
    """Return the first line of a message."""
    return (str(error).strip().splitlines() or [""])[0]


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise a TimeoutError after some seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def verdicts(info: Any, count: int = SAMPLES) -> list[Verdict]:
    """Return the verdicts of an operator."""
    return [
        judge(info, dtype, model)
        for dtype in dtypes_of(info)
        for model in models(info, dtype, count)
    ]


def main(names: Sequence[str]) -> None:
    """Print the verdicts of some operators, by their names in PyTorch's tests."""
    for info in operator_database():
        if info.full_name in names:
            for verdict in verdicts(info, count=1):
                print(json.dumps(asdict(verdict)))


if __name__ == "__main__":
    main(sys.argv[1:])
