"""Models whose blocks lie on several devices, or off them until they run."""

import pytest
from processes import cache_digests

from lspade_train.models import ModelAdapter

pytest.importorskip("accelerate")

BLOCKS = {f"model.layers.{n}": "cpu" for n in range(4)}
WHOLE = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
MAPS = {
    "some blocks on disk": {"model.layers.1": "disk", "model.layers.3": "disk"},
    "all but the embedding on disk": dict.fromkeys([*BLOCKS, "model.norm", "lm_head"], "disk"),
}


@pytest.fixture
def whole(project):
    """The cache of the model as it is loaded without a map."""
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


def test_the_map_of_a_recipe_gives_the_same_cache(project, whole):
    project.module(device_map="auto").states("train")
    assert cache_digests(project.home) == whole
