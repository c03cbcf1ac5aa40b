"""A checkpoint that is damaged or does not match its configuration raises an error naming it."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, tiny
from toy import tokenizer

from lspade_train import ModelAdapter
from lspade_train.cli import main
from lspade_train.errors import UnsupportedModelError
from lspade_train.models import load_unembedding
from lspade_train.models.tokenizer import load_tokenizer


@pytest.fixture
def checkpoint(tmp_path):
    """Saves a tiny model whose tensors and configuration can then be changed."""

    def save(family="llama", *, drop=(), add=None, **config):
        folder = tmp_path / "model"
        tiny(family).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        assert set(drop) <= set(tensors)
        kept = {name: value for name, value in tensors.items() if name not in drop}
        save_file(kept | (add or {}), folder / "model.safetensors", {"format": "pt"})
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return folder

    return save


def load(folder):
    return ModelAdapter.from_pretrained(str(folder), device="cpu", check=False)


def load_alone(folder):
    return load_unembedding(str(folder), dtype="float32", device="cpu")


def load_in_harness(folder):
    pytest.importorskip("lm_eval")
    from lspade_train.integrations.lm_eval import LSpadeLM

    return LSpadeLM(str(folder), policy="never", device="cpu", batch_size=1)


NORM = {"llama": "model.norm.weight", "gpt2": "transformer.ln_f.weight"}


@pytest.mark.parametrize("family", NORM)
@pytest.mark.parametrize("way", [load, load_alone, load_in_harness])
def test_a_missing_final_norm_is_rejected_by_every_way_of_loading(checkpoint, family, way):
    with pytest.raises(UnsupportedModelError, match=f"missing weights.*: {NORM[family]}\\."):
        way(checkpoint(family, drop=[NORM[family]]))


DEPTH = {"llama": ("num_hidden_layers", "model.layers"), "gpt2": ("n_layer", "h")}


@pytest.mark.parametrize("family", DEPTH)
def test_a_checkpoint_deeper_than_its_configuration_is_rejected(checkpoint, family):
    key, blocks = DEPTH[family]
    with pytest.raises(UnsupportedModelError, match=rf"no place for: .*{blocks}\.3\.\* \(\d+ tens"):
        load(checkpoint(family, **{key: 3}))


@pytest.mark.parametrize("family", DEPTH)
def test_a_checkpoint_shallower_than_its_configuration_is_rejected(checkpoint, family):
    key, blocks = DEPTH[family]
    with pytest.raises(
        UnsupportedModelError, match=rf"missing weights.*{blocks}\.4\.\* \(\d+ tens"
    ):
        load(checkpoint(family, **{key: 5}))


@pytest.mark.parametrize("way", [load, load_alone])
def test_an_embedding_of_another_size_is_rejected_naming_both_sizes(checkpoint, way):
    with pytest.raises(UnsupportedModelError, match=r"\(64, 32\).*expects \(70, 32\)"):
        way(checkpoint(vocab_size=VOCAB + 6))


def test_an_extra_bias_that_the_configuration_lacks_is_rejected(checkpoint):
    name = "model.layers.2.self_attn.q_proj.bias"
    with pytest.raises(UnsupportedModelError, match=f"no place for: {name}"):
        load(checkpoint(add={name: torch.ones(32)}))


def test_weights_outside_the_language_model_are_skipped_with_a_warning(checkpoint, caplog):
    folder = checkpoint(add={"v_head.summary.weight": torch.ones(1, 32)})
    assert load(folder).num_layers == 4
    [line] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert line.endswith("left out: v_head.summary.weight")


def test_computed_buffers_in_an_old_checkpoint_are_accepted(checkpoint, caplog):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    load(checkpoint(add={name: torch.ones(4)}))
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("command", ["fit", "info"])
def test_no_command_accepts_a_model_with_missing_weights(
    checkpoint, project, monkeypatch, capsys, command
):
    monkeypatch.chdir(project.home)
    folder = str(checkpoint(drop=["model.norm.weight"]))
    fit = ["fit", "--config", str(project.recipe(data__model_id=folder))]
    assert main(fit if command == "fit" else ["info", folder]) == 1
    printed = capsys.readouterr()
    assert "is missing weights that its configuration requires: model.norm.weight" in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert not (project.home / "checkpoints").exists()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
DAMAGES = {
    "truncated": (lambda data: data[: len(data) // 2], "is not a complete weights file"),
    "empty": (lambda data: b"", r"is not a complete weights file \(it is empty\)"),
    "pointer": (lambda data: POINTER, "is a Git LFS pointer(.|\n)*git lfs pull"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("way", [load, load_in_harness])
def test_a_damaged_weights_file_is_named_in_the_error(checkpoint, damage, way):
    folder = checkpoint()
    change, message = DAMAGES[damage]
    file = folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UnsupportedModelError, match=f"model.safetensors {message}"):
        way(folder)


def test_a_tokenizer_that_is_a_git_lfs_pointer_is_named_in_the_error(checkpoint):
    folder = checkpoint()
    (folder / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json is a Git LFS pointer"):
        load_tokenizer(str(folder))


@pytest.fixture
def adapter_of(tmp_path):
    """Saves a LoRA adapter for a model in a folder."""
    peft = pytest.importorskip("peft")

    def save(base, *targets):
        settings = peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)
        model = peft.get_peft_model(tiny("llama"), settings)
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return tmp_path / "adapter"

    return save


def test_an_adapter_is_loaded_onto_its_base(checkpoint, adapter_of):
    base = checkpoint()
    adapted = ModelAdapter.from_pretrained(str(adapter_of(base, "q_proj")), device="cpu")
    assert adapted.identity["model_weights"] != load(base).identity["model_weights"]


def test_the_base_model_of_an_adapter_must_be_complete(checkpoint, adapter_of):
    base = checkpoint(drop=["model.norm.weight"])
    with pytest.raises(UnsupportedModelError, match=r"missing weights.*: model\.norm\.weight"):
        load(adapter_of(base, "q_proj"))


def test_fitting_heads_through_an_adapted_lm_head_is_rejected(
    checkpoint, adapter_of, project, capsys
):
    folder = str(adapter_of(checkpoint(), "lm_head"))
    recipe = project.recipe(data__model_id=folder, trainer__logger=False)
    assert main(["fit", "--config", str(recipe)]) == 1
    assert "merge or remove what was added" in capsys.readouterr().err
    assert not project.cache.exists()
