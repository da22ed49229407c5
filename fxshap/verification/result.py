"""The result of a verification: figures for each sample, and a verdict in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

import numpy as np
import torch

from fxshap.report.tables import count, html_table, name_of, text_table
from fxshap.verification.leaks import Leak
from fxshap.verification.metrics import MAX_FEATURES, Array


@dataclass(frozen=True)
class SampleCheck:
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
    samples: list[SampleCheck]
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
        return TOLERANCES.get(self.computed_in, max(TOLERANCES.values()))

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
        if self.features > MAX_FEATURES:
            lines.append(
                f"No exact Shapley values: {self.features} features are more than {MAX_FEATURES} "
                "(see feature_mask)."
            )
        return lines


#: The gap that SHAP's own check does not let pass (``shap/explainers/_deep/deep_utils.py``).
SHAP_TOLERANCE = 0.01


#: The largest additivity error that the rounding of a deep network explains, by type.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 0.2}


def largest(numbers: Iterable[float]) -> float:
    """Return the largest number; NaN if there is one."""
    return float(np.max(list(numbers)))
