"""Rules: how each operation multiplies a cotangent between a reference and a sample.

Importing this package fills the table; each module holds one family of operations.
"""

from fxshap.rules import (
    composites,
    elementwise,
    gelu,
    linear,
    logic,
    maximum,
    normalisation,
    products,
    recurrent,
    softmax,
)

__all__ = [
    "composites",
    "elementwise",
    "gelu",
    "linear",
    "logic",
    "maximum",
    "normalisation",
    "products",
    "recurrent",
    "softmax",
]
