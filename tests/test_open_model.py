"""The model and tokenizer of a recipe are opened in one place, with every setting of `data`."""

import json
import os
import sys
from pathlib import Path

import pytest
import toy

from lspade_train.cli import main
from lspade_train.models import open as opening
from lspade_train.models.open import open_model
from lspade_train.recipe import DataConfig

CODE = """
import os

from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        os.environ["OWN_TOKENIZER"] = "used"
"""

COMMANDS = {
    "predict": ["--input=prompts.txt", "--output=answers.jsonl", "--threshold=1"],
    "profile": ["--lengths=[4]", "--batch_sizes=[1]", "--repeats=1", "--thresholds=[1]"],
    "inspect": ["w1 w2 ? :", "--lens=logit_lens"],
}


@pytest.fixture
def own_code(project, monkeypatch) -> Path:
    """The toy model, with a tokenizer class in a file beside it."""
    # transformers copies the file into a folder on the Python path.
    modules = str(project.home / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("OWN_TOKENIZER", "not used")
    folder = toy.save_model(project.home / "own-code")
    (folder / "own_tokenizer.py").write_text(CODE)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]},
    }
    path.write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_trusted_tokenizers_code_is_run(
    command, own_code, project, evaluated_once, monkeypatch, capsys
):
    monkeypatch.chdir(project.home)
    (project.home / "prompts.txt").write_text("w1 w2 ? :\n")
    made = evaluated_once.copy(project.home / "made")  # profile writes beside the heads
    recipe = project.recipe(data__model_id=str(own_code), data__trust_remote_code=True)
    arguments = ["--config", str(recipe), "--heads", str(made.folder), *COMMANDS[command]]
    assert main([command, *arguments]) == 0, capsys.readouterr().err
    assert os.environ["OWN_TOKENIZER"] == "used"


def test_untrusted_code_is_not_run(own_code, project, capsys):
    recipe = project.recipe(data__model_id=str(own_code))
    assert main(["inspect", "w1", "--config", str(recipe), "--lens=logit_lens"]) == 1
    assert "trust_remote_code" in capsys.readouterr().err
    assert os.environ["OWN_TOKENIZER"] == "not used"


def test_model_and_tokenizer_get_every_setting_and_the_same_revision(monkeypatch):
    asked = {}
    monkeypatch.setattr(opening, "hub_commit", lambda *_, **__: "c" * 40)
    monkeypatch.setattr(
        opening.ModelAdapter, "from_pretrained", lambda name, **s: asked.update(model=(name, s))
    )
    monkeypatch.setattr(
        opening, "load_tokenizer", lambda name, **s: asked.update(tokenizer=(name, s))
    )
    settings = {
        "dtype": "bfloat16", "device": "cuda:1", "device_map": "auto", "quantization": "int8",
        "trust_remote_code": True, "gguf_file": "model.gguf",
    }  # fmt: skip
    open_model(DataConfig(model_id="org/name", revision="main", task="text", **settings))
    revision = {"revision": "c" * 40}
    flags = {"check": True, "compile": False}
    assert asked["model"] == ("org/name", settings | revision | flags)
    shared = {name: settings[name] for name in ("trust_remote_code", "gguf_file")}
    assert asked["tokenizer"] == ("org/name", shared | revision)


@pytest.mark.parametrize(
    ("native", "dtype"), [(False, "bfloat16"), (True, "bfloat16"), (False, "float32")]
)
def test_a_warning_is_logged_if_the_cpu_emulates_half_precision(
    toy_root, native, dtype, monkeypatch, caplog
):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    config = DataConfig(model_id=str(toy_root / "model"), task="jsonl", dtype=dtype, device="cpu")
    with caplog.at_level("WARNING", "lspade_train"):
        open_model(config)
    emulated = not native and dtype == "bfloat16"
    assert ("Set --data.dtype float32" in caplog.text) == emulated
