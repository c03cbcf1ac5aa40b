"""Caches and heads behind URLs: a real S3-compatible server, fsspec's memory and local systems."""

import json
import shutil

import fsspec
import pytest
import torch

from lspade_train import remote
from lspade_train.cache.manifest import MANIFEST
from lspade_train.cli import main
from lspade_train.errors import CacheError, LSpadeError
from lspade_train.heads import CONFIG, LSpadeHeads

BUCKET = "states"


@pytest.fixture(scope="module")
def server():
    """An S3-compatible server on this machine; its port."""
    moto = pytest.importorskip("moto.server", reason="needs moto, of the dev extra")
    pytest.importorskip("s3fs", reason="needs s3fs, of the s3 extra")
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield running.get_host_and_port()[1]
    running.stop()


@pytest.fixture
def place(request, tmp_path, monkeypatch):
    """A fresh URL on each kind of file system, and mirrors of the test's own."""
    monkeypatch.setenv("LSPADE_CACHE", str(tmp_path / "mirrors"))
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
        return "memory://states/toy"
    if request.param == "file":
        return f"file://{tmp_path}/far/toy"
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{request.getfixturevalue('server')}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    system = fsspec.filesystem("s3")
    if not system.exists(BUCKET):
        system.mkdir(BUCKET)
    return f"s3://{BUCKET}/{tmp_path.name}"


every_system = pytest.mark.parametrize("place", ["memory", "file", "s3"], indirect=True)


def forget_mirrors(tmp_path):
    shutil.rmtree(tmp_path / "mirrors")


def forbidden(*_, **__):
    raise AssertionError("the model ran")


@every_system
def test_a_cache_is_built_once_and_read_by_a_machine_that_has_nothing(project, place, tmp_path):
    built = project.module(cache_dir=place, shard_mb=0.01)
    rows = built.states("train").gather(torch.arange(48))
    files, root = fsspec.core.url_to_fs(f"{place}/train")
    names = {path.rsplit("/", 1)[-1] for path in files.ls(root, detail=False)}
    assert {MANIFEST, "identity.json", "starts.safetensors", "shard-00001.safetensors"} <= names
    forget_mirrors(tmp_path)
    other = project.module(cache_dir=place, shard_mb=0.01)
    other.adapter.check = forbidden
    again = other.states("train").gather(torch.arange(48))
    assert other.reused["train"]
    assert torch.equal(rows.hidden, again.hidden)
    assert torch.equal(rows.target, again.target)


@every_system
def test_a_shard_that_was_damaged_far_away_is_refused(project, place, tmp_path):
    project.module(cache_dir=place, shard_mb=0.01).states("train")
    files, root = fsspec.core.url_to_fs(f"{place}/train")
    content = bytearray(files.cat_file(f"{root}/shard-00001.safetensors"))
    content[-60] ^= 1
    files.pipe_file(f"{root}/shard-00001.safetensors", bytes(content))
    forget_mirrors(tmp_path)
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors does not have its checksum"):
        project.module(cache_dir=place).states("train")


@every_system
def test_overwrite_replaces_what_is_far_away_and_another_recipe_is_refused(project, place):
    project.module(cache_dir=place).states("train")
    with pytest.raises(CacheError, match="built for another positions"):
        project.module(cache_dir=place, positions="compact").states("train")
    project.module(cache_dir=place, positions="compact", overwrite=True).states("train")
    files, root = fsspec.core.url_to_fs(f"{place}/train")
    identity = json.loads(files.cat_file(f"{root}/{MANIFEST}"))["identity"]
    assert identity["positions"] == "compact"


@every_system
def test_an_upload_that_was_cut_short_is_no_cache_and_is_made_whole(project, place, tmp_path):
    project.module(cache_dir=place, shard_mb=0.01).states("train")
    files, root = fsspec.core.url_to_fs(f"{place}/train")
    files.rm_file(f"{root}/{MANIFEST}")
    files.rm_file(f"{root}/shard-00002.safetensors")
    project.module(cache_dir=place, shard_mb=0.01).states("train")
    forget_mirrors(tmp_path)
    other = project.module(cache_dir=place)
    other.adapter.check = forbidden
    assert len(other.states("train")) == 48


@every_system
def test_heads_are_read_from_a_url_and_follow_what_changes_there(place, tmp_path):
    heads = LSpadeHeads((1, 3), 8, form="bias")
    for value in (1.0, 2.0):
        with torch.no_grad():
            heads.bias.fill_(value)
        heads.save_pretrained(remote.Mirror(place, CONFIG).folder)
        remote.Mirror(place, CONFIG).publish()
        forget_mirrors(tmp_path)
        remote.Mirror(place, CONFIG).fetch()
        assert torch.equal(LSpadeHeads.from_pretrained(place).bias, heads.bias)


def test_nothing_but_the_files_of_a_cache_or_of_heads_is_brought_here(tmp_path, monkeypatch):
    monkeypatch.setenv("LSPADE_CACHE", str(tmp_path / "mirrors"))
    system = fsspec.filesystem("memory")
    system.store.clear()
    for name in ("config.json", "heads.safetensors", "evil.py", "training.ckpt"):
        system.pipe_file(f"/far/{name}", b"{}")
    folder = remote.Mirror("memory://far", CONFIG).fetch()
    assert {path.name for path in folder.iterdir() if path.name[0] != "."} == {
        "config.json",
        "heads.safetensors",
    }


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_bucket_that_is_not_there_is_a_named_error(project, place):
    with pytest.raises(CacheError, match="that the bucket exists, and your credentials"):
        project.module(cache_dir="s3://no-such-bucket/toy").states("train")
    assert not list(remote.Mirror("s3://no-such-bucket/toy/train", CONFIG).folder.glob("shard-*"))


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_missing_credentials_are_a_named_error(place, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(LSpadeError, match=r"your credentials for it") as caught:
        remote.Mirror(place, CONFIG).fetch()
    assert len(str(caught.value).splitlines()) == 2


def test_a_scheme_that_nothing_reads_is_a_named_error(tmp_path, monkeypatch):
    monkeypatch.setenv("LSPADE_CACHE", str(tmp_path))
    with pytest.raises(LSpadeError, match="which no installed package reads"):
        remote.Mirror("nosuch://x/y", CONFIG).fetch()
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(LSpadeError, match="gs:// needs a package that is not here"):
        remote.Mirror("gs://x/y", CONFIG).fetch()


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_fit_caches_and_reads_through_a_url(project, place, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(project.home)
    recipe = project.recipe(data__cache_dir=place, trainer__max_epochs=1)
    assert main(["fit", "--config", str(recipe)]) == 0
    assert sorted(path.name for path in project.home.iterdir()) == [
        "checkpoints", "mirrors", "recipe.yaml",
    ]  # fmt: skip
