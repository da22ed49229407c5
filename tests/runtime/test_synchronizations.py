"""How often an explanation waits for a GPU, counted on the processor.

Where a tensor on a GPU becomes a number or an array of Python, the processor waits until the GPU
has computed it. ``torch.cuda.set_sync_debug_mode`` reports that on a GPU. Here, modes of PyTorch
count the operators and the methods that wait there.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import shap
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fxshap

aten = torch.ops.aten
#: Operators whose result is a number of Python, or has a size that depends on the values.
OPERATORS = (
    aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default,
    aten.nonzero.default, aten.masked_select.default,
)  # fmt: skip
#: Methods that copy a tensor to the processor.
METHODS = (Tensor.cpu, Tensor.numpy, Tensor.tolist)
#: The most waits for one call of the model by SHAP, and for one batch of the explainer.
MOST_PER_CALL, MOST_PER_BATCH = 13, 16

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


class CountMethods(TorchFunctionMode):
    """Counts methods that wait, by the line of fxshap that runs them."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = places

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in METHODS and (line := place()):
            copied = func is Tensor.numpy and f"{line} cpu" in self.places  # .cpu().numpy()
            self.places[f"{line} {func.__name__}"] += not copied
        return func(*args, **(kwargs or {}))


def waits(run: Callable[[], object]) -> Places:
    """Return where a call waits in fxshap, and how often."""
    places: Places = Counter()
    with ExitStack() as stack:
        for mode in (CountOperators(places), CountMethods(places)):
            stack.enter_context(mode)
        run()
    return places


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


class Transformer(nn.Module):
    """Two encoder layers over 6 tokens of 8 numbers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (8,)),
    "transformer": (Transformer, (6, 8)),
}
SAMPLES, OUTPUTS = 4, 3


def prepare(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    return make().eval(), torch.randn(5, *shape), torch.randn(SAMPLES, *shape)


@pytest.mark.parametrize("name", MODELS)
def test_shap_waits_a_few_times_for_every_call_of_the_model(name: str) -> None:
    places = waits_of_shap(name)
    assert places.total() / (SAMPLES * OUTPUTS) <= MOST_PER_CALL, places


@pytest.mark.parametrize("name", MODELS)
def test_the_explainer_waits_rarely_for_every_batch(name: str) -> None:
    places = waits_of_explainer(name)
    assert places.total() <= MOST_PER_BATCH, places


def waits_of_shap(name: str) -> Places:
    """Return where SHAP's calls of the model for some samples wait, after the first."""
    model, background, samples = prepare(name)
    explainer = shap.DeepExplainer(fxshap.make_explainable(model), background)
    explainer.shap_values(samples, check_additivity=False)  # captures
    return waits(lambda: explainer.shap_values(samples + 1, check_additivity=False))


def waits_of_explainer(name: str) -> Places:
    """Return where one more batch of samples makes the explainer wait."""
    model, background, samples = prepare(name)
    explainer = fxshap.DeepExplainer(model, background, batch_size=SAMPLES)
    explainer.shap_values(samples)  # captures
    one, two = (
        waits(lambda x=x: explainer.shap_values(x, check_additivity=False))
        for x in (samples + 1, torch.cat([samples + 1, samples + 2]))
    )
    return two - one


def show(title: str, found: Places, calls: int) -> None:
    print(f"{title}: {found.total() / calls:.1f}")
    for line, count in found.most_common():
        print(f"  {count / calls:.2f} {line}")


if __name__ == "__main__":
    for name in MODELS:
        show(f"{name}, for a call of SHAP", waits_of_shap(name), SAMPLES * OUTPUTS)
        show(f"{name}, for a batch of the explainer", waits_of_explainer(name), 1)
