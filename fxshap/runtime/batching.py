"""The batch dimension of every tap, so that one sample row can stand for many.

All sample rows of a SHAP call are copies of one row. It is enough to run the tapped graph on that
row, if each tap of the copies is the row's own tap repeated. A probe with two different rows
decides, and finds models in which the rows of a batch influence each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxshap.capture.captured import Captured
from fxshap.errors import CaptureError
from fxshap.ops.dtypes import ACCUMULATE_IN, accumulating
from fxshap.passes.split_at_layer import ModelPrefix
from fxshap.rules.core.caching import mark_repetition
from fxshap.runtime.row_independence import (
    check_another_size,
    check_comparison,
    in_another_order,
    with_another_first_row,
    with_other_rows,
)

#: The tolerance between masked operations and their dense form.
DENSIFIED_TOLERANCE = 0.01

#: Bytes of the largest gradient of a batched backward pass of several outputs. Small operations are
#: faster on all outputs together; large ones take more memory and hardly less time.
MAX_BATCHED = 2**23
#: The same for compiled backward passes, which compute the slopes again in each.
MAX_BATCHED_COMPILED = 2**24
#: The same on an accelerator, which needs large batches to be busy.
MAX_BATCHED_ACCELERATOR = 2**28


@dataclass(frozen=True)
class BatchLayout:
    """How taps depend on the number of rows.

    Attributes
    ----------
    dims : tuple of (int or None)
        For every tap the batch dimension; ``None`` without one.
    tile : bool
        Whether some tap is not a repetition, so that the one row must be run as many copies.
    size, largest : int
        Bytes of the taps of one row, in their own type and in the type of the rules, and of the
        largest tap in the latter; 0 if the graph does not run on one row.
    """

    dims: tuple[int | None, ...]
    tile: bool
    size: int = 0
    largest: int = 0

    def expand_rows(self, taps: Sequence[Tensor], samples: int, rows: int) -> list[Tensor]:
        """Repeat the taps of each sample so that they broadcast to those of `rows` rows."""
        expanded = []
        for tap, dim in zip(taps, self.dims, strict=True):
            if dim is None or tap.shape[dim] == 1:
                expanded.append(tap)
                continue
            repeated = repeat_samples(tap, dim, samples, rows // samples)
            mark_repetition(repeated, tap)
            expanded.append(repeated)
        return expanded

    def max_batched(self, rows: int, device: torch.device, compiled: bool = False) -> int:
        """Return the largest number of outputs of `rows` rows in one batched backward pass.

        Copies of the rows must be contiguous in every tap, as repetitions of one row are.
        """
        limit = batched_bytes(device, compiled)
        fit = limit // max(self.largest * rows, 1)
        return 1 if self.tile or fit <= 2 else fit  # two large ones take longer together

    def split_batches(self, taps: Sequence[Tensor], count: int) -> list[list[Tensor]]:
        """Split the taps of `count` batches of equal size that were run as one."""
        pieces = [
            [tap] * count if dim is None else tap.chunk(count, dim)
            for tap, dim in zip(taps, self.dims, strict=True)
        ]
        return [[piece[batch] for piece in pieces] for batch in range(count)]


def repeat_samples(tap: Tensor, dim: int, samples: int, count: int) -> Tensor:
    """Repeat the part of a tap that belongs to each sample, along its batch dimension."""
    if samples == 1:
        return torch.cat([tap] * count, dim)
    parts: Tensor = tap.unflatten(dim, (samples, 1, -1))
    sizes = [count if d == dim + 1 else -1 for d in range(parts.dim())]
    return parts.expand(sizes).flatten(dim, dim + 2)


def batched_bytes(device: torch.device, compiled: bool = False) -> int:
    """Return how many bytes the largest gradient of a batched backward pass may have."""
    if device.type != "cpu":
        return MAX_BATCHED_ACCELERATOR
    return MAX_BATCHED_COMPILED if compiled else MAX_BATCHED


@torch.no_grad()
def probe_layout(
    tapped_graph: Callable[..., Any],
    inputs: Sequence[Tensor],
    rows: int | None = None,
    explained: int | None = None,
) -> BatchLayout:
    """Find the batch dimensions by comparing two rows run together with each run separately.

    Parameters
    ----------
    tapped_graph : callable
        ``tapped_graph(*inputs) -> (output, taps)``.
    inputs : sequence of Tensor
        Rows to probe with; the first and the last are used.
    rows : int, optional
        The only number of rows the graph runs on, by default any.
    explained : int, optional
        How many of the inputs, the first ones, may take other values, by default all.

    Raises
    ------
    BatchMixingError
        If a row of the output depends on another row of the input.
    """
    # The rows differ in every element, so that equal taps come from equal rows.
    free = len(inputs) if explained is None else explained
    endpoints = [x[:1] for x in inputs], [x[-1:] for x in inputs]
    first, second, other_first, other_second = (
        [perturb(x, seed) for x in row[:free]] + row[free:]
        for seed, row in enumerate((*endpoints, *reversed(endpoints)))
    )
    if rows is not None:
        check_fixed_rows(tapped_graph, first, second, other_first, rows)
        return BatchLayout((), tile=True)
    both = concatenated(first, second, 2)
    out, taps = tapped_graph(*both)
    check_rows(tapped_graph, both, (other_first, other_second), out)
    (out_1, taps_1), (out_2, taps_2) = tapped_graph(*first), tapped_graph(*second)
    check_another_size(out, torch.cat([out_1, out_2]))
    batch_dims = [batch_dim(t, a, b) for t, a, b in zip(taps, taps_1, taps_2, strict=True)]
    sizes = [tap.numel() * accumulating(tap.dtype).itemsize for tap in taps_1]
    own = [tap.nbytes for tap in taps_1 if tap.dtype in ACCUMULATE_IN]
    dims = tuple(None if dim == -1 else dim for dim in batch_dims)
    return BatchLayout(dims, -1 in batch_dims, sum(sizes) + sum(own), max(sizes, default=0))


def check_prefix_rows(
    prefix: ModelPrefix,
    model: nn.Module,
    inputs: Sequence[Tensor],
    suffix: Captured,
    explained: int,
) -> None:
    """Raise if a row that passes a layer depends on another row of the inputs.

    Parameters
    ----------
    prefix : ModelPrefix
        Leads from the model's inputs to the layer.
    model : nn.Module
    inputs : sequence of Tensor
        Rows to probe with.
    suffix : Captured
        Leads from the layer to the output.
    explained : int
        How many of the inputs, the first ones, may take other values.
    """

    def tapped_graph(*rows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        passing = prefix(model, rows)[: suffix.explained]
        return torch.cat([x.flatten(1) for x in passing], 1), ()

    probe_layout(tapped_graph, inputs, suffix.rows, explained)


def check_fixed_rows(
    tapped_graph: Callable[..., Any],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    other_first: Sequence[Tensor],
    rows: int,
) -> None:
    """Compare a row among copies of itself with the same row before copies of another."""
    if rows > 1:
        mixed = concatenated(first, second, rows)
        check_rows(tapped_graph, mixed, (other_first, first), tapped_graph(*mixed)[0])


def check_rows(
    tapped_graph: Callable[..., Any],
    inputs: Sequence[Tensor],
    others: tuple[Sequence[Tensor], Sequence[Tensor]],
    output: Tensor,
) -> None:
    """Raise a BatchMixingError if a row is computed otherwise next to another row.

    Parameters
    ----------
    tapped_graph : callable
        ``tapped_graph(*inputs) -> (output, taps)``.
    inputs : sequence of Tensor
        A row, and copies of another.
    others : pair of sequences of Tensor
        Rows that replace the first and the others.
    output : Tensor
        The output for `inputs`.
    """
    rows = len(inputs[0])
    later = concatenated([x[:1] for x in inputs], others[1], rows)
    earlier = concatenated(others[0], [x[-1:] for x in inputs], rows)
    check_comparison(tapped_graph, with_other_rows(inputs, later), output)
    check_comparison(tapped_graph, in_another_order(inputs), output)
    check_comparison(tapped_graph, with_another_first_row(inputs, earlier), output)


def concatenated(first: Sequence[Tensor], others: Sequence[Tensor], rows: int) -> list[Tensor]:
    """Return inputs of `rows` rows: one, and copies of another."""
    return [torch.cat([a] + [b] * (rows - 1)) for a, b in zip(first, others, strict=True)]


@torch.no_grad()
def check_densified(
    tapped_graph: Callable[..., Any], masked_graph: fx.GraphModule, inputs: Sequence[Tensor]
) -> None:
    """Raise if the dense form of masked operations differs from what the model computes.

    Parameters
    ----------
    tapped_graph : callable
        ``tapped_graph(*inputs) -> (output, taps)``.
    masked_graph : fx.GraphModule
        ``masked_graph(*inputs) -> output`` computes only where masks are True.
    inputs : sequence of Tensor
    """
    if not allclose_to_largest(
        tapped_graph(*inputs)[0], masked_graph(*inputs), DENSIFIED_TOLERANCE
    ):
        raise CaptureError(
            "what the model computes where a mask is True (as in `h[mask] = f(h[mask])`), or in "
            "sorted rows, depends on how many elements the mask selects, or on the other elements; "
            "compute it for each element separately, or for all and select with torch.where"
        )


def check_assumed(output: Tensor, plain: Tensor) -> None:
    """Raise if a graph of inputs that leave no group empty does not compute what the model does.

    Parameters
    ----------
    output, plain : Tensor
        The output of the graph, and the model's own.
    """
    if not allclose_to_largest(output, plain.detach(), DENSIFIED_TOLERANCE):
        raise CaptureError(
            "the model computes something else where no element is selected, as after "
            "`if not mask.any():` or `if len(tokens) == 0:`, and for these inputs none is, or uses "
            "their number, as in `tokens[: int(mask.sum())]`, so no single graph describes it; "
            "choose with torch.where, or take a size by .item() instead of int()"
        )


def perturb(x: Tensor, seed: int) -> Tensor:
    """Add up to a tenth of its size to every element; the global random state stays.

    Integers, such as ids before a layer, stay as they are.
    """
    if not (x.is_floating_point() or x.is_complex()):
        return x
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    largest = x.abs().amax()
    return x + noise.to(x.device) * torch.where(largest > 0, largest, 1.0) / 10


def batch_dim(both: Tensor, first: Tensor, second: Tensor) -> int | None:
    """Return the dimension in which a tap of two rows is the two taps of one row concatenated.

    Return ``None`` if the tap does not depend on the rows, and -1 if it is no concatenation.
    """
    dims = [d for d in range(both.dim()) if both.shape[d] != first.shape[d]]
    if not dims:
        return (
            None if allclose_to_largest(both, first) and allclose_to_largest(both, second) else -1
        )
    if len(dims) > 1:  # every row is paired with every row
        return -1
    joined = torch.cat([first, second], dims[0])
    # A dimension into which something else is folded must not look repeated by coincidence.
    same = allclose_to_largest if first.shape[dims[0]] == 1 else allclose_at_every_scale
    return dims[0] if same(both, joined) else -1


def allclose_at_every_scale(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors are close, also in elements that a mask of -1e9 hides.

    Elements below the rounding of the largest are compared again, among themselves.
    """
    while allclose_to_largest(a, b):
        if not a.is_floating_point() or not a.numel():
            return True
        size = a.nan_to_num(0.0, 0.0, 0.0).abs()
        small = size < torch.finfo(a.dtype).eps / 16 * size.amax()
        if not small.any():
            return True
        a, b = a[small], b[small]
    return False


def allclose_to_largest(a: Tensor, b: Tensor, tolerance: float | None = None) -> bool:
    """Return True if two tensors are equal up to `tolerance` times the largest element."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = (value.nan_to_num(0.0, 0.0, 0.0) for value in (a, b))
    scale = float(a.abs().max()) if a.numel() else 0.0
    tolerance = torch.finfo(a.dtype).eps ** 0.5 if tolerance is None else tolerance
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * max(scale, torch.finfo(a.dtype).tiny))
