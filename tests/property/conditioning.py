"""How many digits the output of a network has.

Monte Carlo arithmetic (Parker 1997): the network runs with a small random relative error in the
result of every operation. An output that changes by a thousand times that error has three digits
fewer than the arithmetic, and its attributions cannot add up more precisely.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
GRID_SAMPLERS = (aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
#: Operators that return uninitialized memory, which may contain NaN.
UNINITIALIZED = (
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided
)  # fmt: skip
REMAINDERS = (aten.fmod, aten.remainder, aten.frac)
#: Coordinates of an image from which torch's kernels no longer compute integers.
MAX_COORDINATE = 2.0**51
#: The relative error of every result.
ERROR = 1e-6
TRIALS = 3
#: Inputs below this size lose their digits where a network adds constants to them.
SMALL = 1e-3
#: How many times steeper the slope of a part of a network may be than that of the network.
MAX_GROWTH = 1e6


class RandomErrors(TorchDispatchMode):
    """Multiply the result of every operation by 1 + ERROR * uniform(-1, 1).

    The same error is also added to the results of log_softmax. They are logarithms of sums of at
    least 1, and a result near 0 has lost its digits in the sum.

    Numbers that are exact in float32 do not change: a product of halves or an integer is exact in
    float64, and a tie between such numbers is a tie.

    Parameters
    ----------
    seed : int
    include_exact : bool
        Whether to perturb these numbers too: 0.5 + 1e-30 is 0.5, and only looks exact.

    Attributes
    ----------
    overflow : bool
        Whether a result was NaN or infinite, a number was cast to an integer type that cannot hold
        it (undefined in C), or a remainder had no digits, see :func:`remainder_has_no_digits`. A
        constant -inf (a mask) does not count.
    """

    def __init__(self, seed: int, include_exact: bool = False) -> None:
        super().__init__()
        self.include_exact = include_exact
        self.generator = torch.Generator().manual_seed(seed)
        self.overflow = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten._to_copy.default:
            self.overflow |= overflows(args[0], result.dtype)
        if func in GRID_SAMPLERS:
            self.overflow |= bool((args[1].abs() * max(args[0].shape[2:]) >= MAX_COORDINATE).any())
        if func.overloadpacket in REMAINDERS:
            self.overflow |= remainder_has_no_digits(*args)
        returns = func._schema.returns
        if not returns or func.overloadpacket in UNINITIALIZED:  # an assertion, or no values
            return result
        outputs = list(result) if isinstance(result, tuple | list) else [result]
        for place, output in enumerate(outputs):
            alias = returns[min(place, len(returns) - 1)].alias_info
            if alias is None or alias.is_write:  # a view computes nothing
                for value in pytree.tree_leaves(output):
                    if isinstance(value, Tensor) and value.dtype is torch.float64:
                        self.perturb(value)
                        if func is aten._log_softmax.default:
                            value.add_(ERROR * self.noise(value))
        return result

    def perturb(self, value: Tensor) -> None:
        self.overflow |= bool((value.isnan() | (value == torch.inf)).any())
        exact = (value.float().double() == value) & (not self.include_exact)
        value.mul_(torch.where(exact, 1.0, 1 + ERROR * self.noise(value)))

    def noise(self, value: Tensor) -> Tensor:
        """Return uniform random numbers between -1 and 1."""
        return torch.rand(value.shape, generator=self.generator, dtype=torch.float64) * 2 - 1


def overflows(value: Tensor, dtype: torch.dtype) -> bool:
    """Return True if an integer type cannot hold some of these floating-point numbers."""
    if dtype.is_floating_point or dtype.is_complex or dtype is torch.bool:
        return False
    return value.is_floating_point() and not bool((value.abs() < torch.iinfo(dtype).max).all())


def remainder_has_no_digits(value: Tensor | float, divisor: Tensor | float = 1.0) -> bool:
    """Return True if the rounding errors of some values are as large as their divisors.

    The remainder then depends on digits that the values do not have. Random errors do not show it
    for a divisor of 8, for example: 1e30 is a multiple of 8, and so are all numbers around it.
    """
    size, by = (torch.as_tensor(v, dtype=torch.float64).abs() for v in (value, divisor))
    return bool((size * torch.finfo(torch.float64).eps >= by).any())


@torch.no_grad()
def condition_number(
    model: nn.Module, samples: Sequence[Tensor], references: Sequence[Tensor]
) -> tuple[float, bool]:
    """Return how much a network magnifies relative errors, and whether a result overflows.

    Parameters
    ----------
    model : nn.Module
    samples, references : sequence of Tensor
        Float64, one tensor for each input.
    """
    inputs = [torch.cat(pair) for pair in zip(samples, references, strict=True)]
    output = model(*inputs)
    scale = output.abs().max()
    small = max(float(x.abs().max()) for x in inputs) < SMALL
    largest, overflow = largest_relative_slope(output, inputs, len(samples[0])), False
    for trial in range(TRIALS):
        errors = RandomErrors(trial, include_exact=small)
        moved = [x.clone() for x in inputs]
        for x in moved:
            errors.perturb(x)
        with errors:
            noisy = model(*moved)
        largest = max(largest, float((noisy - output).abs().max() / (scale * ERROR)))
        overflow |= errors.overflow
    return largest, overflow


def largest_relative_slope(output: Tensor, inputs: Sequence[Tensor], count: int) -> float:
    """Return the largest relative change of the output divided by that of the input.

    It is large where two endpoints are close together on both sides of a jump. A multiplier is as
    large then, and magnifies the rounding errors of its factor.

    Parameters
    ----------
    output : Tensor
        Of `count` samples and, after them, of the references.
    inputs : sequence of Tensor
    count : int
    """
    changes, steps = (
        largest_differences(value, count) / value.abs().max()
        for value in (output, concatenate_features(inputs))
    )
    return float(torch.where(changes == 0, 0.0, changes / steps).max())


def slope_overflows(output: Tensor, inputs: Sequence[Tensor], count: int) -> bool:
    """Return True if a slope between two endpoints overflows, as for a jump of 1 over 1e-310."""
    changes, steps = (
        largest_differences(output, count),
        largest_differences(concatenate_features(inputs), count),
    )
    largest = torch.finfo(output.dtype).max / MAX_GROWTH
    return bool(((changes > 0) & (changes / largest > steps)).any())


def concatenate_features(inputs: Sequence[Tensor]) -> Tensor:
    """Return all features of a row in one dimension."""
    return torch.cat([x.flatten(1) for x in inputs], 1)


def largest_differences(value: Tensor, count: int) -> Tensor:
    """Return the largest difference of each of the first `count` rows to each of the others."""
    return (value[:count, None] - value[None, count:]).abs().amax(2)
