"""The symbols in the sizes of a captured graph.

torch imports sympy for them, which takes half a second, so it is imported at the first use.
"""

from __future__ import annotations

from typing import Any

import torch


def free_symbols(value: Any) -> Any:
    """Return the symbols of a size, or of all sizes of a tensor or of several."""
    from torch.fx.experimental import symbolic_shapes

    return symbolic_shapes.free_symbols(value)


def free_unbacked_symbols(value: Any) -> Any:
    """Return the symbols of :func:`free_symbols` that depend on the values of tensors."""
    from torch.fx.experimental import symbolic_shapes

    return symbolic_shapes.free_unbacked_symbols(value)


def depended_on_values(size: Any) -> bool:
    """Return True if a size depends on the values of tensors, or did before it was fixed."""
    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size.node._expr))


def fix_size(size: torch.SymInt, number: int) -> None:
    """Tell torch that a size that depends on values is a number.

    Torch takes such sizes to be at least 2 where it cannot know, and so does not replace one by 1.
    A composite operation, such as ``torch.where(mask)``, may not return the symbol anymore.
    """
    symbol, environment = size.node.expr, size.node.shape_env
    environment.size_like.discard(symbol)
    environment.ignorable_fresh_unbacked_symbols.append(symbol)
    torch._check(size == number)
