"""The symbols in the sizes of a captured graph.

torch imports sympy for them, which takes half a second, so it is imported at the first use.
"""

from __future__ import annotations

from typing import Any


def free_symbols(value: Any) -> Any:
    """Return the symbols of a size, or of all sizes of a tensor or of several."""
    from torch.fx.experimental import symbolic_shapes

    return symbolic_shapes.free_symbols(value)


def free_unbacked_symbols(value: Any) -> Any:
    """Return the symbols of :func:`free_symbols` that depend on the values of tensors."""
    from torch.fx.experimental import symbolic_shapes

    return symbolic_shapes.free_unbacked_symbols(value)
