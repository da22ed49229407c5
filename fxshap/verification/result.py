"""The result of a verification: measurements for each sample, and a verdict in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

import numpy as np
import torch

from fxshap.ops.dtypes import ADDITIVITY_TOLERANCES
from fxshap.report.tables import dtype_name, html_table, pluralize, text_table
from fxshap.verification.leaks import Leak
from fxshap.verification.metrics import MAX_FEATURES, Array

#: SHAP's own check fails at this gap (``shap/explainers/_deep/deep_utils.py``).
SHAP_TOLERANCE = 0.01
#: Attributions farther than this from the exact Shapley values are not near them.
MAX_DISTANCE = 0.5


@dataclass(frozen=True)
class SampleCheck:
    """The measurements for one sample.

    Attributes
    ----------
    additivity_error : float
        The largest ``|sum(phi) - (f(x) - mean f(references))|`` over the outputs, relative to the
        largest ``|f|`` of all samples and references.
    shap_gap : float
        The same, not relative. SHAP's own check compares it with 0.01.
    output_difference : float
        The largest difference between the outputs that SHAP received and the model's own outputs,
        relative to the same largest ``|f|``.
    shapley_distance : float, optional
        ``sum |phi - exact| / sum |exact|``, where `exact` are the exact Shapley values by brute
        force; ``None`` if they were not computed.
    """

    additivity_error: float
    shap_gap: float
    output_difference: float
    shapley_distance: float | None = None


@dataclass(frozen=True)
class Verification:
    """The result of :func:`verify`. Its string is a table.

    Attributes
    ----------
    model : str
        The class of the model.
    dtype : torch.dtype
        The dtype of the inputs.
    compute_dtype : torch.dtype
        The least precise dtype that the model computes in. It differs from `dtype` under autocast,
        for example.
    references : int
        The number of references.
    features : int
        The number of features, or groups of features, that have exact Shapley values.
    samples : list of SampleCheck
        The measurements for every sample.
    values : list of ndarray
        SHAP's values, one array for each input, of shape (samples, ..., outputs).
    leaks : list of Leak
        The operations that leak, the largest leak first; empty if the attributions add up.
    alternatives : dict of str to float
        The distance to the exact Shapley values with other options of
        :func:`fxshap.make_explainable`, for the farthest sample; empty if all samples are near.
    """

    model: str
    dtype: torch.dtype
    compute_dtype: torch.dtype
    references: int
    features: int
    samples: list[SampleCheck]
    values: list[Array] = field(repr=False)
    leaks: list[Leak]
    alternatives: dict[str, float] = field(default_factory=dict)

    @property
    def additivity_error(self) -> float:
        """The largest additivity error of all samples."""
        return largest(sample.additivity_error for sample in self.samples)

    @property
    def shap_gap(self) -> float:
        """The largest gap of all samples, which SHAP's own check compares with 0.01."""
        return largest(sample.shap_gap for sample in self.samples)

    @property
    def tolerance(self) -> float:
        """The largest additivity error that rounding can cause."""
        # A dtype that is not in the table, such as float8, has even fewer digits than bfloat16.
        return ADDITIVITY_TOLERANCES.get(self.compute_dtype, max(ADDITIVITY_TOLERANCES.values()))

    @property
    def additive(self) -> bool:
        """Whether the attributions add up, to the precision of the floats."""
        return self.additivity_error <= self.tolerance

    @property
    def passes_shap(self) -> bool:
        """Whether SHAP's own additivity check passes."""
        return self.shap_gap < SHAP_TOLERANCE

    @property
    def shapley_distance(self) -> float | None:
        """The largest distance to the exact Shapley values; ``None`` if it was not measured."""
        distances = [sample.shapley_distance for sample in self.samples]
        measured = [distance for distance in distances if distance is not None]
        return largest(measured) if measured else None

    @property
    def near_shapley(self) -> bool | None:
        """Whether that distance is at most 0.5; ``None`` if it was not measured."""
        distance = self.shapley_distance
        return None if distance is None else distance <= MAX_DISTANCE

    @property
    def farthest(self) -> int:
        """The number of the sample with that distance."""
        distances = [sample.shapley_distance for sample in self.samples]
        return max(range(len(distances)), key=lambda row: distances[row] or 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements as plain data, ready for JSON, without SHAP's values."""
        return {
            "model": self.model,
            "dtype": dtype_name(self.dtype),
            "compute_dtype": dtype_name(self.compute_dtype),
            "references": self.references,
            "features": self.features,
            "additive": self.additive,
            "additivity_error": self.additivity_error,
            "tolerance": self.tolerance,
            "passes_shap": self.passes_shap,
            "shap_gap": self.shap_gap,
            "shap_tolerance": SHAP_TOLERANCE,
            "near_shapley": self.near_shapley,
            "samples": [asdict(sample) for sample in self.samples],
            "leaks": [asdict(leak) for leak in self.leaks],
            "alternatives": self.alternatives,
        }

    def __str__(self) -> str:
        return "\n".join([self._title(), "", text_table(self._records()), "", *self._verdict()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        verdict = "<br>".join(map(escape, self._verdict()))
        return f"<p>{escape(self._title())}</p>{html_table(self._records())}<p>{verdict}</p>"

    def _title(self) -> str:
        samples = pluralize(len(self.samples), "sample")
        references = pluralize(self.references, "reference")
        dtypes = dtype_name(self.dtype)
        if self.compute_dtype != self.dtype:
            dtypes += f", {dtype_name(self.compute_dtype)} inside"
        return f"{self.model}, {samples} against {references}, {dtypes}"

    def _records(self) -> list[dict[str, str]]:
        return [
            {
                "sample": str(row),
                "additivity error": f"{sample.additivity_error:.1e}",
                "SHAP's gap": f"{sample.shap_gap:.1e}",
                "output difference": f"{sample.output_difference:.1e}",
                "distance to Shapley": format_distance(sample.shapley_distance),
            }
            for row, sample in enumerate(self.samples)
        ]

    def _verdict(self) -> list[str]:
        """Return what the numbers mean, one sentence or leak a line."""
        lines = [*self._additivity_verdict(), *self._shap_verdict()]
        if self.near_shapley is False:
            lines += self._distance_warning()
        if self.features > MAX_FEATURES:
            lines.append(
                f"No exact Shapley values: {self.features} features are more than {MAX_FEATURES} "
                "(see feature_mask)."
            )
        return lines

    def _distance_warning(self) -> list[str]:
        """Return that these values are far from the exact ones, and what comes nearer."""
        lines = [
            f"WARNING: the distance to Shapley of {self.shapley_distance:.2f} is over "
            f"{MAX_DISTANCE}. These values add up, but are",
            "  shared among the features in another way than the exact Shapley values.",
        ]
        if self.alternatives:
            measured = ", ".join(f"{d:.2f} with {name}" for name, d in self.alternatives.items())
            lines.append(f"  Sample {self.farthest}: {measured}.")
        lines.append(
            f"  refine='exact' gives the exact values of {pluralize(self.features, 'feature')}; "
            "make groups of more (feature_mask)."
        )
        return lines

    def _additivity_verdict(self) -> list[str]:
        error, tolerance = f"{self.additivity_error:.1e}", f"{self.tolerance:.0e}"
        if self.additive:
            return [f"Adds up: the error is {error}; rounding explains up to {tolerance}."]
        lines = [f"DOES NOT ADD UP: the error is {error}, over {tolerance}. It comes from"]
        for leak in self.leaks:
            lines.append(f"  {leak} ({leak.operation}, rule '{leak.rule}')")
            lines += [f"    at {leak.line}"] if leak.line else []
        return lines

    def _shap_verdict(self) -> list[str]:
        gap = f"its gap of {self.shap_gap:.1e}"
        if self.passes_shap:
            return [f"SHAP's own check passes: {gap} is under {SHAP_TOLERANCE}."]
        lines = [f"SHAP's own check fails: {gap} is not under {SHAP_TOLERANCE}."]
        if self.additive:
            lines.append("The gap is not relative, and these outputs are large.")
            lines.append("Explain in float64, or with check_additivity=False.")
        return lines


def format_distance(distance: float | None) -> str:
    """Return a distance with four decimals, or a dash if it was not computed."""
    return "-" if distance is None else f"{distance:.4f}"


def largest(numbers: Iterable[float]) -> float:
    """Return the largest number, or NaN if any number is NaN."""
    return float(np.max(list(numbers)))
