"""Networks of torchvision and timm."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

import benchmarks.coverage.torchvision_import  # noqa: F401
from benchmarks.coverage.entry import Entry, Shape, only_tensor
from benchmarks.coverage.smallest import read_choices, smallest

#: One of each family of torchvision's video networks, MViT apart, and of its segmenters.
VIDEO = ("mc3_18", "r2plus1d_18", "r3d_18", "s3d", "swin3d_t")
SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")

#: Keyword arguments and input shapes of torchvision networks that need their own.
#: EfficientNets, made for sides of 224 to 600, would fold 64 to maps of 2 x 2 for 5 x 5 kernels:
#: the rounding of b7 grows fourfold in the one step to them.
TORCHVISION: dict[str, tuple[dict[str, Any], Shape]] = {
    "efficientnet": ({}, (3, 128, 128)),
    "googlenet": ({"init_weights": True, "aux_logits": False}, (3, 64, 64)),
    "inception_v3": ({"init_weights": True, "aux_logits": False}, (3, 96, 96)),
    "maxvit_t": ({"input_size": (224, 224)}, (3, 224, 224)),
    "vit_": ({"image_size": 64}, (3, 64, 64)),
    "vit_h_14": ({"image_size": 56}, (3, 56, 56)),
    "swin3d": ({}, (3, 8, 64, 64)),
    "s3d": ({}, (3, 14, 210, 210)),
    "r3d": ({}, (3, 8, 64, 64)),
    "mc3": ({}, (3, 8, 64, 64)),
    "r2plus1d": ({}, (3, 8, 64, 64)),
}


def torchvision_entries() -> Iterator[Entry]:
    """Yield every classifier of torchvision, its video networks and pooled segmenters."""
    import torchvision.models as zoo

    for name in (*zoo.list_models(module=zoo), *VIDEO, *SEGMENTATION):
        best = max((k for k in TORCHVISION if name.startswith(k)), key=len, default="")
        kwargs, shape = TORCHVISION.get(best, ({}, (3, 64, 64)))
        segments = name in SEGMENTATION
        if segments:
            kwargs = {**kwargs, "weights_backbone": None}
        yield Entry(
            "torchvision",
            name.split("_")[0].rstrip("0123456789"),
            name,
            partial(zoo.get_model, name, weights=None, **kwargs),
            (shape,),
            pooled_mask if segments else only_tensor,
            "torchvision",
        )
    yield Entry(
        "torchvision",
        "mvit",
        "mvit_v2, small",
        small_mvit,
        ((3, 8, 64, 64),),
        only_tensor,
        "torchvision",
    )


def small_mvit() -> nn.Module:
    """Build MViTv2 with four blocks for small videos, which its constructors do not offer."""
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    blocks = [
        MSBlockConfig(heads, width, wider, [3] * 3, [3] * 3, [1, step, step], [1, keys, keys])
        for heads, width, wider, step, keys in (
            (1, 32, 32, 1, 4),
            (2, 32, 64, 2, 2),
            (2, 64, 64, 1, 2),
            (4, 64, 128, 2, 1),
        )
    ]
    return MViT(
        (64, 64), 8, blocks,
        residual_pool=True, residual_with_cls_embed=False, rel_pos_embed=True, proj_after_attn=True,
    )  # fmt: skip


def pooled_mask(result: object) -> Tensor:
    """Average a segmenter's class scores over the image."""
    assert isinstance(result, dict)
    scores: Tensor = result["out"]
    return scores.mean((2, 3))


def timm_entries() -> Iterator[Entry]:
    """Yield the smallest network of every module of timm."""
    import timm

    choices = read_choices()
    for module in timm.list_modules():
        choice = choices[module] if module in choices else smallest(module)
        make = partial(timm.create_model, choice["name"], **choice["kwargs"])
        shape = (3, choice["side"], choice["side"])
        yield Entry("timm", module, choice["name"], make, (shape,), only_tensor, "timm")
