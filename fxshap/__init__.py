"""Make any PyTorch model explainable by unmodified SHAP."""

from fxshap import rules, testing
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
from fxshap.integrations.detect import paired
from fxshap.module import ExplainableModule, make_explainable
from fxshap.report.report import Report
from fxshap.verification.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "AdditivityError",
    "BatchMixingError",
    "CaptureError",
    "CompileError",
    "ExplainableModule",
    "FxshapError",
    "InputError",
    "MissingExtraError",
    "ModelError",
    "OptionError",
    "OutputError",
    "RecognitionError",
    "Report",
    "RuleError",
    "Verification",
    "WeightError",
    "make_explainable",
    "paired",
    "rules",
    "testing",
    "verify",
]
