"""Bound arguments: which tensors have a row for each sample, and which all rows share.

A tensor that is bound has one row for all samples, a row for each sample, or no rows at all: the
edges of a graph, a mask of shape (steps, steps), statistics of the features. SHAP does not show
which of them a tensor has, and shapes do not tell (three samples, or three nodes). The model does:
without rows, a tensor is accepted as it is whatever the number of rows of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, count, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxshap.errors import InputError
from fxshap.frontend.inputs import has_rows

#: Of more bound tensors, only single ones are tried in the less likely way.
MAX_ENUMERATED = 4


@dataclass(frozen=True, eq=False)
class Shared:
    """A bound tensor without rows, which all rows of a batch share.

    fxshap finds out by itself which bound tensors have rows, by calling the model with several
    numbers of rows. This class marks one where the model accepts both.

    Parameters
    ----------
    value : Tensor
        For example the edges of a graph, a mask of shape (steps, steps), or statistics.

    Examples
    --------
    >>> import shap, torch, fxshap
    >>> class Standardized(torch.nn.Module):
    ...     def forward(self, x, mean):
    ...         return torch.tanh(x - mean)
    >>> mean = fxshap.Shared(torch.tensor([0.1, 0.2, 0.3]))
    >>> explainable = fxshap.make_explainable(Standardized()).bind(mean=mean)
    >>> shap.DeepExplainer(explainable, torch.randn(9, 3)).shap_values(torch.randn(2, 3)).shape
    (2, 3, 3)
    """

    value: Tensor


#: ``run(arguments, rows)`` returns the model's output for these bound arguments and inputs of
#: `rows` rows; None if it fails, or the output has other rows.
Run = Callable[[dict[str, Any], int], Tensor | None]


def find_shared(bound: Mapping[str, Any], run: Run) -> frozenset[int] | None:
    """Return the indices, among the flattened bound arguments, of the tensors that rows share.

    Every choice is tried at two numbers of rows that no tensor has, so that no tensor fits by
    coincidence. A tensor of one row is more likely repeated, unless the model computes something
    else with it as it is; any other is more likely shared.

    Parameters
    ----------
    bound : mapping of str to object
    run : callable

    Returns
    -------
    frozenset of int, or None if the model fails with every choice
    """
    leaves = pytree.tree_leaves(dict(bound))
    candidates = [index for index, value in enumerate(leaves) if has_rows(value)]
    lengths = {len(leaves[index]) for index in candidates}
    numbers = list(islice((n for n in count(2) if n not in lengths), 2))
    single = frozenset(index for index in candidates if len(leaves[index]) == 1)
    likely = frozenset(candidates) - single

    def outputs(shared: frozenset[int], numbers: Sequence[int]) -> list[Tensor] | None:
        results = []
        for rows in numbers:
            if (output := run(expand_first_row(bound, shared, rows), rows)) is None:
                return None
            results.append(output)
        return results

    for changed in choices(candidates):
        shared = likely ^ frozenset(changed)
        if (repeated := outputs(shared, numbers)) is None:
            continue
        as_it_is = outputs(shared | single, numbers[:1]) if single - shared else None
        differs = as_it_is is not None and not same_outputs(as_it_is[0], repeated[0])
        return shared | single if differs else shared
    return None


def same_outputs(a: Tensor, b: Tensor) -> bool:
    """Return True if two outputs have the same shape and, up to rounding, the same values."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)


def choices(candidates: list[int]) -> Iterator[tuple[int, ...]]:
    """Iterate over subsets, the small ones first."""
    most = len(candidates) if len(candidates) <= MAX_ENUMERATED else 1
    yield from chain.from_iterable(combinations(candidates, n) for n in range(most + 1))


def expand_first_row(
    bound: Mapping[str, Any], shared: Collection[int], rows: int
) -> dict[str, Any]:
    """Return bound arguments for inputs of any number of rows: the first rows, repeated."""
    leaves, spec = pytree.tree_flatten(dict(bound))
    for index, value in enumerate(leaves):
        if has_rows(value) and index not in shared:
            leaves[index] = repeat_first_row(value, rows)
    arguments: dict[str, Any] = unwrap_shared(pytree.tree_unflatten(leaves, spec))
    return arguments


def repeat_first_row(x: Tensor, rows: int) -> Tensor:
    """Return the first row of a tensor as often as given."""
    return x[:1].repeat(rows, *[1] * (x.dim() - 1))


def expand_bound(
    bound: Mapping[str, Any], shared: Collection[int], like: Tensor, pairs: bool
) -> dict[str, Any]:
    """Return bound arguments with as many rows as the inputs of a call, and the shared ones marked.

    Parameters
    ----------
    bound : mapping of str to object
        Tensors have one row for all samples, or one row for every sample. Other values stay.
    shared : collection of int
        The indices, among the flattened arguments, of the tensors without rows.
    like : Tensor
        An input of the call.
    pairs : bool
        Whether its rows are ``[samples; references]``.

    Raises
    ------
    InputError
        If a tensor has another number of rows.
    """
    paths, spec = pytree.tree_flatten_with_path(dict(bound))
    leaves: list[Any] = []
    for index, (path, value) in enumerate(paths):
        if isinstance(value, Shared):
            leaves.append(Shared(value.value.to(like.device)))
        elif not has_rows(value):
            leaves.append(value)
        elif index in shared:
            leaves.append(Shared(value.to(like.device)))
        else:
            leaves.append(match_rows(bound_name(path), value.to(like.device), len(like), pairs))
    expanded: dict[str, Any] = pytree.tree_unflatten(leaves, spec)
    return expanded


def match_rows(name: str, value: Tensor, rows: int, pairs: bool) -> Tensor:
    """Repeat a single row for all rows of a call, or the samples' rows for their references."""
    if len(value) == 1:
        return value.expand(rows, *value.shape[1:])
    if pairs and 2 * len(value) == rows:
        return torch.cat([value, value])
    if len(value) == rows and not pairs:
        return value
    of_each_baseline = pairs and rows % (2 * len(value)) == 0
    captum = " (with Captum's DeepLiftShap in additional_forward_args)" if of_each_baseline else ""
    raise InputError(
        f"{name} is bound with {len(value)} rows, but this call has {rows // (1 + pairs)}; bind "
        f"one row, which is used for all, or a row for every sample{captum}. A tensor without "
        f"rows, which all samples share, is bound as fxshap.Shared(...), if the model takes {name} "
        "so"
    )


def check_single_row(bound: Mapping[str, Any], shared: Collection[int]) -> None:
    """Raise an InputError if a tensor is bound with several rows, of which SHAP names none."""
    paths, _ = pytree.tree_flatten_with_path(dict(bound))
    for index, (path, value) in enumerate(paths):
        if has_rows(value) and index not in shared and len(value) != 1:
            name = bound_name(path)
            plain = name.strip("'")
            raise InputError(
                f"{name} is bound with {len(value)} rows, but SHAP compares one sample at a time "
                "with all references, and does not tell which; make an explainer for each sample, "
                f"from explainable.bind({plain}={plain}[i:i+1]). A tensor without rows, which all "
                f"samples share, is bound as fxshap.Shared(...), if the model takes {name} so"
            )


def bound_name(path: pytree.KeyPath) -> str:
    """Return the name of a bound argument for messages, such as "'mask'" or "'batch'['mask']"."""
    first, *rest = path
    return f"{pytree.keystr((first,)).strip('[]')}{pytree.keystr(tuple(rest))}"


def unwrap_shared(arguments: Any) -> Any:
    """Return nested arguments in which every :class:`Shared` is its tensor."""
    return pytree.tree_map(
        lambda value: value.value if isinstance(value, Shared) else value, arguments
    )
