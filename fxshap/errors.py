"""Every exception that fxshap raises on purpose."""


class FxshapError(Exception):
    """Base class of the errors that fxshap raises on purpose."""


class ModelError(FxshapError, TypeError):
    """What was given to :func:`fxshap.make_explainable` is not an ``nn.Module``."""


class InputError(FxshapError, ValueError):
    """The samples or the references cannot be explained: their dtype, shape or values."""


class OutputError(FxshapError, ValueError):
    """The model's output is not one 2-d floating-point tensor; ``output=`` selects one."""


class WeightError(FxshapError, ValueError):
    """A weight of the model contains NaN or infinity."""


class CaptureError(FxshapError, RuntimeError):
    """The model cannot be captured as one graph, as with control flow that depends on values."""


class BatchMixingError(FxshapError, RuntimeError):
    """One row of the output depends on other rows of the input, so no row can be explained."""


class RuleError(FxshapError, RuntimeError):
    """An operation has neither a rule nor a derivative, or its rule failed."""


class CompileError(FxshapError, RuntimeError):
    """The walk could not be compiled; without ``compile=True`` it need not be."""


class OptionError(FxshapError, ValueError):
    """An argument of a function of fxshap is not one of the values it can have."""


class AdditivityError(FxshapError, AssertionError):
    """Attributions, or the multipliers of a rule, do not sum to the finite difference."""


class MissingExtraError(FxshapError, ImportError):
    """A feature needs a package that is not installed; the message names the extra."""


class RecognitionError(FxshapError, RuntimeError):
    """A library asks for an explanation in a way that fxshap does not know."""
