"""How far to go beyond one pass: coalitions, exact values, or what a time allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from fxshap.errors import OptionError
from fxshap.runtime.features import FeatureDims, FeatureMask, feature_numbers

#: Pairs of coalitions for every reference, all coalitions, or as many as fit into a time.
Coalitions = int | Literal["exact", "auto"]

#: The most groups of features that differ between a sample and a reference, for exact values.
MAX_GROUPS = 16
#: Seconds for one sample with ``"auto"``.
BUDGET = 1.0


@dataclass(frozen=True)
class Refinement:
    """How to refine: how many coalitions of features to use, and what a feature is.

    Attributes
    ----------
    coalitions : int, "exact" or "auto"
        A number of complementary pairs of coalitions for every reference, or as many backward
        passes in longer chains; 0 for one pass. ``"exact"`` evaluates the model on all coalitions:
        the exact Shapley values of all outputs, in 2 ** features rows for every reference.
        ``"auto"`` is exact where that fits into `budget`, and otherwise as many pairs as fit.
    seed : int
        Seed of the coalitions: the same call gives the same values.
    feature_dims : sequence of int, or of one such sequence per input, optional
        The dimensions of an input, counted with the batch as 0, that index its features. What
        differs in other dimensions, such as the channels of a pixel or the embedding of a token, is
        one feature. By default (2, 3) for 4-d inputs, otherwise all. For token embeddings of shape
        (rows, tokens, width) and one-hot sequences it is (1,) or (2,).
    feature_mask : Tensor, ndarray, or sequence of these, optional
        Groups of elements that are one feature, in place of `feature_dims`: integers, one tensor
        for each input, which broadcasts to the shape of one row. Elements with the same number, in
        any input, are one feature, as in Captum: the patches of an image, or groups of columns.
    budget : float, optional
        With ``"auto"``: how many seconds one sample may take, for each output that is explained one
        by one; 1 by default.
    max_groups : int, optional
        With ``"exact"``: in how many features a sample and a reference may differ; 16 by default.

    Raises
    ------
    OptionError
        If an option has a value that it cannot have, or has no effect with `coalitions`.

    Examples
    --------
    >>> import torch, fxshap
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU())
    >>> explainable = fxshap.make_explainable(model, refine=fxshap.Refinement(4, seed=1))
    >>> pairs_of_columns = torch.tensor([0, 0, 1, 1])
    >>> exact = fxshap.Refinement("exact", feature_mask=pairs_of_columns)
    >>> explainable = fxshap.make_explainable(model, refine=exact)
    """

    coalitions: Coalitions
    seed: int = 0
    feature_dims: FeatureDims = None
    feature_mask: FeatureMask = field(default=None, compare=False)
    budget: float | None = None
    max_groups: int | None = None

    def __post_init__(self) -> None:
        count = self.coalitions
        number = isinstance(count, int) and not isinstance(count, bool) and count >= 0
        if not number and count not in ("exact", "auto"):
            raise OptionError(
                "refine counts pairs of coalitions, 0 or more, or is 'exact' or 'auto', not "
                f"{count!r}"
            )
        if self.seed and count in (0, "exact"):
            raise OptionError(
                "seed has no effect without coalitions to draw; give 1 or more, or 'auto'"
            )
        if isinstance(self.feature_dims, Tensor):
            raise OptionError("a tensor with the number of each feature is feature_mask=")
        if self.feature_dims is not None and self.feature_mask is not None:
            raise OptionError("feature_mask defines the features; leave out feature_dims")
        self._check_limit("budget", self.budget, "auto")
        self._check_limit("max_groups", self.max_groups, "exact")

    def _check_limit(self, name: str, limit: float | None, only: str) -> None:
        if limit is None:
            return
        if self.coalitions != only:
            raise OptionError(f"{name} has no effect without refine={only!r}")
        if not limit > 0:
            raise OptionError(f"{name} is a number above 0, not {limit!r}")

    @property
    def pairs(self) -> int:
        """The number of pairs of coalitions, 0 if none are drawn."""
        return self.coalitions if isinstance(self.coalitions, int) else 0

    def features(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the number of the feature that every element of the inputs belongs to."""
        return feature_numbers(inputs, self.feature_dims, self.feature_mask)


ONE_PASS = Refinement(0)
