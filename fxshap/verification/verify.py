"""Whether SHAP's attributions of a model add up, and how near the exact Shapley values they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fxshap.errors import OptionError
from fxshap.frontend.inputs import require_pairs, require_types
from fxshap.frontend.outputs import Selector, require_columns
from fxshap.module import ExplainableModule, evaluating, make_explainable
from fxshap.report.tables import count, html_table, name_of, text_table
from fxshap.runtime.coalitions import dims_of_inputs
from fxshap.verification.leaks import Leak, find_leaks
from fxshap.verification.shapley import shapley_values

Inputs = Tensor | Sequence[Tensor]
Array = npt.NDArray[Any]

#: The gap that SHAP's own check does not let pass (``shap/explainers/_deep/deep_utils.py``).
SHAP_TOLERANCE = 0.01
#: The largest additivity error that the rounding of a deep network explains, by type.
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 0.2}
#: Features, or groups of them, up to which the exact Shapley values are computed.
MOST_FEATURES = 12
#: Rows of the model to spend on them; one sample gets its exact values whatever they take.
MOST_ROWS = 2**18


@dataclass(frozen=True)
class Checked:
    """What was measured of one sample.

    Attributes
    ----------
    additivity_error : float
        The largest ``|sum(phi) - (f(x) - mean f(references))|`` over the outputs, relative to the
        largest ``|f|`` of all samples and references.
    gap : float
        The same, not relative: what SHAP's own check compares with 0.01.
    output_difference : float
        The largest difference of the outputs that SHAP was given from the model's own, relative
        as above.
    distance : float, optional
        ``sum |phi - exact| / sum |exact|``, where `exact` are the exact Shapley values by brute
        force; ``None`` if they were not computed.
    """

    additivity_error: float
    gap: float
    output_difference: float
    distance: float | None = None


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` measured; as a string, a table.

    Attributes
    ----------
    model : str
        The class of the model.
    dtype : torch.dtype
        Of the inputs.
    computed_in : torch.dtype
        The type with the fewest digits that the model computes in, as in autocast; else `dtype`.
    references : int
        How many references there were.
    features : int
        How many features, or groups of them, there are to compute exact Shapley values of.
    samples : list of Checked
        What was measured of every sample.
    values : list of ndarray
        SHAP's values, one array an input, of shape (samples, ..., outputs).
    leaks : list of Leak
        The operations that leak, the largest leak first; empty if the attributions add up.
    """

    model: str
    dtype: torch.dtype
    computed_in: torch.dtype
    references: int
    features: int
    samples: list[Checked]
    values: list[Array] = field(repr=False)
    leaks: list[Leak]

    @property
    def additivity_error(self) -> float:
        """The largest additivity error."""
        return largest(sample.additivity_error for sample in self.samples)

    @property
    def gap(self) -> float:
        """The largest gap."""
        return largest(sample.gap for sample in self.samples)

    @property
    def limit(self) -> float:
        """The largest additivity error that rounding explains."""
        # What has still fewer digits, as float8, is taken for the narrowest.
        return LIMITS.get(self.computed_in, max(LIMITS.values()))

    @property
    def additive(self) -> bool:
        """Whether the attributions add up, to the precision of the floats."""
        return self.additivity_error <= self.limit

    @property
    def passes_shap(self) -> bool:
        """Whether SHAP's own check lets the attributions pass."""
        return self.gap < SHAP_TOLERANCE

    def to_dict(self) -> dict[str, Any]:
        """Return what was measured as plain data, ready for JSON, without SHAP's values."""
        return {
            "model": self.model,
            "dtype": name_of(self.dtype),
            "computed_in": name_of(self.computed_in),
            "references": self.references,
            "features": self.features,
            "additive": self.additive,
            "additivity_error": self.additivity_error,
            "limit": self.limit,
            "passes_shap": self.passes_shap,
            "gap": self.gap,
            "shap_tolerance": SHAP_TOLERANCE,
            "samples": [asdict(sample) for sample in self.samples],
            "leaks": [asdict(leak) for leak in self.leaks],
        }

    def __str__(self) -> str:
        return "\n".join([self._title(), "", text_table(self._records()), "", *self._verdicts()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        verdicts = "<br>".join(map(escape, self._verdicts()))
        return f"<p>{escape(self._title())}</p>{html_table(self._records())}<p>{verdicts}</p>"

    def _title(self) -> str:
        samples, references = (
            count(len(self.samples), "sample"),
            count(self.references, "reference"),
        )
        inside = "" if self.computed_in == self.dtype else f", {name_of(self.computed_in)} inside"
        return f"{self.model}, {samples} against {references}, {name_of(self.dtype)}{inside}"

    def _records(self) -> list[dict[str, str]]:
        return [
            {
                "sample": str(row),
                "additivity error": f"{sample.additivity_error:.1e}",
                "SHAP's gap": f"{sample.gap:.1e}",
                "output difference": f"{sample.output_difference:.1e}",
                "distance to Shapley": "-" if sample.distance is None else f"{sample.distance:.4f}",
            }
            for row, sample in enumerate(self.samples)
        ]

    def _verdicts(self) -> list[str]:
        """Say what the numbers mean, one sentence or leak a line."""
        error, limit = f"{self.additivity_error:.1e}", f"{self.limit:.0e}"
        lines = []
        if self.additive:
            lines.append(f"Adds up: the error is {error}; rounding explains up to {limit}.")
        else:
            lines.append(f"DOES NOT ADD UP: the error is {error}, over {limit}. It comes from")
            for leak in self.leaks:
                lines.append(f"  {leak} ({leak.operation}, rule '{leak.rule}')")
                lines += [f"    at {leak.line}"] if leak.line else []
        gap = f"its gap of {self.gap:.1e}"
        if self.passes_shap:
            lines.append(f"SHAP's own check passes: {gap} is under {SHAP_TOLERANCE}.")
        else:
            lines.append(f"SHAP's own check fails: {gap} is not under {SHAP_TOLERANCE}.")
        if self.additive and not self.passes_shap:
            lines.append("The gap is not relative, and these outputs are large.")
            lines.append("Explain in float64, or with check_additivity=False.")
        if self.features > MOST_FEATURES:
            lines.append(
                f"No exact Shapley values: {self.features} features are more than {MOST_FEATURES} "
                "(see feature_mask)."
            )
        return lines


def verify(
    model: nn.Module,
    background: Inputs,
    samples: Inputs,
    *,
    output: Selector = None,
    ranked_outputs: int | None = None,
    feature_mask: Inputs | None = None,
    progress: bool = False,
) -> Verification:
    """Explain a model with unmodified SHAP and measure whether the attributions add up.

    Measured are, for every sample, the additivity error against SHAP's own tolerance and against
    the precision of the floats; the difference between the outputs that SHAP was given and the
    model's own; and, of up to 12 features or groups of them, the distance to the exact Shapley
    values. Where the attributions do not add up, the operations that leak are named.

    Parameters
    ----------
    model : nn.Module
        Any model, or what :func:`fxshap.make_explainable` returned, with its own options.
    background, samples : Tensor or sequence of Tensor
        What SHAP is given, of shape (rows, ...); one tensor an input.
    output : str, int or callable, optional
        Which output to explain, as :func:`fxshap.make_explainable` takes it.
    ranked_outputs : int, optional
        Explain only so many outputs of every sample, the largest; all by default. As in SHAP.
    feature_mask : Tensor or sequence of Tensor, optional
        One tensor an input, which broadcasts to the shape of one row: elements with the same
        number, in any input, are one feature, as in Captum. By default a feature is what
        `feature_dims` of :func:`fxshap.make_explainable` says: a pixel of an image, else one
        element.
    progress : bool
        Whether to show a progress bar on standard error.

    Returns
    -------
    Verification
        ``print`` it for the table.

    Raises
    ------
    FxshapError
        If the model cannot be explained: see ``docs/errors.md``.

    Notes
    -----
    An error is within the precision of the floats up to 1e-9 in float64, 1e-4 in float32, 0.05 in
    float16 and 0.2 in bfloat16, of the largest output; the type is the one with the fewest digits
    that the model computes in. The exact Shapley values take 2 ** features evaluations for
    every sample and reference (Lundberg and Lee 2017, eq. 4); samples after the first get theirs
    while that is less than 2 ** 18 in all.

    Examples
    --------
    >>> import torch, fxshap
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    >>> result = fxshap.verify(model, torch.randn(10, 4), torch.randn(3, 4))
    >>> result.additive, result.passes_shap
    (True, True)
    """
    if not isinstance(model, ExplainableModule):
        model = make_explainable(model, output=output)
    elif output is not None:
        raise OptionError("give output= to make_explainable, which made this model explainable")
    references, rows = as_list(background), as_list(samples)
    require_pairs(references, rows)
    groups = features_of(model, references, feature_mask)
    with evaluating(model):
        require_types(references, model.model, lambda: model(*references))
        with torch.no_grad():
            f_r = model(*references)
            require_columns(f_r)
            rows = [x.to(f_r.device) for x in rows]  # as SHAP does
            f_x = model(*rows)
        walks = len(f_x) * min(f_x.shape[1], ranked_outputs or f_x.shape[1])
        with _hearing(model, walks if progress else 0) as heard:
            values, ranks = shap_values(model, references, rows, ranked_outputs)
        scale = max(float(f_x.abs().max()), float(f_r.abs().max())) or 1.0
        gaps = additivity_gaps(values, f_x, f_r, ranks)
        differences = output_differences(heard, f_x, f_r)
        distances = distances_to_shapley(model, references, rows, values, ranks, groups)
        dtype = references[0].dtype
        checked = [
            Checked(gap / scale, gap, difference / scale, distance)
            for gap, difference, distance in zip(
                map(float, gaps.max(1)), differences, distances, strict=True
            )
        ]
        result = Verification(
            model=type(model.model).__name__,
            dtype=dtype,
            computed_in=model.computed_in,
            references=len(f_r),
            features=int(groups.max()) + 1,
            samples=checked,
            values=values,
            leaks=[],
        )
        if result.additive:
            return result
        row, column = divmod(int(np.nan_to_num(gaps, nan=math.inf).argmax()), gaps.shape[1])
        sample = [x[row : row + 1] for x in rows]
        leaks = find_leaks(model.attribute, sample, references, int(ranks[row, column]), scale)
        return replace(result, leaks=leaks)


def as_list(inputs: Inputs) -> list[Tensor]:
    """Return a list of one, or of all inputs."""
    return [inputs] if isinstance(inputs, Tensor) else list(inputs)


def largest(numbers: Iterable[float]) -> float:
    """Return the largest number; NaN if there is one."""
    return float(np.max(list(numbers)))


# --- what SHAP says -----------------------------------------------------------------------------


def shap_values(
    model: nn.Module,
    references: list[Tensor],
    samples: list[Tensor],
    ranked_outputs: int | None,
) -> tuple[list[Array], Tensor]:
    """Ask SHAP; return its values, one array an input, and the outputs that they explain.

    Returns
    -------
    list of ndarray
        Of shape (samples, ..., outputs).
    Tensor
        The columns of the model's output, of shape (samples, outputs).
    """
    import shap  # which takes seconds

    one = len(references) == 1
    explainer = shap.DeepExplainer(model, references[0] if one else references)
    found = explainer.shap_values(
        samples[0] if one else samples, ranked_outputs=ranked_outputs, check_additivity=False
    )
    found, ranks = (found, None) if ranked_outputs is None else found
    values = [found] if one else list(found)
    if ranks is None:
        ranks = torch.arange(values[0].shape[-1]).expand(len(values[0]), -1)
    return values, ranks.long().cpu()


Heard = list[tuple[Tensor, Tensor]]


@contextmanager
def _hearing(model: nn.Module, walks: int) -> Iterator[Heard]:
    """Collect what SHAP is given: the output of the sample and those of the references.

    A progress bar goes to standard error if the number of walks to come is not 0.
    """
    from tqdm import tqdm  # SHAP brings it

    heard: Heard = []
    bar = tqdm(desc="explaining", total=walks, disable=not walks, leave=False)

    def hear(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:  # it is asking for attributions
            rows = len(output) // 2
            heard.append((output[0].detach(), output[rows:].detach()))
            bar.update()

    handle = model.register_forward_hook(hear)
    try:
        yield heard
    finally:
        handle.remove()
        bar.close()


def output_differences(heard: Heard, f_x: Tensor, f_r: Tensor) -> list[float]:
    """Return, for every sample, how far the outputs that SHAP was given are from the model's."""
    largest = [0.0] * len(f_x)
    for call, (y_x, y_r) in enumerate(heard):
        row = call % len(f_x)  # SHAP goes through all samples for one output after the other
        found = max(float((y_x - f_x[row]).abs().max()), float((y_r - f_r).abs().max()))
        largest[row] = max(largest[row], found)
    return largest


def additivity_error(
    model: nn.Module, background: Inputs, samples: Inputs, values: Sequence[Array]
) -> float:
    """Return how far attributions are from summing to the change of a model's output.

    Parameters
    ----------
    model : nn.Module
        The explained model, with an output of shape (rows, outputs).
    background, samples : Tensor or sequence of Tensor
        One tensor an input, of shape (rows, ...).
    values : sequence of ndarray
        One array an input, of shape (samples, ..., outputs), the layout of SHAP.

    Returns
    -------
    float
        The largest ``|sum(phi) - (f(x) - mean f(background))|`` over the largest ``|f|``.
    """
    with torch.no_grad():
        f_x, f_r = model(*as_list(samples)), model(*as_list(background))
    every = torch.arange(f_x.shape[1]).expand(len(f_x), -1)
    gap = additivity_gaps(values, f_x, f_r, every).max()
    return float(gap) / max(float(f_x.abs().max()), float(f_r.abs().max()))


def additivity_gaps(values: Sequence[Array], f_x: Tensor, f_r: Tensor, ranks: Tensor) -> Array:
    """Return |sum(phi) - (f(x) - mean f(references))|, of shape (samples, outputs), in float64.

    Parameters
    ----------
    values : list of ndarray
        SHAP's values, one array an input, of shape (samples, ..., outputs).
    f_x, f_r : Tensor
        The model's outputs at the samples and at the references.
    ranks : Tensor
        The columns of the output that the values explain, of shape (samples, outputs).
    """
    total = sum(flat(phi).sum(1) for phi in values)
    change = f_x.double().cpu() - f_r.double().cpu().mean(0)
    gaps: Array = np.abs(total - change.gather(1, ranks).numpy())
    return gaps


def flat(phi: Array) -> Array:
    """Return SHAP values as float64, of shape (samples, elements, outputs)."""
    return phi.astype(np.float64).reshape(len(phi), -1, phi.shape[-1])


# --- the exact Shapley values -------------------------------------------------------------------


def features_of(
    model: ExplainableModule, inputs: list[Tensor], feature_mask: Inputs | None
) -> Tensor:
    """Return the number of the feature that each element of all inputs belongs to, from 0."""
    if feature_mask is not None:
        masks = as_list(feature_mask)
    else:
        dims = dims_of_inputs(inputs, model.refinement.feature_dims)
        masks = []
        for x, keep in zip(inputs, dims, strict=True):
            shape = [x.shape[d] if d in keep else 1 for d in range(1, x.dim())]
            first = sum(mask.numel() for mask in masks)
            masks.append(first + torch.arange(math.prod(shape)).reshape(shape))
    if len(masks) != len(inputs):
        raise OptionError(
            f"feature_mask describes {len(masks)} inputs, but the model has {len(inputs)}"
        )
    try:
        whole = [mask.expand(1, *x.shape[1:]) for mask, x in zip(masks, inputs, strict=True)]
    except RuntimeError as error:
        shapes = [tuple(mask.shape) for mask in masks]
        raise OptionError(
            f"feature_mask, of shape {shapes}, does not broadcast to the shape of one row of the "
            f"inputs, {[tuple(x.shape[1:]) for x in inputs]}"
        ) from error
    numbers: Tensor = torch.cat([mask.flatten() for mask in whole]).unique(return_inverse=True)[1]
    return numbers


def distances_to_shapley(
    model: nn.Module,
    references: list[Tensor],
    samples: list[Tensor],
    values: list[Array],
    ranks: Tensor,
    groups: Tensor,
) -> list[float | None]:
    """Return for every sample sum |phi - exact| / sum |exact|; ``None`` where it takes too long."""
    shapes = [x.shape[1:] for x in samples]
    sizes = [math.prod(shape) for shape in shapes]
    features = int(groups.max()) + 1
    rows = 2**features * len(references[0])
    most = 0 if features > MOST_FEATURES else max(1, MOST_ROWS // rows)

    def function(points: Tensor) -> Tensor:
        parts = zip(points.split(sizes, 1), shapes, strict=True)
        result: Tensor = model(*[part.reshape(-1, *shape) for part, shape in parts])
        return result

    phi = torch.from_numpy(np.concatenate([flat(value) for value in values], 1))
    total = torch.zeros(len(phi), features, phi.shape[-1], dtype=torch.float64)
    total.index_add_(1, groups, phi)
    points = torch.cat([x.flatten(1) for x in samples], 1)
    ends = torch.cat([r.flatten(1) for r in references], 1)
    distances: list[float | None] = []
    for row, point in enumerate(points):
        if row >= most:
            distances.append(None)
            continue
        games = [shapley_values(function, point, end, groups) for end in ends]
        exact = torch.stack(games).mean(0)[:, ranks[row]]
        distances.append(float((total[row] - exact).abs().sum() / exact.abs().sum()))
    return distances
