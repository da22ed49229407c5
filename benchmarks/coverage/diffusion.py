"""Networks of diffusers, from small configurations with random weights.

The latents are explained. The time step, the texts and their masks are the same for all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import benchmarks.coverage.torchvision_import  # noqa: F401
from benchmarks.coverage.entry import Entry, Shape
from benchmarks.coverage.language import read_out

HEADS, HEAD_WIDTH, TEXTS, TEXT_WIDTH = 2, 16, 4, 16
HUNYUAN = {
    "num_attention_heads": HEADS, "attention_head_dim": HEAD_WIDTH, "num_layers": 1,
    "num_refiner_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": TEXT_WIDTH,
    "rope_axes_dim": (4, 6, 6), "in_channels": 4, "out_channels": 4,
}  # fmt: skip
BLOCKS = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
}  # fmt: skip

IMAGE, VIDEO = (4, 8, 8), (4, 2, 4, 4)


def texts(count: int = TEXTS) -> Tensor:
    """Draw the states of a text encoder."""
    return torch.randn(count, TEXT_WIDTH)


def last_is_padding() -> Tensor:
    """Return the mask of a text whose last token is padding."""
    return torch.tensor([1] * (TEXTS - 1) + [0])


def all_tokens() -> Tensor:
    """Return the mask of a text without padding."""
    return torch.ones(TEXTS, dtype=torch.long)


def step() -> Tensor:
    """Return a time step."""
    return torch.tensor(7.0)


#: (class, configuration, shape of the latents, what draws the other arguments)
MODELS: list[tuple[str, dict[str, Any], Shape, dict[str, Callable[[], Tensor]]]] = [
    ("DiTTransformer2DModel",
     {"num_attention_heads": HEADS, "attention_head_dim": HEAD_WIDTH, "in_channels": 4,
      "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 10},
     IMAGE, {"timestep": step, "class_labels": lambda: torch.tensor(3)}),
    ("UNet2DModel",
     {**BLOCKS, "in_channels": 4, "out_channels": 4, "attention_head_dim": 4,
      "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
      "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
     IMAGE, {"timestep": step}),
    ("UNet2DConditionModel",
     {**BLOCKS, "attention_head_dim": 4, "cross_attention_dim": TEXT_WIDTH,
      "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
      "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
     IMAGE, {"timestep": step, "encoder_hidden_states": texts}),
    ("HunyuanVideoTransformer3DModel",
     {**HUNYUAN, "num_single_layers": 1, "pooled_projection_dim": TEXT_WIDTH},
     VIDEO, {"timestep": step, "encoder_hidden_states": texts,
             "encoder_attention_mask": last_is_padding,
             "pooled_projections": lambda: texts(1)[0], "guidance": lambda: torch.tensor(6.0)}),
    ("HunyuanVideo15Transformer3DModel",
     {**HUNYUAN, "text_embed_2_dim": TEXT_WIDTH, "image_embed_dim": TEXT_WIDTH},
     VIDEO, {"timestep": step, "encoder_hidden_states": texts,
             "encoder_attention_mask": last_is_padding, "encoder_hidden_states_2": texts,
             "encoder_attention_mask_2": all_tokens, "image_embeds": lambda: texts(3)}),
]  # fmt: skip


class Denoiser(nn.Module):
    """A network with all arguments but the latents given.

    Parameters
    ----------
    network : nn.Module
    arguments : mapping of str to Tensor
        For one row; the same for all.
    """

    def __init__(self, network: nn.Module, arguments: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network = network
        self.names = tuple(arguments)
        for name, value in arguments.items():
            self.register_buffer(name, value)

    def forward(self, latents: Tensor) -> Any:
        """Call the network."""
        values = {name: getattr(self, name) for name in self.names}
        rows = {name: value.expand(len(latents), *value.shape) for name, value in values.items()}
        return self.network(latents, **rows, return_dict=False)


def build(
    name: str, configuration: dict[str, Any], arguments: Mapping[str, Callable[[], Tensor]]
) -> nn.Module:
    """Build a network and draw its arguments."""
    import diffusers

    network = getattr(diffusers, name)(**configuration)
    return Denoiser(network, {key: draw() for key, draw in arguments.items()})


def diffusers_entries() -> Iterator[Entry]:
    """Yield the networks of diffusers."""
    for name, configuration, shape, arguments in MODELS:
        make = partial(build, name, configuration, arguments)
        family = name.removesuffix("Model").partition("Transformer")[0]
        yield Entry("diffusers", family, name, make, (shape,), read_out, "diffusers")
