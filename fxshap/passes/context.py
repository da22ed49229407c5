"""The common type of all passes, and what they tell each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx


@dataclass
class Context:
    """The options of a rewrite, and what its passes report.

    Attributes
    ----------
    input_dtype : torch.dtype
        The floating-point type of the model's input.
    variances : bool
        Whether activations receive the variances of the sums before them.
    compute_dtype : torch.dtype or None
        Reported by :func:`fxshap.passes.promote_float64.record_compute_dtype`: the least precise
        type in which the model computes what depends on its input.
    densified : bool
        Reported by :func:`fxshap.passes.densify_masks.densify_masked_ops`: whether something that
        the model computes only where a mask is True is now computed at all positions.
    separated : bool
        Reported by :func:`fxshap.passes.separate_rows.separate_rows`: whether something that the
        model computes from all rows is now computed from each row.
    """

    input_dtype: torch.dtype
    variances: bool = False
    compute_dtype: torch.dtype | None = None
    densified: bool = False
    separated: bool = False


#: A pass takes a functional ATen graph whose nodes tell in ``meta["varying"]`` whether they depend
#: on the input. It changes the graph in place, or not at all, and returns it.
Pass = Callable[[fx.Graph, Context], fx.Graph]
