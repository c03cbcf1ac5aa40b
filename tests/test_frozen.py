"""The frozen model is loaded no further than needed, without changing any number."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy
from test_module import assert_equal_heads, fit, weights
from tiny_models import FAMILIES, WIDTH, tiny

from lspade_train import ModelAdapter
from lspade_train.cli import main
from lspade_train.errors import CacheError, UnsupportedModelError
from lspade_train.io.storage import json_digest
from lspade_train.models import adapter as loading
from lspade_train.models import frozen as module
from lspade_train.models import load_unembedding
from lspade_train.models.frozen import FrozenModel


@pytest.fixture(autouse=True)
def records(tmp_path, monkeypatch):
    """The empty folder where facts about models are cached."""
    monkeypatch.setenv("LSPADE_CACHE", str(tmp_path / "user-cache"))
    return tmp_path / "user-cache/models"


@pytest.fixture
def loads(monkeypatch):
    """The models that were loaded in full, in order."""
    seen, load = [], loading.load_model

    def counted(model_id, **options):
        seen.append(model_id)
        return load(model_id, **options)

    monkeypatch.setattr(loading, "load_model", counted)
    return seen


def frozen(project, **settings):
    return FrozenModel(project.config(**settings), lambda: "cpu")


@pytest.fixture
def known(project, loads):
    """A project whose model was loaded before, and the facts cached about it."""
    facts = frozen(project).facts
    assert len(loads) == 1
    loads.clear()
    return facts


@pytest.mark.parametrize("family", FAMILIES)
def test_norm_and_head_alone_give_the_logits_of_the_whole_model(family, tmp_path, caplog):
    tiny(family).save_pretrained(tmp_path)
    whole = ModelAdapter.from_pretrained(str(tmp_path), device="cpu", check=False)
    caplog.clear()
    alone = load_unembedding(str(tmp_path), dtype="float32", device="cpu")
    assert not caplog.messages  # transformers would list every weight that was skipped
    assert alone.digest == whole.unembed.digest
    assert alone.linear
    hidden = torch.randn(5, WIDTH)
    assert torch.equal(alone(hidden), whole.unembed(hidden))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_norm_and_head_are_loaded_in_the_precision_of_the_whole_model(project, loads, dtype):
    whole = frozen(project, dtype=dtype).adapter
    alone = frozen(project, dtype=dtype).unembed
    assert len(loads) == 1
    assert alone.weight.dtype == getattr(torch, dtype)
    hidden = torch.randn(5, WIDTH, dtype=alone.weight.dtype)
    assert torch.equal(alone(hidden), whole.unembed(hidden))


def test_a_second_fit_loads_no_blocks_and_gives_the_same_heads(project, loads, monkeypatch, caplog):
    monkeypatch.chdir(project.home)
    recipe = str(project.recipe(trainer__logger=False))
    ends = []
    for _ in range(2):
        assert main(["fit", "--config", recipe]) == 0
        ends.append((Path("checkpoints/toy/heads.safetensors").read_bytes(), caplog.messages[:]))
        caplog.clear()
        shutil.rmtree("checkpoints")
    assert len(loads) == 1
    (first, messages), (second, messages_again) = ends
    assert first == second
    line = "model: only final norm and LM head loaded (8.32 kB)"
    assert line in messages  # once the caches are built
    assert line in messages_again


def test_metrics_of_fitted_heads_need_no_blocks(project, loads, monkeypatch):
    monkeypatch.chdir(project.home)
    recipe = str(project.recipe(trainer__logger=False))
    for command in ("fit", "validate"):
        assert main([command, "--config", recipe]) == 0
    assert len(loads) == 1


def test_a_known_model_is_loaded_in_full_if_a_cache_is_missing(project, known, loads):
    module, _ = fit(project)
    assert len(loads) == 1
    again, _ = fit(project)
    assert len(loads) == 1
    assert_equal_heads(weights(module), weights(again))


def test_changed_weights_of_the_same_size_are_a_different_model(project, loads, tmp_path):
    folder = shutil.copytree(project.model, tmp_path / "model")
    fit(project, data=project.module(model_id=str(folder)))
    toy.save_model(folder, seed=3)
    with pytest.raises(CacheError, match="other settings: model_weights"):
        project.module(model_id=str(folder)).states("train")
    assert loads == [str(folder)] * 2


def test_touching_a_file_costs_one_load(project, loads, tmp_path):
    folder = shutil.copytree(project.model, tmp_path / "model")
    facts = frozen(project, model_id=str(folder)).facts
    os.utime(folder / "model.safetensors", (1, 1))
    for _ in range(2):
        assert frozen(project, model_id=str(folder)).facts == facts
    assert len(loads) == 2


def test_facts_about_a_hub_model_are_cached_by_commit(project, loads, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub/models--some--model"
    (repository / "refs").mkdir(parents=True)
    by_commit = {}
    for commit in ("1" * 40, "2" * 40):
        shutil.copytree(project.model, repository / "snapshots" / commit)
        (repository / "refs/main").write_text(commit)
        for _ in range(2):
            by_commit[commit] = frozen(project, model_id="some/model").facts
            (repository / "snapshots" / commit / "README.md").write_text("fetched later")
            assert frozen(project, model_id="some/model").unembed.digest
        assert by_commit[commit].revision == commit
        assert len(loads) == len(by_commit)
    assert frozen(project, model_id="some/model", revision="1" * 40).facts == by_commit["1" * 40]
    assert len(loads) == 2


def change(record, **facts):
    """Alter a record but keep it well-formed."""
    value = json.loads(record.read_text())["facts"] | facts
    record.write_text(json.dumps({"facts": value, "sha256": json_digest(value)}))


DAMAGES = {
    "empty": lambda record: record.write_bytes(b""),
    "cut short": lambda record: record.write_bytes(record.read_bytes()[:-20]),
    "no object": lambda record: record.write_text("[1]"),
    "nested": lambda record: record.write_text('{"facts":' * 9000 + "1" + "}" * 9000),
    "other keys": lambda record: record.write_text('{"facts": {}}'),
    "one digit": lambda record: record.write_text(
        record.read_text().replace('"num_layers": 4', '"num_layers": 5')
    ),
    "a fact too many": lambda record: change(record, more=1),
    "a folder": lambda record: (record.unlink(), record.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_only_costs_a_load(project, known, loads, records, damage):
    [record] = records.iterdir()
    DAMAGES[damage](record)
    assert frozen(project).facts == known
    assert len(loads) == 1


def test_a_record_of_another_head_is_detected_and_corrected(project, known, loads, records):
    [record] = records.iterdir()
    change(record, identity={**known.identity, "unembedding": "0" * 64})
    with pytest.raises(UnsupportedModelError, match="changed while this run was reading them"):
        _ = frozen(project).unembed
    assert len(loads) == 1
    assert frozen(project).unembed.digest == known.identity["unembedding"]
    assert len(loads) == 1


def test_a_family_that_cannot_be_built_without_blocks_is_loaded_in_full(
    project, known, loads, monkeypatch
):
    def refuse(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(module, "load_unembedding", refuse)
    assert frozen(project).unembed.digest == known.identity["unembedding"]
    assert len(loads) == 1


@pytest.mark.parametrize("place", ["/proc/none", "/dev/null"])
def test_facts_are_reloaded_each_time_without_a_writable_cache_folder(
    project, loads, monkeypatch, place
):
    monkeypatch.setenv("LSPADE_CACHE", place)
    assert frozen(project).facts == frozen(project).facts
    assert len(loads) == 2


def test_nothing_is_cached_about_a_model_with_remote_code(project, loads, records):
    for _ in range(2):
        _ = frozen(project, trust_remote_code=True).facts
    assert len(loads) == 2
    assert not records.exists()


MEMORY = """
import sys
from pathlib import Path
from lspade_train.models.frozen import FrozenModel
from lspade_train.recipe import DataConfig

def peak():
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) * 1024

def frozen(folder):
    return FrozenModel(DataConfig(model_id=folder, task="text"), lambda: "cpu")

frozen(sys.argv[1]).adapter  # imports what any load does
model = frozen(sys.argv[2])
before = peak()
model.unembed
alone = peak()
model.adapter
print(alone - before, peak() - alone)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs /proc to measure the peak"
)
def test_the_blocks_weights_are_not_read(project, tmp_path):
    tiny("llama", intermediate_size=100_000).save_pretrained(tmp_path / "large")
    size = (tmp_path / "large/model.safetensors").stat().st_size
    assert size > 150e6
    _ = frozen(project, model_id=str(tmp_path / "large")).facts
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, project.model, tmp_path / "large"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    alone, whole = map(int, done.stdout.split())
    assert whole > 0.5 * size  # on a CPU pages are mapped, and read where they are sampled
    assert alone < 0.1 * size
