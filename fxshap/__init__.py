"""Make any PyTorch model explainable by unmodified SHAP."""

from typing import TYPE_CHECKING, Any

from fxshap import _requirements as _requirements  # first, because it checks the releases
from fxshap import rules, testing
from fxshap._version import __version__
from fxshap.errors import (
    AdditivityError,
    BatchMixingError,
    CaptureError,
    CompileError,
    FxshapError,
    InputError,
    MissingExtraError,
    ModelError,
    OptionError,
    OutputError,
    RecognitionError,
    RuleError,
    WeightError,
)
from fxshap.frontend.bound import Shared
from fxshap.integrations.detect import multiplier_mode
from fxshap.module import ExplainableModule, make_explainable
from fxshap.report.report import Report
from fxshap.runtime.refinement import Refinement
from fxshap.verification.result import Verification
from fxshap.verification.verify import verify

if TYPE_CHECKING:
    from fxshap.explainer import DeepExplainer

__all__ = [
    "AdditivityError",
    "BatchMixingError",
    "CaptureError",
    "CompileError",
    "DeepExplainer",
    "ExplainableModule",
    "FxshapError",
    "InputError",
    "MissingExtraError",
    "ModelError",
    "OptionError",
    "OutputError",
    "RecognitionError",
    "Refinement",
    "Report",
    "RuleError",
    "Shared",
    "Verification",
    "WeightError",
    "__version__",
    "make_explainable",
    "multiplier_mode",
    "rules",
    "testing",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import the explainer at its first use, because importing SHAP takes seconds."""
    if name == "DeepExplainer":
        from fxshap.explainer import DeepExplainer

        return DeepExplainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
