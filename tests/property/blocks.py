"""The table of blocks that random networks are made of.

Importing these modules fills it, in this order: Hypothesis draws blocks by their position.
"""

from __future__ import annotations

from tests.property import case_blocks, elementwise_blocks, last_dim_blocks, layer_blocks
from tests.property.block import BLOCKS, LAYOUTS, WIDTH

__all__ = [
    "BLOCKS",
    "LAYOUTS",
    "WIDTH",
    "case_blocks",
    "elementwise_blocks",
    "last_dim_blocks",
    "layer_blocks",
]
