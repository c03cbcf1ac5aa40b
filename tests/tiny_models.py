"""Tiny random models of every supported family. A config that is ignored would be a large model."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

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
_GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "n_inner": 48}

CONFIGS: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "gpt2": _GPT2 | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 24, "dropout": 0.0},
    "gemma": {},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
    "olmo2": {},
    "mixtral": _MOE | {"num_experts_per_tok": 2},
    "qwen3_moe": _MOE | {"num_experts_per_tok": 2},
}
FAMILIES = tuple(CONFIGS)


def tiny(family: str, **overrides) -> PreTrainedModel:
    """A random model of `family`: 4 blocks, d=32, V=64."""
    torch.manual_seed(0)
    allowed = AutoConfig.for_model(family)
    wanted = _COMMON | CONFIGS[family] | overrides
    known = {k: v for k, v in wanted.items() if hasattr(allowed, k)}
    config = AutoConfig.for_model(family, **known)
    if "attn_implementation" in overrides:
        config._attn_implementation = overrides["attn_implementation"]
    model = AutoModelForCausalLM.from_config(config).eval()
    # Spread the logits: with the default initialisation they are nearly equal everywhere.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    assert len(model.get_decoder().get_submodule("h" if family == "gpt2" else "layers")) == LAYERS
    assert model.get_output_embeddings().weight.shape[0] == wanted["vocab_size"]
    return model
