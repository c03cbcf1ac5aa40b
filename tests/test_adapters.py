"""The adapter against the models' own forward, for every family."""

import pytest
import torch
from tiny_models import FAMILIES, LAYERS, VOCAB, WIDTH, tiny
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from lspade_train.errors import UnsupportedModelError
from lspade_train.models import ModelAdapter, Plan, load_check


def padded_batch(side: str, lengths=(7, 3, 5)):
    """Mixed prompt lengths with BOS, padded on `side`."""
    generator = torch.Generator().manual_seed(1)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        tokens = torch.randint(3, VOCAB, (length,), generator=generator)
        tokens[0] = 1
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place], mask[row, place] = tokens, 1
    return ids, mask


def positions_of(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def run_all(adapter, plan):
    hidden = plan.hidden
    for block in range(adapter.num_layers):
        hidden = adapter.run_block(plan, block, hidden)
    return hidden


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_the_plan_gives_the_models_logits_bit_for_bit(family, side):
    model = tiny(family)
    ids, mask = padded_batch(side)
    with torch.no_grad():
        expected = model(
            input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False
        ).logits
        adapter = ModelAdapter(model)
        logits = adapter.model_unembed(run_all(adapter, adapter.plan(ids, mask)))
    assert torch.equal(logits[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_unembedding_gives_the_models_logits(family):
    adapter = ModelAdapter(tiny(family))
    hidden = torch.randn(2, 3, adapter.hidden_size)
    with torch.no_grad():
        torch.testing.assert_close(adapter.unembed(hidden), adapter.model_unembed(hidden))


# As many rows as tokens, as many as heads.
@pytest.mark.parametrize("lengths", [(5, 5, 3, 4, 2), (5, 5, 3, 4)], ids=["tokens", "heads"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_rows_halfway_leaves_the_other_rows_unchanged(family, lengths):
    adapter = ModelAdapter(tiny(family))
    ids, mask = padded_batch("left", lengths=lengths)
    with torch.no_grad():
        plan = adapter.plan(ids, mask)
        everything = run_all(adapter, plan)
        keep = torch.tensor([0, 3])
        hidden = adapter.run_block(plan, 0, plan.hidden)[keep]
        fewer = plan.select(keep)
        for block in range(1, LAYERS):
            hidden = adapter.run_block(fewer, block, hidden)
    # Matrix products with other row counts round differently in the last bit.
    real = mask[keep].bool()
    torch.testing.assert_close(hidden[real], everything[keep][real], rtol=1e-5, atol=1e-5)


def test_the_blocks_are_restored_after_recording():
    model = tiny("llama")
    before = [dict(block.__dict__) for block in model.model.layers]
    adapter = ModelAdapter(model)
    adapter.plan(*padded_batch("right"))
    assert [dict(block.__dict__) for block in model.model.layers] == before


def test_a_forward_hook_of_accelerate_survives_recording():
    accelerate = pytest.importorskip("accelerate")
    model = tiny("llama")
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    hooked = [block.__dict__.get("forward") for block in model.model.layers]
    ids, mask = padded_batch("right")
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        adapter = ModelAdapter(model)
        got = adapter.unembed(run_all(adapter, adapter.plan(ids, mask)))
    assert [block.__dict__.get("forward") for block in model.model.layers] == hooked
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_half_precision_models_pass_the_check(family, dtype):
    assert ModelAdapter(tiny(family).to(dtype)).dtype == dtype


def test_a_bidirectional_model_is_rejected():
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match="decoder-only"):
        ModelAdapter(model)


def test_a_bias_with_one_entry_per_head_is_not_indexed_as_a_batch():
    plans = {
        name: ModelAdapter(tiny(name)).plan(*padded_batch("left")) for name in ("bloom", "mpt")
    }
    assert plans["bloom"].per_row["alibi"] == 4  # heads
    assert plans["mpt"].per_row["position_bias"] == 0  # shared by all rows


def test_an_encoder_decoder_is_rejected():
    from transformers import AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(
        "t5", vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    )
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        ModelAdapter(AutoModelForSeq2SeqLM.from_config(config))


def test_a_model_with_nan_weights_is_rejected():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(UnsupportedModelError, match="NaN"):
        ModelAdapter(model)


def test_a_model_whose_head_does_not_reproduce_its_logits_is_rejected():
    model = tiny("llama")

    def double(_, __, output):
        output.logits = output.logits * 2

    model.register_forward_hook(double)
    with pytest.raises(UnsupportedModelError, match="norm and head do not give its logits"):
        ModelAdapter(model)


class Box:
    """A container that `Plan.select` cannot look into."""

    def __init__(self, rows):
        self.rows = rows


class BoxedBlock(LlamaDecoderLayer):
    def forward(self, hidden_states, *args, box, **kwargs):
        scale = box.rows[: len(hidden_states)]
        return super().forward(hidden_states, *args, **kwargs) * scale


class BoxedDecoder(LlamaModel):
    def forward(self, input_ids=None, position_ids=None, **kwargs):
        rows = self.embed_tokens(input_ids[:, :1]).mean(-1, keepdim=True).sigmoid()
        return super().forward(input_ids, position_ids=position_ids, box=Box(rows), **kwargs)


def test_a_family_whose_rows_cannot_be_dropped_is_rejected(monkeypatch):
    model = tiny("llama")
    model.model.__class__ = BoxedDecoder
    for block in model.model.layers:
        block.__class__ = BoxedBlock
    with pytest.raises(UnsupportedModelError, match="change when others are dropped halfway"):
        ModelAdapter(model)
    # Only dropping rows reveals it: with every row kept it runs like any other.
    monkeypatch.setattr(load_check, "KEPT", (0, 1, 2, 3))
    assert ModelAdapter(model).num_layers == LAYERS


def test_a_flex_attention_mask_is_never_applied_to_the_wrong_rows():
    blocks = create_block_mask(lambda row, _, query, key: query >= key, 3, None, 7, 7, "cpu")
    plan = Plan(torch.zeros(3, 7, WIDTH), (((), {"attention_mask": blocks}),))
    with pytest.raises(UnsupportedModelError, match=r"set_attn_implementation\('sdpa'\)"):
        plan.select(torch.tensor([0, 2]))


def test_a_missing_folder_raises_a_clear_error(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"check data\.model_id"):
        ModelAdapter.from_pretrained(str(tmp_path / "nothing"))


def test_changing_one_weight_changes_the_identity():
    model = tiny("llama")
    before = ModelAdapter(model).identity
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight.mul_(1.01)
    after = ModelAdapter(model).identity
    assert before["model_weights"] != after["model_weights"]
    assert before["unembedding"] == after["unembedding"]


@pytest.mark.parametrize(("noise", "accepted"), [(3e-5, True), (1e-4, True), (1e-2, False)])
def test_the_load_time_check_accepts_rounding_of_real_models_and_nothing_larger(
    noise, accepted, monkeypatch
):
    """A 28-block model differed by 3.3e-5 of its fp32 logits between two products' shapes."""
    plain = ModelAdapter.run_block

    def noisy(self, plan, block, hidden):
        out = plain(self, plan, block, hidden)
        scale = noise / LAYERS**0.5
        return out + scale * out.square().mean(-1, keepdim=True).sqrt() * torch.randn_like(out)

    model = tiny("llama")
    monkeypatch.setattr(ModelAdapter, "run_block", noisy)
    if accepted:
        assert ModelAdapter(model).num_layers == LAYERS
    else:
        with pytest.raises(UnsupportedModelError, match="cannot be run block by block"):
            ModelAdapter(model)
