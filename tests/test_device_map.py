"""Models whose blocks are spread over several devices, or offloaded until they run."""

import pytest
import torch
from processes import cache_digests
from test_heads import trained
from tiny_models import WIDTH, tiny

from lspade_train.models import ModelAdapter
from lspade_train.models import unembedding as module

pytest.importorskip("accelerate")

BLOCKS = {f"model.layers.{n}": "cpu" for n in range(4)}
WHOLE = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
MAPS = {
    "some blocks on disk": {"model.layers.1": "disk", "model.layers.3": "disk"},
    "all but the embedding on disk": dict.fromkeys([*BLOCKS, "model.norm", "lm_head"], "disk"),
}


@pytest.fixture
def whole(project):
    """The cache of the model loaded without a device map."""
    project.module().states("train")
    made = cache_digests(project.home)
    project.cache.rename(project.home / "whole")
    return made


@pytest.mark.parametrize("where", MAPS)
def test_a_model_that_is_partly_on_disk_gives_the_same_cache(project, whole, where):
    data = project.module(device_map=BLOCKS | WHOLE | {"lm_head": "cpu"} | MAPS[where])
    assert any(parameter.is_meta for parameter in data.adapter.model.parameters())
    assert data.adapter.identity == ModelAdapter.from_pretrained(str(project.model)).identity
    data.states("train")
    assert cache_digests(project.home) == whole


def test_a_recipes_device_map_gives_the_same_cache(project, whole):
    project.module(device_map="auto").states("train")
    assert cache_digests(project.home) == whole


def test_a_norm_on_another_device_moves_its_states_to_the_head(monkeypatch):
    # Meta tensors hold no values to check.
    monkeypatch.setattr(module, "_is_linear", lambda head, weight: True)
    model = tiny("llama")
    model.lm_head.to("meta")  # a second device available on every machine
    unembed = module.find_unembedding(model, model.model)
    hidden, ids = torch.randn(5, WIDTH), torch.zeros(5, 2, dtype=torch.long, device="meta")
    assert unembed(hidden).device.type == "meta"
    assert unembed.tokens(hidden, ids).device.type == "meta"


@pytest.mark.gpu
def test_heads_accept_states_from_blocks_on_another_device():
    from accelerate import dispatch_model

    heads, hidden = trained(), torch.randn(5, WIDTH)
    expected = heads.bind(tiny("llama")).logits(hidden, 2)
    places = BLOCKS | WHOLE | {"model.norm": 0, "lm_head": 0}
    split = ModelAdapter(dispatch_model(tiny("llama"), places, main_device="cpu"))
    heads.bind(split)
    assert heads.bias.is_cuda
    torch.testing.assert_close(heads.logits(hidden, 2).cpu(), expected, rtol=1e-4, atol=1e-4)
