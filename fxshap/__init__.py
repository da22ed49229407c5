"""Make any PyTorch model explainable by unmodified SHAP."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fxshap import _requirements as _requirements  # first, because it checks the releases
from fxshap._version import __version__

if TYPE_CHECKING:
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
    from fxshap.explainer import DeepExplainer
    from fxshap.frontend.bound import Shared
    from fxshap.integrations.detect import multiplier_mode
    from fxshap.module import ExplainableModule, make_explainable
    from fxshap.report.report import Report
    from fxshap.runtime.refinement import Refinement
    from fxshap.verification.result import Verification
    from fxshap.verification.verify import verify

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

#: Modules that are attributes of the package.
_MODULES = ("datasets", "errors", "rules", "testing")
#: The modules of the other public names. All errors are in one.
_HOMES = {
    "DeepExplainer": "fxshap.explainer",
    "ExplainableModule": "fxshap.module",
    "Refinement": "fxshap.runtime.refinement",
    "Report": "fxshap.report.report",
    "Shared": "fxshap.frontend.bound",
    "Verification": "fxshap.verification.result",
    "make_explainable": "fxshap.module",
    "multiplier_mode": "fxshap.integrations.detect",
    "verify": "fxshap.verification.verify",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, because PyTorch and SHAP take seconds to import."""
    if name in _MODULES:
        return import_module(f"fxshap.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, "fxshap.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, also those that are not imported yet."""
    return sorted({*globals(), *__all__, *_MODULES})
