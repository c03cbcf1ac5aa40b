"""Quantised base models on the CPU: the setting, the identity, and the commands."""

import importlib.util

import pytest
import torch
from test_runtime import prompts_of
from tiny_models import VOCAB, tiny
from toy import tokenizer

from lspade_train import ExitPolicy, ExitRuntime, LSpadeHeads, ModelAdapter
from lspade_train.cli import main
from lspade_train.errors import CacheError, RecipeError

PRESENT = all(importlib.util.find_spec(name) for name in ("bitsandbytes", "accelerate"))
needs_bitsandbytes = pytest.mark.skipif(
    not PRESENT, reason="needs lspade-train[quantization], which is not installed"
)


SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # int4 requires 64 columns


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A tiny Llama of d=64 with its tokenizer; read-only."""
    folder = tmp_path_factory.mktemp("wide")
    tiny("llama", **SIZES).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def load(folder, quantization, **settings):
    return ModelAdapter.from_pretrained(
        str(folder), quantization=quantization, dtype="float32", device="cpu", **settings
    )


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("quantization", "name"), [("int8", "Linear8bitLt"), ("int4", "Linear4bit")]
)
def test_the_blocks_are_quantised_and_the_head_is_not(wide, quantization, name):
    adapter = load(wide, quantization)
    kinds = {type(m).__name__ for m in adapter.blocks.modules()}
    assert name in kinds
    assert type(adapter.unembed.head) is torch.nn.Linear
    assert adapter.identity["quantization"] == f"bitsandbytes {quantization}"
    assert load(wide, quantization).identity == adapter.identity
    plain = load(wide, None).identity
    assert plain["quantization"] == "none"
    assert plain["unembedding"] == adapter.identity["unembedding"]
    assert plain["model_weights"] != adapter.identity["model_weights"]


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_rescaling_one_weight_changes_a_quantised_identity(tmp_path, quantization):
    found = []
    for factor in (1.0, 1.01):
        model, folder = tiny("llama", **SIZES), tmp_path / str(factor)
        with torch.no_grad():
            # The quantised codes stay the same: only the scales differ.
            model.model.layers[2].self_attn.q_proj.weight.mul_(factor)
        model.save_pretrained(folder)
        found.append(load(folder, quantization).identity["model_weights"])
    assert found[0] != found[1]


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_cache_fit_and_predict_run_on_a_quantised_model(project, wide, monkeypatch, quantization):
    monkeypatch.chdir(project.home)
    recipe = project.recipe(
        data__model_id=wide,
        data__quantization=quantization,
        data__dtype="float32",
        trainer__logger=False,
    )
    assert main(["fit", "--config", str(recipe)]) == 0
    adapter = load(wide, quantization)
    heads = LSpadeHeads.from_pretrained("checkpoints/toy")
    runtime = ExitRuntime(adapter, heads, policy=ExitPolicy.always(2))
    decisions = runtime.decide(prompts_of())
    assert {d.layer for d in decisions} == {2}
    assert all(0 <= d.token_id < VOCAB for d in decisions)
    stays = ExitRuntime(adapter, heads, policy=ExitPolicy.never()).decide([prompts_of()[0]])[0]
    logits = adapter.model(torch.tensor([prompts_of()[0]])).logits[0, -1]
    assert stays.token_id == int(logits.argmax())


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_identity_is_the_same_before_and_after_the_first_forward(wide, quantization):
    # On the CPU the first product repacks the weights.
    fresh = load(wide, quantization, check=False)
    run = load(wide, quantization, check=False)
    run.check()
    assert fresh.identity == run.identity


@needs_bitsandbytes
def test_a_cache_of_another_quantisation_is_rejected_naming_the_field(project):
    project.module(quantization="int8", dtype="float32").states("train")
    with pytest.raises(CacheError, match="another quantization: it has 'bitsandbytes int8'"):
        project.module(dtype="float32").states("train")


@pytest.mark.skipif(PRESENT, reason="bitsandbytes is installed here")
def test_without_bitsandbytes_the_error_says_what_to_install(wide):
    with pytest.raises(RecipeError, match=r"lspade-train\[quantization\]"):
        load(wide, "int8")


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_a_model_quantised_by_torchao_is_supported_and_identified(wide):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    model = AutoModelForCausalLM.from_pretrained(
        wide, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    adapter = ModelAdapter(model)
    assert adapter.identity["quantization"] == "torchao"
    assert adapter.identity["model_weights"] != load(wide, None).identity["model_weights"]
    never = ExitRuntime(adapter, None, policy=ExitPolicy.never()).decide([prompts_of()[0]])[0]
    assert never.token_id == int(model(torch.tensor([prompts_of()[0]])).logits[0, -1].argmax())
