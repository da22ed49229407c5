"""Networks of transformers, from small configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import benchmarks.coverage.torchvision_import  # noqa: F401
from benchmarks.coverage.entry import Entry

TOKENS, WIDTH, HEADS, LAYERS, INNER, VOCABULARY = 12, 32, 4, 2, 64, 50

SMALL = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": INNER, "vocab_size": VOCABULARY,
}  # fmt: skip
SMALL_IMAGE = {**SMALL, "image_size": 32, "patch_size": 8}
SMALL_IMAGE.pop("vocab_size")
KEY_VALUE = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False}
EXPERTS = {
    "moe_num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 0,
    "first_k_dense_replace": 0,
}  # fmt: skip
LATENT_ATTENTION = {
    "num_key_value_heads": HEADS, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "use_cache": False,
}  # fmt: skip
SERIES = {
    "prediction_length": 4, "context_length": 20, "lags_sequence": [1, 2], "d_model": WIDTH,
    "encoder_layers": LAYERS, "decoder_layers": 1, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": INNER, "moving_average": 5,
}  # fmt: skip

EMBEDDINGS, IMAGE, SOUND, STEPS = (TOKENS, WIDTH), (3, 32, 32), (1600,), (20, 4)

#: Standard deviation of the weights, about 1 / sqrt(WIDTH): with the default, 0.02, networks of
#: this width are nearly linear.
SPREAD = 0.2

#: (class, configuration, keyword the input goes by, its shape)
MODELS: list[tuple[str, dict[str, Any], str, tuple[int, ...]]] = [
    ("BertModel", SMALL, "inputs_embeds", EMBEDDINGS),
    ("RobertaModel", SMALL, "inputs_embeds", EMBEDDINGS),
    ("DistilBertModel", {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INNER,
                         "vocab_size": VOCABULARY}, "inputs_embeds", EMBEDDINGS),
    ("AlbertModel", {**SMALL, "embedding_size": WIDTH}, "inputs_embeds", EMBEDDINGS),
    ("ElectraModel", {**SMALL, "embedding_size": WIDTH}, "inputs_embeds", EMBEDDINGS),
    ("DebertaModel", SMALL, "inputs_embeds", EMBEDDINGS),
    ("DebertaV2Model", {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
     "inputs_embeds", EMBEDDINGS),
    ("MPNetModel", SMALL, "inputs_embeds", EMBEDDINGS),
    ("XLNetModel", {"d_model": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "d_inner": INNER,
                    "vocab_size": VOCABULARY}, "inputs_embeds", EMBEDDINGS),
    ("GPT2Model", {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 32,
                   "vocab_size": VOCABULARY, "use_cache": False}, "inputs_embeds", EMBEDDINGS),
    ("GPTNeoXModel", {**SMALL, "use_cache": False}, "inputs_embeds", EMBEDDINGS),
    ("OPTModel", {**SMALL, "ffn_dim": INNER, "word_embed_proj_dim": WIDTH, "use_cache": False},
     "inputs_embeds", EMBEDDINGS),
    ("LlamaModel", KEY_VALUE, "inputs_embeds", EMBEDDINGS),
    ("MistralModel", KEY_VALUE, "inputs_embeds", EMBEDDINGS),
    ("GemmaModel", KEY_VALUE, "inputs_embeds", EMBEDDINGS),
    ("Qwen3Model", KEY_VALUE, "inputs_embeds", EMBEDDINGS),
    ("T5EncoderModel", {"d_model": WIDTH, "d_kv": 8, "d_ff": INNER, "num_layers": LAYERS,
                        "num_heads": HEADS, "vocab_size": VOCABULARY}, "inputs_embeds", EMBEDDINGS),
    ("BartModel.encoder", {"d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": 1,
                           "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS,
                           "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER,
                           "vocab_size": VOCABULARY}, "inputs_embeds", EMBEDDINGS),
    ("ViTModel", SMALL_IMAGE, "pixel_values", IMAGE),
    ("DeiTModel", SMALL_IMAGE, "pixel_values", IMAGE),
    ("BeitModel", SMALL_IMAGE, "pixel_values", IMAGE),
    ("SwinModel", {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1],
                   "num_heads": [2, 2], "window_size": 4}, "pixel_values", IMAGE),
    ("ConvNextModel", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
     "pixel_values", IMAGE),
    ("SegformerModel", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2,
                        "num_attention_heads": [1, 2], "sr_ratios": [2, 1], "patch_sizes": [3, 3],
                        "strides": [2, 2], "mlp_ratios": [2, 2]}, "pixel_values", IMAGE),
    ("CLIPVisionModel", SMALL_IMAGE, "pixel_values", IMAGE),
    ("Wav2Vec2Model", {**SMALL, "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2],
                       "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
                       "num_conv_pos_embedding_groups": 2}, "input_values", SOUND),
    ("HubertModel", {**SMALL, "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2],
                     "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
                     "num_conv_pos_embedding_groups": 2}, "input_values", SOUND),
    ("WhisperModel.encoder", {"d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": 1,
                              "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS,
                              "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER,
                              "num_mel_bins": 8, "max_source_positions": 20,
                              "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1,
                              "eos_token_id": 2, "decoder_start_token_id": 1},
     "input_features", (8, 40)),
    ("PatchTSTModel", {"num_input_channels": 2, "context_length": 32, "patch_length": 8,
                       "patch_stride": 8, "d_model": 16, "num_hidden_layers": LAYERS,
                       "num_attention_heads": 2, "ffn_dim": 32}, "past_values", (32, 2)),
    ("PatchTSMixerModel", {"num_input_channels": 2, "context_length": 32, "patch_length": 8,
                           "patch_stride": 8, "d_model": 16, "num_layers": LAYERS},
     "past_values", (32, 2)),
    ("TimeSeriesTransformerModel.encoder", SERIES, "inputs_embeds", STEPS),
    ("InformerModel.encoder", {**SERIES, "distil": False}, "inputs_embeds", STEPS),
    ("AutoformerModel.encoder", SERIES, "inputs_embeds", STEPS),
    ("MambaModel", {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 4,
                    "vocab_size": VOCABULARY, "use_cache": False}, "inputs_embeds", EMBEDDINGS),
    ("Ernie4_5_MoeModel", {**KEY_VALUE, **EXPERTS}, "inputs_embeds", EMBEDDINGS),
    ("MixtralModel", {**KEY_VALUE, **EXPERTS}, "inputs_embeds", EMBEDDINGS),
    ("MiniMaxModel", {**KEY_VALUE, **EXPERTS, "block_size": 4}, "inputs_embeds", EMBEDDINGS),
    ("MiniMaxM2Model", {**KEY_VALUE, **EXPERTS}, "inputs_embeds", EMBEDDINGS),
    ("Qwen3MoeModel", {**KEY_VALUE, **EXPERTS}, "inputs_embeds", EMBEDDINGS),
    # Kimi-K2 has this architecture too.
    ("DeepseekV3Model", {**SMALL, **EXPERTS, **LATENT_ATTENTION, "n_group": 2, "topk_group": 1},
     "inputs_embeds", EMBEDDINGS),
    ("MiniCPM3Model", {**SMALL, **LATENT_ATTENTION}, "inputs_embeds", EMBEDDINGS),
    ("SiglipVisionModel", SMALL_IMAGE, "pixel_values", IMAGE),
    ("GotOcr2Model.vision_tower", {
        "vision_config": {"hidden_size": WIDTH, "output_channels": 16, "num_hidden_layers": LAYERS,
                          "num_attention_heads": HEADS, "image_size": 32, "patch_size": 8,
                          "window_size": 2, "global_attn_indexes": [1], "mlp_dim": INNER},
        "text_config": {"model_type": "qwen2", **KEY_VALUE}}, "pixel_values", IMAGE),
]  # fmt: skip


class ByKeyword(nn.Module):
    """A network that takes its one input by keyword."""

    def __init__(self, network: nn.Module, keyword: str) -> None:
        super().__init__()
        self.network = network
        self.keyword = keyword

    def forward(self, x: Tensor) -> Any:
        """Call the network."""
        return self.network(**{self.keyword: x})


class ByDefault(ByKeyword):
    """A network with experts as transformers computes them by default.

    PyTorch multiplies groups of rows, the default, only in float32 and less precise types. In
    float64 the network cannot run so, and multiplies row by row.
    """

    def __init__(self, network: nn.Module, keyword: str) -> None:
        super().__init__(network, keyword)
        self.default: str = network.config._experts_implementation

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        result = super()._apply(fn, recurse)
        is_double = next(self.parameters()).dtype is torch.float64
        self.network.set_experts_implementation("batched_mm" if is_double else self.default)
        return result


def build(name: str, configuration: dict[str, Any], keyword: str) -> nn.Module:
    """Build a network, or the part of it that a dotted name asks for."""
    import transformers

    kind, _, part = name.partition(".")
    model_class = getattr(transformers, kind)
    spread = {"initializer_range": SPREAD, "init_std": SPREAD}  # some have one name, some the other
    network = model_class(model_class.config_class(**spread, **configuration))
    wrapper = ByDefault if EXPERTS.keys() <= configuration.keys() else ByKeyword
    return wrapper(network.get_submodule(part) if part else network, keyword)


def read_out(result: Any) -> Tensor:
    """Weigh the last hidden state by two waves, whose sums no normalisation makes constant."""
    hidden: Tensor = result[0].flatten(1)
    angle = torch.arange(hidden.shape[1], dtype=hidden.dtype)
    return hidden @ torch.stack([angle.cos(), angle.sin()], 1) / hidden.shape[1] ** 0.5


def transformers_entries() -> Iterator[Entry]:
    """Yield the networks of transformers."""
    for name, configuration, keyword, shape in MODELS:
        make: Callable[[], nn.Module] = partial(build, name, configuration, keyword)
        family = name.partition(".")[0].removesuffix("Model")
        yield Entry("transformers", family, name, make, (shape,), read_out, "transformers")
