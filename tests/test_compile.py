"""`data.compile`: the same states with few compiled variants, and errors with a remedy."""

import os
import re
import stat
import subprocess
import sys

import pytest
import torch
from test_cache import TINY_SHARDS, assert_same_rows, build, everything
from tiny_models import VOCAB, tiny
from torch._dynamo.utils import counters
from transformers import DynamicCache

from lspade_train.cache import Manifest
from lspade_train.errors import RecipeError
from lspade_train.io.tensors import file_tag
from lspade_train.models import ModelAdapter
from lspade_train.probes.spade import collect_states, continue_states

LAYERS = [1, 2, 3]
# Rows x tokens: equal, one of either, growing and shrinking.
SHAPES = [(4, 4), (4, 7), (3, 9), (1, 12), (8, 5), (2, 20), (6, 6), (5, 2), (1, 3), (7, 11), (9, 8)]


@pytest.fixture
def fresh():
    """Reset the compiled code and counters of other tests."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def states(adapter, rows, tokens, *, padded):
    """Hidden states, final states and SPADE targets of random prompts with two start tokens."""
    generator = torch.Generator().manual_seed(rows * tokens)
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
    ids[:, 0] = 1 + torch.arange(rows) % 2
    mask = torch.ones_like(ids)
    mask[0, tokens - 1 :] = not padded
    last = mask.sum(-1, keepdim=True) - 1
    found = collect_states(adapter, ids, mask, last, LAYERS)
    hidden = found.hidden[:, 0]
    target = continue_states(adapter, hidden, LAYERS, found.start_ids, found.position_ids[:, 0])
    return hidden, found.final[:, 0], target


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_compiled_blocks_give_the_uncompiled_states_with_few_variants(fresh, family):
    model = tiny(family)
    eager = ModelAdapter(model)
    fast = ModelAdapter(model, compile=True)
    for padded in (False, True):
        for rows, tokens in SHAPES:
            expected = states(eager, rows, tokens, padded=padded)
            for got, wanted in zip(
                states(fast, rows, tokens, padded=padded), expected, strict=True
            ):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    # One or many rows x one or many tokens x with or without mask, whatever the number of blocks;
    # and once more for rows behind several start tokens, whose keys are no view of a single one.
    assert 2 <= counters["stats"]["unique_graphs"] <= 9
    assert not counters["graph_break"]


@pytest.mark.slow
def test_resuming_with_the_other_setting_discards_the_earlier_shards(project):
    one, before = build(project, shard_mb=TINY_SHARDS)
    before = everything(before)
    folder = project.cache / "train"
    (folder / "manifest.json").unlink()
    two, after = build(project, shard_mb=TINY_SHARDS, compile=True)
    assert two.identity("train") == one.identity("train")
    assert Manifest.read(folder).provenance["compiled"] is True
    tags = [file_tag(path) for path in folder.glob("shard-*.safetensors")]
    assert len(tags) > 1
    assert all(tag.endswith("compiled") for tag in tags)
    assert_same_rows(everything(after), before, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_blocks_with_a_growing_cache_run_uncompiled(fresh):
    """Each block has its own keys there, so each would be compiled separately."""
    model = tiny("llama")
    ids = torch.tensor([[1, 5, 9], [1, 7, 4]])
    mask, positions = torch.ones_like(ids), torch.arange(3).expand(2, -1)
    found = []
    for compiled in (False, True):
        adapter = ModelAdapter(model, check=False, compile=compiled)
        plan = adapter.plan_cached(ids, mask, positions, DynamicCache(config=model.config))
        hidden = plan.hidden
        with torch.no_grad():
            for block in range(adapter.num_layers):
                hidden = adapter.run_block(plan, block, hidden)
        found.append(hidden)
    assert torch.equal(*found)
    assert counters["stats"]["unique_graphs"] == 0


NO_COMPILER = r"data\.compile needs a C\+\+ compiler: install g\+\+.*\nOr set it to false"
BROKEN = r"torch\.compile fails on LlamaDecoderLayer: .*\n.*set data\.compile to false"


def test_a_failing_compiler_raises_an_error_saying_what_to_install(monkeypatch):
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import InvalidCxxCompiler

    def fails(*_):
        raise BackendCompilerFailed(compile, InvalidCxxCompiler(), None)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    with pytest.raises(RecipeError) as error:
        ModelAdapter(tiny("llama"), compile=True)
    assert re.match(NO_COMPILER, str(error.value))


@pytest.mark.slow
def test_a_missing_compiler_raises_an_error_saying_what_to_install(fresh, tmp_path, monkeypatch):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # drop earlier compilations
    absent = {"cpp.cxx": (None, str(tmp_path / "absent"))}
    with config.patch(absent), pytest.raises(RecipeError) as error:
        ModelAdapter(tiny("llama"), compile=True)
    assert re.match(NO_COMPILER, str(error.value))


@pytest.mark.slow
@pytest.mark.parametrize(("script", "message"), [(None, NO_COMPILER), ("exit 1", BROKEN)])
def test_the_command_stops_without_a_traceback_if_compilation_fails(project, script, message):
    path = project.home / "c++"
    if script:
        path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec g++ --version\n{script}\n')
        path.chmod(stat.S_IRWXU)
    own = {"CXX": str(path), "TORCHINDUCTOR_CACHE_DIR": str(project.home / "inductor")}
    code = "import sys; from lspade_train.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "cache", "--config", str(project.recipe())]
    done = subprocess.run(
        [*command, "--data.compile", "true"], env=os.environ | own, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(message, done.stderr), done.stderr
