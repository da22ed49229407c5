"""The exceptions that fxshap raises on purpose."""


class FxshapError(Exception):
    """Base class of the errors that fxshap raises on purpose."""


class ModelError(FxshapError, TypeError):
    """The model given to :func:`fxshap.make_explainable` is not an ``nn.Module``."""


class InputError(FxshapError, ValueError):
    """The dtype, shape or values of the samples or the references cannot be explained."""


class OutputError(FxshapError, ValueError):
    """The model's output is not one 2-d floating-point tensor; ``output=`` selects one."""


class WeightError(FxshapError, ValueError):
    """A weight of the model contains NaN or infinity."""


class CaptureError(FxshapError, RuntimeError):
    """The model cannot be captured as one graph, for example because it branches on values."""


class BatchMixingError(FxshapError, RuntimeError):
    """A row of the output depends on several rows of the input, so no row can be explained."""


class RuleError(FxshapError, RuntimeError):
    """An operation has neither a rule nor a derivative, or its rule failed."""


class CompileError(FxshapError, RuntimeError):
    """``torch.compile`` failed; without ``compile=True`` nothing is compiled."""


class OptionError(FxshapError, ValueError):
    """An option of a function of fxshap has a value that it cannot have."""


class AdditivityError(FxshapError, AssertionError):
    """Attributions, or the multipliers of a rule, do not sum to the finite difference."""


class MissingExtraError(FxshapError, ImportError):
    """A feature needs a package that is not installed; the message names the package."""


class RecognitionError(FxshapError, RuntimeError):
    """A library requests an explanation in a way that fxshap does not know."""
