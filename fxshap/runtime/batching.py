"""Where the batch lies in every tap, so that one sample row can stand for many.

All sample rows of a SHAP call are copies of one row. Running `observe` on that row alone is enough
if each tap of the copies is the row's own tap repeated. A probe with two different rows tells, and
finds models in which the rows of a batch influence each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxshap.capture.captured import Captured
from fxshap.errors import BatchMixingError, CaptureError
from fxshap.ops.dtypes import ACCUMULATE_IN, accumulating
from fxshap.passes.split_at_layer import ModelPrefix

#: Another batch size takes other kernels, whose rounding a deep network with random weights
#: magnifies (to 0.17 in EfficientNet-B6); a model that multiplies by the number of rows changes by
#: half.
OTHER_SIZE = 0.4

#: What a model that computes where a mask holds may differ, in rounding, from computing everywhere.
SAME = 0.01

#: Bytes of the largest gradient when several outputs are walked side by side. Small operations are
#: quicker on all of them than on each; large ones take more memory and hardly less time.
MAX_BATCHED = 2**22
#: The same for compiled walks, which find the slopes anew in each.
MAX_BATCHED_COMPILED = 2**24


@dataclass(frozen=True)
class BatchLayout:
    """How taps depend on the number of rows.

    Attributes
    ----------
    dims : tuple of (int or None)
        For every tap the dimension in which rows lie one after another; ``None`` without one.
    tile : bool
        Whether some tap is not a repetition, so that the one row must be run as many.
    size, largest : int
        Bytes of the taps of one row, in their own type and in that of the rules, and of the largest
        of them in the latter; 0 if the graph does not run on one row.
    """

    dims: tuple[int | None, ...]
    tile: bool
    size: int = 0
    largest: int = 0

    def spread(self, taps: Sequence[Tensor], rows: int) -> list[Tensor]:
        """Make the taps of one row broadcast against those of `rows` rows."""
        return [
            tap if dim is None or tap.shape[dim] == 1 else repeat(tap, dim, rows)
            for tap, dim in zip(taps, self.dims, strict=True)
        ]

    def abreast(self, rows: int, fused: bool = False) -> int:
        """Return how many outputs of `rows` rows are walked side by side.

        Copies of the rows must lie one after another in every tap, as repetitions of one row do.
        """
        most = MAX_BATCHED_COMPILED if fused else MAX_BATCHED
        return 1 if self.tile else max(most // max(self.largest * rows, 1), 1)

    def apart(self, taps: Sequence[Tensor], count: int) -> list[list[Tensor]]:
        """Take the taps of several batches of as many rows that were run as one apart."""
        pieces = [
            [tap] * count if dim is None else tap.chunk(count, dim)
            for tap, dim in zip(taps, self.dims, strict=True)
        ]
        return [list(batch) for batch in zip(*pieces, strict=True)]


def repeat(tap: Tensor, dim: int, rows: int) -> Tensor:
    """Repeat a tap as a block along its batch dimension."""
    return torch.cat([tap] * rows, dim)


@torch.no_grad()
def probe_layout(
    observe: Callable[..., Any],
    inputs: Sequence[Tensor],
    rows: int | None = None,
    explained: int | None = None,
) -> BatchLayout:
    """Compare two rows run together with each run alone.

    Parameters
    ----------
    observe : callable
        ``observe(*inputs) -> (output, taps)``.
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
    # Rows that differ everywhere: what agrees by chance tells nothing about where it came from.
    free = len(inputs) if explained is None else explained
    rows_of = [[x[:1] for x in inputs], [x[-1:] for x in inputs], [x[-1:] for x in inputs]]
    first, second, third = (
        [perturb(x, seed) for x in row[:free]] + row[free:] for seed, row in enumerate(rows_of)
    )
    if rows is not None:
        check_fixed_rows(observe, first, second, rows)
        return BatchLayout((), tile=True)
    out, taps = observe(*[torch.cat(pair) for pair in zip(first, second, strict=True)])
    other, _ = observe(*[torch.cat(pair) for pair in zip(first, third, strict=True)])
    check_rows_independent(other[:1], out[:1])
    (out_1, taps_1), (out_2, taps_2) = observe(*first), observe(*second)
    check_rows_independent(out, torch.cat([out_1, out_2]), OTHER_SIZE)
    found = [row_dim(t, a, b) for t, a, b in zip(taps, taps_1, taps_2, strict=True)]
    sizes = [tap.numel() * accumulating(tap.dtype).itemsize for tap in taps_1]
    beside = [tap.nbytes for tap in taps_1 if tap.dtype in ACCUMULATE_IN]
    dims = tuple(None if dim == -1 else dim for dim in found)
    return BatchLayout(dims, -1 in found, sum(sizes) + sum(beside), max(sizes, default=0))


def check_prefix_rows(
    prefix: ModelPrefix, model: nn.Module, inputs: Sequence[Tensor], head: Captured, explained: int
) -> None:
    """Raise if a row that passes a layer depends on another row of the inputs.

    Parameters
    ----------
    prefix : Trunk
        Leads from the model's inputs to the layer.
    model : nn.Module
    inputs : sequence of Tensor
        Rows to probe with.
    head : Captured
        Leads from the layer to the output.
    explained : int
        How many of the inputs, the first ones, may take other values.
    """

    def observe(*rows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        passing = prefix(model, rows)[: head.explained]
        return torch.cat([x.flatten(1) for x in passing], 1), ()

    probe_layout(observe, inputs, head.rows, explained)


def check_fixed_rows(
    observe: Callable[..., Any], first: Sequence[Tensor], second: Sequence[Tensor], rows: int
) -> None:
    """Compare a row among copies of itself with the same row before copies of another."""
    if rows == 1:
        return
    alone, _ = observe(*[torch.cat([a] * rows) for a in first])
    mixed, _ = observe(
        *[torch.cat([a] + [b] * (rows - 1)) for a, b in zip(first, second, strict=True)]
    )
    check_rows_independent(mixed[:1], alone[:1])


def check_rows_independent(together: Tensor, alone: Tensor, tolerance: float | None = None) -> None:
    """Raise if rows give other outputs together than alone."""
    if not allclose_to_largest(together, alone, tolerance):
        raise BatchMixingError(
            "the rows of a batch influence each other in this model (as in batch norm in training "
            "mode, or a softmax over dimension 0), so a row has no attributions of its own; call "
            "model.eval(), or reduce over the features instead of the batch"
        )


@torch.no_grad()
def check_densified(
    observe: Callable[..., Any], packed: fx.GraphModule, inputs: Sequence[Tensor]
) -> None:
    """Raise if computing at all places is not what a model computes where a mask holds.

    Parameters
    ----------
    observe : callable
        ``observe(*inputs) -> (output, taps)``.
    packed : fx.GraphModule
        ``packed(*inputs) -> output`` computes where masks hold.
    inputs : sequence of Tensor
    """
    if not allclose_to_largest(observe(*inputs)[0], packed(*inputs), SAME):
        raise CaptureError(
            "what the model computes where a mask holds (as in `h[mask] = f(h[mask])`) depends on "
            "how many places the mask holds, or on the other places; compute it at each place by "
            "itself, or everywhere and choose with torch.where"
        )


def perturb(x: Tensor, seed: int) -> Tensor:
    """Add up to a tenth of its size to every element; the global random state stays."""
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    largest = x.abs().amax()
    return x + noise.to(x.device) * torch.where(largest > 0, largest, 1.0) / 10


def row_dim(both: Tensor, first: Tensor, second: Tensor) -> int | None:
    """Return the dimension along which two taps join; ``None`` without one, -1 if they do not."""
    dims = [d for d in range(both.dim()) if both.shape[d] != first.shape[d]]
    if not dims:
        return (
            None if allclose_to_largest(both, first) and allclose_to_largest(both, second) else -1
        )
    if len(dims) > 1:  # every row is beside every row
        return -1
    joined = torch.cat([first, second], dims[0])
    # Where something else is folded into the rows, it must not be taken for a repetition by chance.
    same = allclose_to_largest if first.shape[dims[0]] == 1 else allclose_at_every_scale
    return dims[0] if same(both, joined) else -1


def allclose_at_every_scale(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors are alike, also in what a mask of -1e9 or less lets through.

    Elements that are lost in the rounding of the largest are compared among themselves again.
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
    """Say whether two tensors are the same up to `tolerance` times the largest element."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = (value.nan_to_num(0.0, 0.0, 0.0) for value in (a, b))
    scale = float(a.abs().max()) if a.numel() else 0.0
    tolerance = torch.finfo(a.dtype).eps ** 0.5 if tolerance is None else tolerance
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * max(scale, torch.finfo(a.dtype).tiny))
