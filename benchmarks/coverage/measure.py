"""Explain one network with unmodified SHAP and say how exact it was."""

from __future__ import annotations

import datetime
import gc
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

import fxshap
from benchmarks.adapters import with_shap
from benchmarks.coverage.entry import Entry
from fxshap.ops.frozen import CHANNELS_LAST
from tests.tools.sources import digest_of

OUTPUTS = 4
REFERENCES = 2
#: Batches of the training-mode forwards that give batch norms their statistics, and rows of each.
#: Of 16 rows in all, statistics fit only these rows: ConvMixer's activations of other inputs,
#: rare among them and divided by too small a deviation, grow to 1e26 layer by layer.
CALIBRATION = (4, 32)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass
class Measurement:
    """What was measured on one network in one floating-point type.

    Attributes
    ----------
    additivity_error : float
        max |sum(phi) - (f(x) - mean f(refs))| / scale, with scale = max(|f(x)|, |f(refs)|).
    output_difference : float
        Largest difference of the paired from the plain output, over the scale, of images with the
        channels last.
    layout_difference : float
        Largest difference of the plain output from that of images with the channels last, over the
        scale.
    rounding : float
        Largest difference of the network's own output from what it is in float64, over the scale.
    signal : float
        max |f(x) - mean f(refs)| / scale: what there is to explain.
    narrow : bool
        Whether the network computes in a narrower type inside.
    capture_seconds : float
        Of the processor, not of the clock.
    generic : list of str
        The operations that took the generic rule.
    failure : str
        Why there is nothing to measure, if so.
    software : str
        What was measured with.
    sources : str
        A digest of the sources of fxshap and of this file.
    date : str
    """

    zoo: str
    family: str
    name: str
    dtype: str
    additivity_error: float = float("nan")
    output_difference: float = float("nan")
    layout_difference: float = float("nan")
    rounding: float = float("nan")
    signal: float = float("nan")
    narrow: bool = False
    capture_seconds: float = float("nan")
    generic: list[str] = field(default_factory=list)
    failure: str = ""
    software: str = ""
    sources: str = ""
    date: str = ""

    def record(self) -> dict[str, object]:
        """Return the measurement as plain data."""
        return asdict(self)


class Head(nn.Module):
    """A network reduced to its first few outputs."""

    def __init__(self, entry: Entry) -> None:
        super().__init__()
        self.network = entry.build()
        self.output = entry.output

    def forward(self, *inputs: Tensor) -> Tensor:
        """Pick and flatten the output."""
        return self.output(self.network(*inputs)).flatten(1)[:, :OUTPUTS]


#: Of the sample and of the references.
Outputs = tuple[Tensor, Tensor]


@dataclass
class Case:
    """A network ready to be measured, with its data.

    Attributes
    ----------
    model : nn.Module
    sample, references : list of Tensor
        One tensor an input.
    """

    model: nn.Module
    sample: list[Tensor]
    references: list[Tensor]

    def to(self, dtype: torch.dtype) -> None:
        """Cast the network and its data."""
        self.model.to(dtype)
        self.sample = [x.to(dtype) for x in self.sample]
        self.references = [x.to(dtype) for x in self.references]

    @torch.no_grad()
    def outputs(self, lay_out: Callable[[Tensor], Tensor] = Tensor.contiguous) -> Outputs:
        """Return the plain outputs of the sample and of the references, laid out in memory."""
        endpoints = self.sample, self.references
        f_x, f_r = (self.model(*map(lay_out, inputs)) for inputs in endpoints)
        return f_x, f_r


def measure(
    entry: Entry, dtypes: Sequence[torch.dtype], *, drawn: bool = True
) -> list[Measurement]:
    """Measure one network in several types, with the same weights and data in all of them.

    Parameters
    ----------
    entry : Entry
    dtypes : sequence of torch.dtype
    drawn : bool
        Whether to draw the weights and biases of norms, as :func:`calibrate` says.
    """
    results = [
        Measurement(
            entry.zoo,
            entry.family,
            entry.name,
            str(dtype).removeprefix("torch."),
            software=software(entry.package),
            sources=sources(),
            date=datetime.date.today().isoformat(),
        )
        for dtype in dtypes
    ]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        with recording_failure(results):
            case = prepare(entry, drawn)
            exact = exact_outputs(case)
            for result, dtype in zip(results, dtypes, strict=True):
                with recording_failure([result]):
                    case.to(dtype)
                    fill_in(result, case, exact)
                gc.collect()  # one tape goes before the next comes
    return results


@contextmanager
def recording_failure(results: Sequence[Measurement]) -> Iterator[None]:
    """Write into the results what goes wrong, whatever it is."""
    try:
        yield
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        for result in results:
            result.failure = f"{type(error).__name__}: {without_folders(first)}"


def without_folders(text: str) -> str:
    """Leave out where packages are installed on this machine."""
    return re.sub(r"(?<!\S)/\S*/(?=[^/\s]+\.py\b)", "", text)


def prepare(entry: Entry, drawn: bool) -> Case:
    """Build and calibrate a network in float32 and draw its data."""
    model = Head(entry)
    batches, rows = CALIBRATION
    calibrate(model, [draw(rows, entry) for _ in range(batches)], drawn)
    return Case(model, draw(1, entry), draw(REFERENCES, entry))


def draw(rows: int, entry: Entry) -> list[Tensor]:
    """Draw standard normal inputs."""
    return [torch.randn(rows, *shape) for shape in entry.shapes]


@torch.no_grad()
def calibrate(model: nn.Module, batches: Sequence[Sequence[Tensor]], drawn: bool) -> None:
    """Give norms parameters, batch norms also statistics, and zero matrices some noise.

    Weights and biases of batch norms are drawn from (0, 1). With the constants that they begin
    training with, 1 and 0, every block blows the differences between inputs up again to what they
    were, and with them the rounding: ResNet-152 at random gives outputs whose third digit is noise.
    Other vectors of ones, the gains of layer and RMS norms, are drawn from (0, 1) too: Gemma 4 does
    not divide the products of normed queries and keys by the root of their width, and with gains of
    1 the softmax of every layer is nearly a choice, which magnifies rounding.
    """
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    model.eval()
    for gain in model.parameters():
        if drawn and gain.dim() == 1 and (gain == 1).all():
            gain.uniform_(0, 1)
    for norm in norms:
        if drawn and norm.affine:
            norm.weight.uniform_(0, 1)
            norm.bias.uniform_(0, 1)
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    for weight in model.parameters():
        if weight.dim() > 1 and not weight.any():
            weight.normal_(std=0.02)
    if norms:
        for inputs in batches:
            model(*inputs)
    model.eval()


def channels_last(x: Tensor) -> Tensor:
    """Lay images out as fxshap's convolutions take them on a CPU."""
    return x.contiguous(memory_format=CHANNELS_LAST.get(x.dim() - 2, torch.contiguous_format))


def exact_outputs(case: Case) -> Outputs | None:
    """Return the outputs in float64, or nothing where the network cannot be cast to it."""
    try:
        case.to(torch.float64)
        return case.outputs()
    except Exception:  # the measurement in float64 will say what is wrong
        return None


def fill_in(result: Measurement, case: Case, exact: Outputs | None) -> None:
    """Capture and explain a network, and compare."""
    f_x, f_r = case.outputs()
    scale = float(max(f_x.abs().max(), f_r.abs().max()))
    gap = (f_x.double() - f_r.double().mean(0)).flatten()
    result.signal = float(gap.abs().max()) / scale
    if exact is not None:
        result.rounding = largest_difference((f_x, f_r), exact) / scale

    explainable = fxshap.make_explainable(case.model)
    start = time.process_time()
    explainable.capture(*case.references)
    result.capture_seconds = time.process_time() - start
    result.generic = explainable.report().generic
    dtype = case.references[0].dtype
    result.narrow = explainable.compute_dtype != dtype

    answers: list[Tensor] = []
    explainable.register_forward_hook(lambda module, inputs, output: answers.append(output))
    explain = with_shap(explainable, case.references, f_x.shape[1])
    total = explain(case.sample).double().sum((0, 1))
    result.additivity_error = float((total - gap).abs().max()) / scale
    last_x, last_r = case.outputs(channels_last)
    result.layout_difference = largest_difference((f_x, f_r), (last_x, last_r)) / scale
    paired = answers[-1].detach().chunk(2)
    plain = last_x.expand_as(last_r), last_r
    result.output_difference = largest_difference(paired, plain) / scale


def largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference between tensors."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def software(package: str) -> str:
    """Name the versions measured with."""
    packages = ["torch", "shap", *([package] if package else [])]
    return ", ".join(
        [f"Python {platform.python_version()}"] + [f"{p} {version(p)}" for p in packages]
    )


@cache
def sources() -> str:
    """Return a digest of the code that measures: with other code it is another result.

    The digest stays when a function moves to another file, or when a comment, a docstring or an
    import changes.
    """
    files = [*Path(fxshap.__file__).parent.rglob("*.py"), Path(__file__)]
    return digest_of(path.read_text() for path in files)
