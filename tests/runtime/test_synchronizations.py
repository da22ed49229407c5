"""How often an explanation waits for a GPU, counted on the processor.

Where a tensor on a GPU becomes a number or an array of Python, the processor waits until the GPU
has computed it. ``torch.cuda.set_sync_debug_mode`` reports that on a GPU. Here the operators and
the methods that wait there are counted, while rules compute as on a GPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import shap
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxshap
from fxshap.rules.core import tracing

aten = torch.ops.aten
#: Operators whose result is a number of Python, or has a size that depends on the values.
OPERATORS = (
    aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default,
    aten.nonzero.default, aten.masked_select.default,
)  # fmt: skip
#: Methods that copy a tensor to the processor.
METHODS = ("cpu", "numpy", "tolist")
#: The most waits for one call of the model by SHAP, and for one batch of the explainer.
MOST_PER_CALL, MOST_PER_BATCH = 3, 1

Places = Counter[str]


def place() -> str | None:
    """Return the line of fxshap that is running; ``None`` if SHAP, or a test, called PyTorch."""
    frame = sys._getframe(1)
    package, torch_itself = (str(Path(m.__file__).parent) for m in (fxshap, torch))
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if name.startswith(package):
            return f"{Path(name).relative_to(Path(package).parent)}:{frame.f_lineno}"
        if not name.startswith(torch_itself) and name != __file__:
            return None
        frame = frame.f_back
    return None


class CountOperators(TorchDispatchMode):
    """Counts operators that wait, by the line of fxshap that runs them."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in OPERATORS and (line := place()):
            self.places[f"{line} {func}"] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def count_methods(places: Places) -> Iterator[None]:
    """Count methods that wait, by the line of fxshap that calls them.

    They are replaced, because backward passes run outside of modes for functions.
    """

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if line := place():
                copied = name == "numpy" and f"{line} cpu" in places  # .cpu().numpy()
                places[f"{line} {name}"] += not copied
            return method(self, *args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in METHODS:
            method = counted(name, getattr(Tensor, name))
            stack.enter_context(mock.patch.object(Tensor, name, method))
        yield


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Make rules compute as where reading a value waits."""
    with mock.patch.object(tracing, "reading_waits", lambda value: True):
        yield


def waits(run: Callable[[], object]) -> Places:
    """Return where a call waits in fxshap, and how often."""
    places: Places = Counter()
    with as_on_a_gpu(), CountOperators(places), count_methods(places):
        run()
    return places


@dataclass(frozen=True)
class Case:
    """A network, the shape of a sample, and options of the explanation.

    Attributes
    ----------
    more : int
        How often more it is counted. Refinement draws its coalitions on the processor: it waits for
        the features that differ, and reads two numbers that are there already.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    more: int = 0


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU6(), nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


class Transformer(nn.Module):
    """Two encoder layers over 6 tokens of 8 numbers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class MaskedAttention(nn.Module):
    """Causal attention over 6 tokens, with a mask of -inf, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(8, 8) for _ in range(3))
        self.gate, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        later = torch.ones(6, 6, dtype=torch.bool).triu(1)
        scores = self.queries(x) @ self.keys(x).mT / 8**0.5
        attended = scores.masked_fill(later, -torch.inf).softmax(-1) @ self.values(x)
        return self.head((attended * self.gate(x).sigmoid()).mean(1))


class Recurrent(nn.Module):
    """An LSTM over 6 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


CASES: dict[str, Case] = {
    "mlp": Case(mlp, (8,)),
    "transformer": Case(Transformer, (6, 8)),
    "cnn": Case(cnn, (2, 8, 8)),
    "lstm": Case(Recurrent, (6, 8)),
    "masked attention": Case(MaskedAttention, (6, 8)),
    "variance rule": Case(mlp, (8,), {"rule": "variance"}),
    "refinement": Case(mlp, (8,), {"refine": 1}, more=3),
}
SAMPLES, OUTPUTS = 4, 3


def prepare(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    case = CASES[name]
    return case.build().eval(), torch.randn(5, *case.shape), torch.randn(SAMPLES, *case.shape)


@pytest.mark.parametrize("name", CASES)
def test_shap_waits_a_few_times_for_every_call_of_the_model(name: str) -> None:
    places = waits_of_shap(name)
    assert places.total() / (SAMPLES * OUTPUTS) <= MOST_PER_CALL + CASES[name].more, places


@pytest.mark.parametrize("name", CASES)
def test_the_explainer_waits_once_for_every_batch(name: str) -> None:
    places, batches = waits_of_explainer(name)
    assert places.total() / batches <= MOST_PER_BATCH + CASES[name].more, places


@pytest.mark.parametrize("name", CASES)
def test_values_are_the_same_where_nothing_is_read(name: str) -> None:
    model, background, samples = prepare(name)
    explainer = fxshap.DeepExplainer(model, background, **CASES[name].options)
    expected = explainer.shap_values(samples)
    with as_on_a_gpu():
        values = explainer.shap_values(samples)
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def waits_of_shap(name: str) -> Places:
    """Return where SHAP's calls of the model for some samples wait, after the first."""
    model, background, samples = prepare(name)
    explainable = fxshap.make_explainable(model, **CASES[name].options)
    explainer = shap.DeepExplainer(explainable, background)
    explainer.shap_values(samples, check_additivity=False)  # captures
    return waits(lambda: explainer.shap_values(samples + 1, check_additivity=False))


def waits_of_explainer(name: str) -> tuple[Places, int]:
    """Return where more batches of samples make the explainer wait, and how many they are."""
    model, background, samples = prepare(name)
    options = CASES[name].options
    explainer = fxshap.DeepExplainer(model, background, batch_size=SAMPLES, **options)
    explainer.shap_values(samples)  # captures
    one, two = (
        waits(lambda x=x: explainer.shap_values(x, check_additivity=False))
        for x in (samples + 1, torch.cat([samples + 1, samples + 2]))
    )
    return two - one, SAMPLES if "refine" in options else 1


def show(title: str, found: Places, calls: int) -> None:
    print(f"{title}: {found.total() / calls:.1f}")
    for line, count in found.most_common():
        print(f"  {count / calls:.2f} {line}")


if __name__ == "__main__":
    for name in CASES:
        show(f"{name}, for a call of SHAP", waits_of_shap(name), SAMPLES * OUTPUTS)
        show(f"{name}, for a batch of the explainer", *waits_of_explainer(name))
