"""What must be set before anything is imported here."""

import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)

# With a torch build that it was not made for, torchvision cannot register its operators, and what
# imports it fails; nothing here needs more of them than their names.
_OPERATORS = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
