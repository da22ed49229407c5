"""Networks of torchvision and timm."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.zoo.entry import Entry, only_tensor

# Beside a torch build that it was not made for, torchvision cannot register its operators; the
# networks here need none of them but their names.
_OPERATORS = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

DETECTORS = ("rcnn", "retinanet", "fcos", "ssd", "raft", "quantized")

#: Keyword arguments and input shapes of torchvision networks that need their own.
TORCHVISION: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "googlenet": ({"init_weights": True, "aux_logits": False}, (3, 64, 64)),
    "inception_v3": ({"init_weights": True, "aux_logits": False}, (3, 96, 96)),
    "maxvit_t": ({"input_size": (224, 224)}, (3, 224, 224)),
    "vit_": ({"image_size": 64}, (3, 64, 64)),
    "vit_h_14": ({"image_size": 56}, (3, 56, 56)),
    "mvit": ({}, (3, 16, 224, 224)),
    "swin3d": ({}, (3, 16, 64, 64)),
    "s3d": ({}, (3, 16, 64, 64)),
    "r3d": ({}, (3, 8, 64, 64)),
    "mc3": ({}, (3, 8, 64, 64)),
    "r2plus1d": ({}, (3, 8, 64, 64)),
}
#: Modules of timm whose smallest network works on images larger than the measurement needs.
TIMM: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "deepseek_vit": ({"img_size": 112}, (3, 112, 112)),
    "gemma4_vit": ({"img_size": 96}, (3, 96, 96)),
    "qwen3_vit": ({"img_size": 96}, (3, 96, 96)),
    "vision_transformer_sam": ({"img_size": 128}, (3, 128, 128)),
    "hieradet_sam2": ({}, (3, 224, 224)),
}
SEGMENTATION = ("deeplab", "fcn", "lraspp")
TOO_LARGE = ("vit_h_14", "regnet_y_128gf", "swin3d_b", "mvit_v1_b")


def torchvision_entries() -> Iterator[Entry]:
    """Yield every classifier of torchvision, its video networks and pooled segmenters."""
    import torchvision.models as zoo

    for name in zoo.list_models():
        if any(part in name for part in DETECTORS) or name in TOO_LARGE:
            continue
        best = max((k for k in TORCHVISION if name.startswith(k)), key=len, default="")
        kwargs, shape = TORCHVISION.get(best, ({}, (3, 64, 64)))
        segments = name.startswith(SEGMENTATION)
        if segments:
            kwargs = {**kwargs, "weights_backbone": None}
        yield Entry(
            "torchvision",
            name.split("_")[0].rstrip("0123456789"),
            name,
            partial(zoo.get_model, name, weights=None, **kwargs),
            shape,
            pooled_mask if segments else only_tensor,
        )


def pooled_mask(result: object) -> Tensor:
    """Average a segmenter's class scores over the image."""
    assert isinstance(result, dict)
    scores: Tensor = result["out"]
    return scores.mean((2, 3))


def timm_entries() -> Iterator[Entry]:
    """Yield the smallest network of every module of timm."""
    import timm

    for module in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=module):
            with torch.device("meta"):
                try:
                    network = timm.create_model(name)
                except Exception:  # one that cannot be built without storage is never the smallest
                    continue
            sizes[name] = sum(p.numel() for p in network.parameters())
        name = min(sizes, key=lambda key: (sizes[key], key))
        kwargs, shape = TIMM.get(module, ({}, timm.get_pretrained_cfg(name).input_size))
        make = partial(timm.create_model, name, **kwargs)
        yield Entry("timm", module, name, make, shape, only_tensor)
