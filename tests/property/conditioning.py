"""How many digits a network has to give, whoever computes it.

Monte Carlo arithmetic (Parker 1997): the network is run with a small random relative error in the
result of every operation. An output that moves by a thousand times that error has three digits
fewer than the arithmetic, and no attributions of it can add up to more than it has.
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
#: What returns memory that nothing is written to yet, and may hold NaN by chance.
UNWRITTEN = (
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided
)  # fmt: skip
REMAINDERS = (aten.fmod, aten.remainder, aten.frac)
#: Farther places in an image are no integers to torch's kernels.
LARGEST_PLACE = 2.0**51
#: Relative error put into every result.
ERROR = 1e-6
TRIALS = 3
#: Inputs that are lost beside what is added to them.
SMALL = 1e-3
#: How much steeper a slope inside a network may be than that of the whole.
WORST_GROWTH = 1e6


class RandomErrors(TorchDispatchMode):
    """Multiply what every operation returns by 1 + ERROR * uniform(-1, 1).

    Logarithms of softmax are also moved by that much: they are logarithms of sums of at least 1,
    and one near 0 has lost its digits in the sum.

    What float32 can hold is left alone: a product of halves or an integer is exact in float64, and
    a tie between such numbers is a tie.

    Parameters
    ----------
    seed : int
    everything : bool
        Whether to disturb these too: 0.5 + 1e-30 is 0.5, and only looks exact.

    Attributes
    ----------
    overflow : bool
        Whether any result was NaN or infinite, or a number was turned into an integer that its type
        does not hold, which C leaves undefined, or a remainder had no digits, see
        :func:`leaves_no_digits`; constant -inf (masks) do not count.
    """

    def __init__(self, seed: int, everything: bool = False) -> None:
        super().__init__()
        self.everything = everything
        self.generator = torch.Generator().manual_seed(seed)
        self.overflow = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten._to_copy.default:
            self.overflow |= overflows(args[0], result.dtype)
        if func in GRID_SAMPLERS:
            self.overflow |= bool((args[1].abs() * max(args[0].shape[2:]) >= LARGEST_PLACE).any())
        if func.overloadpacket in REMAINDERS:
            self.overflow |= leaves_no_digits(*args)
        returns = func._schema.returns
        if not returns or func.overloadpacket in UNWRITTEN:  # a check, or nothing yet
            return result
        outputs = list(result) if isinstance(result, tuple | list) else [result]
        for place, output in enumerate(outputs):
            alias = returns[min(place, len(returns) - 1)].alias_info
            if alias is None or alias.is_write:  # a view computes nothing
                for value in pytree.tree_leaves(output):
                    if isinstance(value, Tensor) and value.dtype is torch.float64:
                        self.disturb(value)
                        if func is aten._log_softmax.default:
                            value.add_(ERROR * self.noise(value))
        return result

    def disturb(self, value: Tensor) -> None:
        self.overflow |= bool((value.isnan() | (value == torch.inf)).any())
        exact = (value.float().double() == value) & (not self.everything)
        value.mul_(torch.where(exact, 1.0, 1 + ERROR * self.noise(value)))

    def noise(self, value: Tensor) -> Tensor:
        """Draw numbers between -1 and 1."""
        return torch.rand(value.shape, generator=self.generator, dtype=torch.float64) * 2 - 1


def overflows(value: Tensor, dtype: torch.dtype) -> bool:
    """Say whether an integer type does not hold some of these floating-point numbers."""
    if dtype.is_floating_point or dtype.is_complex or dtype is torch.bool:
        return False
    return value.is_floating_point() and not bool((value.abs() < torch.iinfo(dtype).max).all())


def leaves_no_digits(value: Tensor | float, divisor: Tensor | float = 1.0) -> bool:
    """Say whether the last places of some values are not smaller than what they are divided by.

    Their remainder depends on digits that they do not have. Random errors do not show it for a
    divisor of 8, say: 1e30 is a multiple of 8, and so are all numbers around it.
    """
    size, by = (torch.as_tensor(v, dtype=torch.float64).abs() for v in (value, divisor))
    return bool((size * torch.finfo(torch.float64).eps >= by).any())


@torch.no_grad()
def condition_number(
    model: nn.Module, samples: Sequence[Tensor], references: Sequence[Tensor]
) -> tuple[float, bool]:
    """Return how much relative errors grow on the way to the output, and whether any overflows.

    Parameters
    ----------
    model : nn.Module
    samples, references : sequence of Tensor
        In float64, one tensor an input.
    """
    inputs = [torch.cat(pair) for pair in zip(samples, references, strict=True)]
    output = model(*inputs)
    scale = output.abs().max()
    small = max(float(x.abs().max()) for x in inputs) < SMALL
    largest, overflow = steepest(output, inputs, len(samples[0])), False
    for trial in range(TRIALS):
        errors = RandomErrors(trial, everything=small)
        moved = [x.clone() for x in inputs]
        for x in moved:
            errors.disturb(x)
        with errors:
            noisy = model(*moved)
        largest = max(largest, float((noisy - output).abs().max() / (scale * ERROR)))
        overflow |= errors.overflow
    return largest, overflow


def steepest(output: Tensor, inputs: Sequence[Tensor], count: int) -> float:
    """Largest relative change of the output between two ends over that of the input.

    It is large where the ends lie close together on either side of a jump: a multiplier is that
    large too, and magnifies the rounding of what it is multiplied with.

    Parameters
    ----------
    output : Tensor
        For `count` samples and, after them, the references.
    inputs : sequence of Tensor
    count : int
    """
    changes, steps = (
        between(value, count) / value.abs().max() for value in (output, together(inputs))
    )
    return float(torch.where(changes == 0, 0.0, changes / steps).max())


def is_too_steep(output: Tensor, inputs: Sequence[Tensor], count: int) -> bool:
    """Say whether a slope between two ends is no number, as where 1e-310 makes a step of 1."""
    changes, steps = between(output, count), between(together(inputs), count)
    largest = torch.finfo(output.dtype).max / WORST_GROWTH
    return bool(((changes > 0) & (changes / largest > steps)).any())


def together(inputs: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten(1) for x in inputs], 1)


def between(value: Tensor, count: int) -> Tensor:
    """Largest difference between each of the first `count` rows and each of the others."""
    return (value[:count, None] - value[None, count:]).abs().amax(2)
