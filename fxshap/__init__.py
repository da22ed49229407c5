"""Make any PyTorch model explainable by unmodified SHAP."""

from fxshap import rules
from fxshap.asking import paired
from fxshap.errors import (
    BatchMixingError,
    CaptureError,
    FxshapError,
    InputError,
    ModelError,
    OutputError,
    RecognitionError,
    RuleError,
)
from fxshap.module import ExplainableModule, make_explainable

__version__ = "0.1.0"

__all__ = [
    "BatchMixingError",
    "CaptureError",
    "ExplainableModule",
    "FxshapError",
    "InputError",
    "ModelError",
    "OutputError",
    "RecognitionError",
    "RuleError",
    "make_explainable",
    "paired",
    "rules",
]
