"""Tiny random models of every supported family. An ignored config would give a large model."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama4 import Llama4ForConditionalGeneration

VOCAB, WIDTH, LAYERS = 64, 32, 4
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
_MOE = {"moe_intermediate_size": 24, "num_local_experts": 4, "num_experts": 4}
_EXPERTS = _MOE | {"num_experts_per_tok": 2}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "hidden_dropout": 0.0}
_GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "n_inner": 48}
# One dense block first, as in the released models; latent attention with its own head sizes.
_DEEPSEEK = _MOE | {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    "head_dim": None,
}  # fmt: skip
_SLIDING = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
}
_FALCON = _NO_DROPOUT | {"model_type": "falcon", "bias": True, "head_dim": None}
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32,
}  # fmt: skip
_GEMMA3 = {"sliding_window": 4, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2}
_LLAMA4 = _EXPERTS | {
    "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "attention_chunk_size": 4,
    "no_rope_layers": [1, 1, 1, 0],
    "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
}  # fmt: skip
_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4, "vision_output_dim": 16, "projector_input_dim": 16,
    "projector_output_dim": 16,
}  # fmt: skip

_OURS = {"model_type", "dtype"}

# Name -> settings; `model_type` if the name is not one, `text_config` if the decoder is the text
# tower of a multimodal model, None for settings the family derives itself.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {},
    "phi": {},
    "phi3": {},
    "gpt2": _GPT2 | _NO_DROPOUT,
    "gpt_neox": {},
    "gptj": _GPT2 | _NO_DROPOUT | {"rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 24, "dropout": 0.0},
    "bloom": _NO_DROPOUT,
    "mpt": {"d_model": WIDTH, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64},
    "falcon": _FALCON,
    "falcon_new": _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_alibi": _FALCON | {"alibi": True, "parallel_attn": False, "multi_query": False},
    "gemma": {},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": _GEMMA3,
    "gemma3": {"text_config": _GEMMA3, "vision_config": _VISION},
    "cohere": {"logit_scale": 0.25},
    "cohere2": _SLIDING | {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "starcoder2": {"sliding_window": 4, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "glm": {},
    "glm4": {},
    "olmo2": {},
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "deepseek_v2": _DEEPSEEK | {"topk_method": "greedy"},
    "deepseek_v3": _DEEPSEEK,
    "gpt_oss": _EXPERTS | _SLIDING | {"rope_parameters": _YARN},
    "llama4_text": _LLAMA4,
    "llama4": {"text_config": _LLAMA4, "vision_config": _VISION},
}  # fmt: skip
FAMILIES = tuple(CONFIGS)
# One of each kind, for tests over many settings: the table of families covers them all.
KINDS = ("llama", "gpt2", "bloom", "gemma2", "deepseek_v3")


def crossed(values: Sequence[Any]) -> list[Any]:
    """Parameters (family of `KINDS`, value): each family and value once, other pairs slow."""
    return [
        pytest.param(family, value, marks=[pytest.mark.slow] if place and later else [])
        for place, value in enumerate(values)
        for later, family in enumerate(KINDS)
    ]


def tiny(family: str, **overrides: Any) -> PreTrainedModel:
    """A random model of `family`: 4 blocks, d=32, V=64."""
    torch.manual_seed(0)
    settings = CONFIGS[family] | overrides
    config = _config(settings.get("model_type", family), settings)
    if "attn_implementation" in overrides:
        config._attn_implementation = overrides["attn_implementation"]
    # For a multimodal Llama-4 the automatic class builds the text tower alone.
    whole = family == "llama4"
    build = Llama4ForConditionalGeneration if whole else AutoModelForCausalLM.from_config
    model = build(config).eval()
    # Not the rotary buffers, which loading keeps in full precision.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(overrides.get("dtype", torch.float32))
    # Spread the logits: with the default initialisation they are nearly uniform.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    assert len(blocks_of(model)) == LAYERS
    vocabulary = settings.get("vocab_size", VOCAB)
    assert model.get_output_embeddings().weight.shape[0] == vocabulary
    return model


def blocks_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The decoder's blocks, found under each family's name for them."""
    lists = (m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList))
    return next(blocks for blocks in lists if len(blocks) == LAYERS)


def _config(kind: str, settings: dict[str, Any]) -> Any:
    """Pass only keys the family knows: a strict configuration rejects the rest."""
    default = AutoConfig.for_model(kind)
    if "text_config" in settings:
        text = _config(default.text_config.model_type, settings["text_config"])
        vision = _config(default.vision_config.model_type, {**settings["vision_config"]})
        return AutoConfig.for_model(kind, text_config=text, vision_config=vision)
    common = _COMMON if hasattr(default, "vocab_size") else {}
    asked = {k: v for k, v in (common | settings).items() if v is not None and k not in _OURS}
    return AutoConfig.for_model(kind, **{k: v for k, v in asked.items() if hasattr(default, k)})
