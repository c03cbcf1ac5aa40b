"""Heads: identity at initialisation, exact on disk, rejected for the wrong model."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import WIDTH, tiny

from lspade_train import LSpadeHeads, ModelAdapter
from lspade_train.errors import ArtifactError
from lspade_train.probes.heads import check_same_model

FORMS = ["full", "low_rank", "bias"]


def trained(form="full", layers=(1, 2, 3)):
    """Heads with every parameter moved away from its initial value."""
    heads = LSpadeHeads(layers, WIDTH, form=form, rank=4)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return heads


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_heads_equal_the_logit_lens_bit_for_bit(form, dtype):
    adapter = ModelAdapter(tiny("llama").to(dtype))
    heads = LSpadeHeads([1, 3], WIDTH, form=form, rank=4).bind(adapter)
    hidden = torch.randn(5, WIDTH).to(dtype)
    with torch.no_grad():
        for layer in (1, 3):
            assert torch.equal(heads.logits(hidden, layer), adapter.unembed(hidden))


@pytest.mark.parametrize("form", FORMS)
def test_all_layers_at_once_equal_one_layer_at_a_time(form):
    heads = trained(form)
    hidden = torch.randn(6, 3, WIDTH)
    together = heads(hidden)
    for place, layer in enumerate(heads.layers):
        torch.testing.assert_close(together[:, place], heads.translate(hidden[:, place], layer))


def test_a_full_map_follows_the_documented_formula():
    heads = trained()
    hidden = torch.randn(WIDTH)
    expected = hidden + hidden @ heads.weight[1] + heads.bias[1]
    torch.testing.assert_close(heads.translate(hidden, 2), expected)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gets_a_gradient_at_initialisation(form):
    heads = LSpadeHeads([1, 2], WIDTH, form=form, rank=4)
    heads(torch.randn(7, 2, WIDTH)).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in heads.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_saved_heads_give_the_same_logits_when_loaded(tmp_path, form):
    adapter, hidden, heads = ModelAdapter(tiny("llama")), torch.randn(4, WIDTH), trained(form)
    heads.save_pretrained(tmp_path)
    loaded = LSpadeHeads.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = heads.bind(adapter).logits(hidden, 2)
        assert torch.equal(loaded.bind(adapter).logits(hidden, 2), expected)


@pytest.mark.slow  # test_cli checks with `info` that heads are read without Lightning
def test_saved_heads_give_the_same_logits_in_a_new_process_without_lightning(tmp_path):
    adapter = ModelAdapter(tiny("llama"))
    adapter.model.save_pretrained(tmp_path / "model")
    hidden = torch.randn(4, WIDTH)
    expected = {}
    for form in FORMS:
        heads = trained(form)
        heads.save_pretrained(tmp_path / form)
        with torch.no_grad():
            expected[form] = heads.bind(adapter).logits(hidden, 2)
    save_file({"hidden": hidden, **expected}, tmp_path / "io.safetensors")
    code = """
import sys, torch
from safetensors.torch import load_file
from lspade_train import LSpadeHeads, ModelAdapter
torch.set_num_threads(1)
adapter = ModelAdapter.from_pretrained("model")
io = load_file("io.safetensors")
for form in ("full", "low_rank", "bias"):
    heads = LSpadeHeads.from_pretrained(form).bind(adapter)
    with torch.no_grad():
        assert torch.equal(heads.logits(io["hidden"], 2), io[form]), form
assert not {"lightning", "datasets", "wandb", "matplotlib"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr


def test_heads_used_with_another_model_are_rejected():
    heads = trained()
    adapter = ModelAdapter(tiny("llama"))
    heads.metadata = {"base_model": {"model_id": "org/base", "revision": "abc", **adapter.identity}}
    heads.bind(adapter)
    other = tiny("llama")
    with torch.no_grad():
        other.lm_head.weight[3, 3] += 1
    with pytest.raises(
        ArtifactError, match=r"org/base.*another unembedding(.|\n)*lspade-train fit"
    ):
        heads.bind(other)
    with pytest.raises(ArtifactError, match="another configuration"):
        heads.bind(tiny("llama", rms_norm_eps=1e-3))


def fitted_for(model):
    """Heads whose record names `model`."""
    heads = trained()
    base = {"model_id": "org/base", "revision": "abc"}
    heads.metadata = {"base_model": base | ModelAdapter(model).identity}
    return heads


def merge(model, block, size=1e-2):
    """Add a rank-2 LoRA product to one matrix of one block; norm and head stay unchanged."""
    weight = model.model.layers[block].self_attn.q_proj.weight
    with torch.no_grad():
        low_rank = torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1])
        weight.add_((size * low_rank * weight.abs().mean()).to(weight.dtype))
    return model


@pytest.mark.parametrize("block", range(4))
def test_heads_are_rejected_for_a_model_with_a_lora_merged_into_one_block(block):
    heads = fitted_for(tiny("llama"))
    with pytest.raises(
        ArtifactError, match=r"org/base(.|\n)*other weights in its blocks(.|\n)*fit"
    ):
        heads.bind(merge(tiny("llama"), block))


def test_a_merge_mostly_rounded_away_by_bfloat16_is_detected():
    large = {"intermediate_size": 8192, "dtype": torch.bfloat16}
    heads, model = fitted_for(tiny("llama", **large)), tiny("llama", **large)
    weight = model.model.layers[1].mlp.down_proj.weight
    before = weight.clone()
    with torch.no_grad():
        weight.add_(1e-5 * before.abs().mean() * torch.randn_like(weight))
    changed = (weight != before).float().mean()
    assert 1e-4 < changed < 1e-2
    with pytest.raises(ArtifactError, match="other weights"):
        heads.bind(model)


BOUND = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("fitted", BOUND)
def test_the_same_model_in_another_dtype_is_accepted(fitted, dtype):
    model = tiny("llama").to(BOUND[dtype])
    heads = fitted_for(tiny("llama").to(BOUND[fitted])).bind(model)
    assert heads.logits(torch.randn(WIDTH, dtype=BOUND[dtype]), 2).dtype == BOUND[dtype]


@pytest.mark.parametrize(("fitted", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_merge_is_detected_between_float32_and_bfloat16(fitted, dtype):
    heads = fitted_for(tiny("llama").to(BOUND[fitted]))
    with pytest.raises(ArtifactError, match="other weights"):
        heads.bind(merge(tiny("llama"), 2, size=0.1).to(BOUND[dtype]))


def test_different_weights_with_the_same_quantisation_give_a_warning(caplog):
    identity = ModelAdapter(tiny("llama")).identity | {"quantization": "bitsandbytes int8"}
    check_same_model(identity | {"model_weights": "those of another device"}, identity)
    assert "other weights in its blocks" in caplog.text


def test_weights_are_not_compared_across_quantisations(caplog):
    identity = ModelAdapter(tiny("llama")).identity
    check_same_model(identity | {"quantization": "awq", "model_weights": "packed"}, identity)
    assert not caplog.text


def test_a_state_on_another_device_is_moved_to_the_heads():
    heads = LSpadeHeads([1, 3], WIDTH).to("meta")  # a second device available on every machine
    assert heads.translate(torch.randn(5, WIDTH), 3).device.type == "meta"


def test_heads_of_another_width_are_rejected():
    with pytest.raises(ArtifactError, match="d=16"):
        LSpadeHeads([1], 16).bind(tiny("llama"))


def test_logits_require_a_bound_model():
    with pytest.raises(ArtifactError, match=r"heads\.bind"):
        trained().logits(torch.randn(WIDTH), 1)


def test_a_layer_without_a_head_raises_a_clear_error():
    with pytest.raises(ArtifactError, match=r"No head for layer 7; these heads have \[1, 2, 3\]"):
        trained().translate(torch.randn(WIDTH), 7)


def damage_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "does not exist"),
        (lambda f: (f / "heads.safetensors").unlink(), "does not exist"),
        (lambda f: (f / "config.json").write_text("[1"), "not valid JSON"),
        (lambda f: damage_config(f, format_version=99), "format_version 99"),
        (lambda f: damage_config(f, layers=[1]), "does not describe"),
        (lambda f: damage_config(f, form="cubic"), "does not describe"),
        (
            lambda f: (f / "heads.safetensors").write_bytes(
                (f / "heads.safetensors").read_bytes()[:-4]
            ),
            "not a complete safetensors",
        ),
    ],
)
def test_a_damaged_folder_raises_a_clear_error(break_it, message, tmp_path):
    trained().save_pretrained(tmp_path)
    break_it(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        LSpadeHeads.from_pretrained(tmp_path)


def test_a_flipped_bit_is_detected(tmp_path):
    trained().save_pretrained(tmp_path)
    path = tmp_path / "heads.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="checksum"):
        LSpadeHeads.from_pretrained(tmp_path)


def test_a_path_that_is_neither_folder_nor_repository_raises_a_clear_error():
    with pytest.raises(ArtifactError, match="lspade-train fit"):
        LSpadeHeads.from_pretrained("no/such/folder/at/all")
