"""Import torchvision with a torch build that it was not made for.

There it cannot load its own operators and stops at their names. The networks of the zoos need none
of them, so only the names are declared. Importing this module first is enough.
"""

from __future__ import annotations

import torch

NAMES = ("nms", "qnms")

try:
    import torchvision  # noqa: F401
except ModuleNotFoundError:
    pass
except RuntimeError:  # operator torchvision::nms does not exist
    OPERATORS = torch.library.Library("torchvision", "DEF")
    for name in NAMES:
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
