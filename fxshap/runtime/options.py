"""The options of an explainable model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fxshap.errors import OptionError
from fxshap.frontend.entry import EntryPoint
from fxshap.frontend.outputs import Selector
from fxshap.runtime.refinement import ONE_PASS, Refinement

#: How activations treat the sum that they receive.
RuleName = Literal["rescale", "variance"]
#: How many references go onto one tape: a number, or as many as half of the free memory holds.
ReferenceBatchSize = int | Literal["auto"]


@dataclass(frozen=True)
class Options:
    """The options of an explainable model; :func:`fxshap.make_explainable` describes them.

    Attributes
    ----------
    output : str, int, callable or None
        Which output is explained.
    entry : EntryPoint
        Where the explained inputs enter the model.
    rule : "rescale" or "variance"
        Whether activations use the variances of the sums before them.
    refinement : Refinement
        How many coalitions are evaluated.
    reference_batch_size : int or "auto"
        How many references go onto one tape.
    max_memory : int or None
        How many bytes a tape may take.
    compile : bool
        Whether backward passes are compiled.
    progress : bool
        Whether slow work shows a progress bar.

    Raises
    ------
    OptionError
        If an option has a value that it cannot have.
    """

    output: Selector = None
    entry: EntryPoint = EntryPoint()
    rule: RuleName = "rescale"
    refinement: Refinement = ONE_PASS
    reference_batch_size: ReferenceBatchSize = "auto"
    max_memory: int | None = None
    compile: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.rule not in get_args(RuleName):
            raise OptionError(f"rule is 'rescale' or 'variance', not {self.rule!r}")
        if self.refinement.coalitions == "exact":
            if self.rule != "rescale":
                raise OptionError("rule has no effect with refine='exact', which needs no rule")
            if self.compile:
                raise OptionError("compile has no effect with refine='exact', which has no rules")
        size = self.reference_batch_size
        if size != "auto" and (not isinstance(size, int) or size < 1):
            raise OptionError(f"reference_batch_size is a number of rows or 'auto', not {size!r}")
        memory = self.max_memory
        if memory is not None and (not isinstance(memory, int) or memory < 1):
            raise OptionError(f"max_memory is a number of bytes or None, not {memory!r}")
