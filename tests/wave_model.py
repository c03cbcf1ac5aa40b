"""A model family unknown to transformers and this package, as third-party code would add it.

Parallel blocks unlike any in transformers: fused projections, learned positions, an oscillating
gate, and residuals that shrink with depth.
"""

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class WaveConfig(PretrainedConfig):
    """Its sizes, and the attribute name of the norm after the last block."""

    model_type = "wave"

    def __init__(self, vocab_size=64, hidden_size=32, num_hidden_layers=4, norm="norm", **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, 4
        self.max_position_embeddings, self.norm = 64, norm
        super().__init__(**kwargs)


class WaveBlock(nn.Module):
    """Attention and a gated sine in parallel, on the same normed states."""

    def __init__(self, config, layer):
        super().__init__()
        width = config.hidden_size
        self.heads, self.layer = config.num_attention_heads, layer
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 5 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, states, past=None, *, mask):
        *attended, wave, gate = self.inner(self.norm(states)).chunk(5, dim=-1)
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in attended)
        if past is not None:
            key, value = past.update(key, value, self.layer)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        both = torch.cat([seen.transpose(1, 2).flatten(-2), wave.sin() * gate], dim=-1)
        return states * 0.9 + self.outer(both)


class WavePreTrainedModel(PreTrainedModel):
    """What the decoder and the full model share."""

    config_class = WaveConfig
    base_model_prefix = "model"
    _supports_sdpa = True


class WaveModel(WavePreTrainedModel):
    """The decoder."""

    def __init__(self, config):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(
            WaveBlock(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.add_module(config.norm, nn.LayerNorm(config.hidden_size))
        self.post_init()

    def get_input_embeddings(self):
        return self.tokens

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None,
        use_cache=False, **kwargs,
    ):  # fmt: skip
        states = self.tokens(input_ids)
        past = past_key_values
        if use_cache and past is None:
            past = DynamicCache()
        if position_ids is None:
            seen = past.get_seq_length() if past is not None else 0
            position_ids = torch.arange(seen, seen + input_ids.shape[1])[None]
        mask = create_causal_mask(
            config=self.config, inputs_embeds=states, attention_mask=attention_mask,
            past_key_values=past, position_ids=position_ids,
        )  # fmt: skip
        if mask is None:
            mask = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()
        states = states + self.places(position_ids)
        for block in self.layers:
            states = block(states, past, mask=mask)
        norm = getattr(self, self.config.norm)
        return BaseModelOutputWithPast(last_hidden_state=norm(states), past_key_values=past)


class WaveForCausalLM(WavePreTrainedModel):
    """The decoder with its head."""

    def __init__(self, config):
        super().__init__(config)
        self.model = WaveModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, logits_to_keep=0, return_dict=True, **kwargs):
        outputs = self.model(input_ids, **kwargs)
        kept = outputs.last_hidden_state[:, -logits_to_keep:]
        return CausalLMOutputWithPast(
            logits=self.lm_head(kept), past_key_values=outputs.past_key_values
        )


def register() -> None:
    """Register the family, as a user's own code does before a command opens the model."""
    AutoConfig.register(WaveConfig.model_type, WaveConfig, exist_ok=True)
    AutoModelForCausalLM.register(WaveConfig, WaveForCausalLM, exist_ok=True)


def wave(**settings) -> WaveForCausalLM:
    """A random model: 4 blocks, d=32, V=64."""
    torch.manual_seed(0)
    model = WaveForCausalLM(WaveConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # spread the logits
    return model
