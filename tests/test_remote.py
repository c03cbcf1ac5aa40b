"""Caches and heads behind URLs: a real S3-compatible server, fsspec's memory and local systems."""

import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time

import fsspec
import pytest
import s3_server
import torch
import toy
from s3_server import BUCKET

from lspade_train import cache
from lspade_train.cache.manifest import FILES, IDENTITY, MANIFEST, STARTS
from lspade_train.cli import main
from lspade_train.errors import CacheError, LSpadeError
from lspade_train.io import remote
from lspade_train.io.layout import PATTERNS


@pytest.fixture(scope="module")
def server():
    """An S3-compatible server on this machine."""
    with s3_server.serve() as gate:
        yield gate


@pytest.fixture
def place(request, tmp_path, monkeypatch):
    """A fresh URL on each kind of file system, with per-test mirrors."""
    monkeypatch.setenv("LSPADE_CACHE", str(tmp_path / "mirrors"))
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
        return "memory://states/toy"
    if request.param == "file":
        return f"file://{tmp_path}/far/toy"
    s3_server.point_client_at(request.getfixturevalue("server"), monkeypatch)
    return f"s3://{BUCKET}/{tmp_path.name}"


every_system = pytest.mark.parametrize("place", ["memory", "file", "s3"], indirect=True)
on_s3 = pytest.mark.parametrize("place", ["s3"], indirect=True)

SIZES = {"shard_mb": 0.01, "tokens_per_batch": 128}
SHARDS = [f"shard-{number:05d}.safetensors" for number in range(5)]
TARGETS = [name.replace("shard", "target") for name in SHARDS]


def slow_param(value):
    return pytest.param(value, marks=pytest.mark.slow)


def forget_mirrors(tmp_path):
    shutil.rmtree(tmp_path / "mirrors")


def content(url: str) -> dict[str, bytes]:
    """The files of a local or remote folder, without a mirror's bookkeeping files."""
    files, root = fsspec.core.url_to_fs(url)
    files.invalidate_cache()
    found = {path.rsplit("/", 1)[-1]: path for path in files.ls(root, detail=False)}
    return {name: files.cat_file(path) for name, path in found.items() if name[0] != "."}


@pytest.fixture(scope="module")
def undisturbed(toy_root, tmp_path_factory):
    """The files of the training split as one process builds them in a local folder."""
    home = tmp_path_factory.mktemp("undisturbed")
    toy.Project(toy_root, home).module(**SIZES).states("train")
    found = content(str(home / "cache/train"))
    assert sorted(found) == sorted([*SHARDS, *TARGETS, IDENTITY, MANIFEST, STARTS])
    return found


@pytest.fixture
def computed(monkeypatch):
    """Sizes of the shards the model computed."""
    sizes, extract = [], cache.extract

    def counted(adapter, examples, *rest, **more):
        sizes.append(len(examples))
        return extract(adapter, examples, *rest, **more)

    monkeypatch.setattr("lspade_train.cache.writer.extract", counted)
    return sizes


def started(project, place, *more, **environment):
    """A real `lspade-train cache`, forked so that it skips the imports."""
    recipe = project.recipe(data__cache_dir=place, **{f"data.{k}": v for k, v in SIZES.items()})

    def child():
        os.environ.update(environment)
        with (project.home / "stderr").open("a", buffering=1) as log:
            sys.stderr = log
            logging.getLogger().handlers.clear()  # inherited from pytest
            sys.exit(main(["cache", "--config", str(recipe), "--splits", "[train]", *more]))

    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    return process


def finished(project, *processes):
    for process in processes:
        process.join(60)
    errors = project.home / "stderr"
    assert [process.exitcode for process in processes] == [0] * len(processes), errors.read_text()


def killed_at(server, request, project, place):
    """A real process that is killed while the server handles one of its requests."""
    process = started(project, place)
    server.cut[request] = lambda: os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, (project.home / "stderr").read_text()


def forbidden(*_, **__):
    raise AssertionError("the model ran")


@every_system
def test_a_cache_is_built_once_and_read_by_a_fresh_machine(project, place, tmp_path):
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
def test_a_shard_damaged_in_the_remote_store_is_rejected(project, place, tmp_path):
    project.module(cache_dir=place, shard_mb=0.01).states("train")
    files, root = fsspec.core.url_to_fs(f"{place}/train")
    content = bytearray(files.cat_file(f"{root}/shard-00001.safetensors"))
    content[-60] ^= 1
    files.pipe_file(f"{root}/shard-00001.safetensors", bytes(content))
    forget_mirrors(tmp_path)
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors does not have its checksum"):
        project.module(cache_dir=place).states("train")


@every_system
def test_another_recipe_is_rejected_and_overwrite_replaces_the_remote_cache(project, place):
    project.module(cache_dir=place).states("train")
    with pytest.raises(CacheError, match="other settings: positions"):
        project.module(cache_dir=place, positions="compact").states("train")
    project.module(cache_dir=place, positions="compact", overwrite=True).states("train")
    files, root = fsspec.core.url_to_fs(f"{place}/train")
    identity = json.loads(files.cat_file(f"{root}/{MANIFEST}"))["identity"]
    assert identity["positions"] == "compact"


@pytest.mark.slow
@every_system
def test_an_interrupted_upload_is_not_read_as_a_cache_and_can_be_completed(
    project, place, tmp_path
):
    project.module(cache_dir=place, shard_mb=0.01).states("train")
    files, root = fsspec.core.url_to_fs(f"{place}/train")
    files.rm_file(f"{root}/{MANIFEST}")
    files.rm_file(f"{root}/shard-00002.safetensors")
    project.module(cache_dir=place, shard_mb=0.01).states("train")
    forget_mirrors(tmp_path)
    other = project.module(cache_dir=place)
    other.adapter.check = forbidden
    assert len(other.states("train")) == 48


@pytest.mark.slow
@every_system
def test_a_fresh_machine_computes_only_what_another_had_not_uploaded(
    project, place, tmp_path, undisturbed, computed
):
    project.module(cache_dir=place, **SIZES).states("train")
    files, root = fsspec.core.url_to_fs(f"{place}/train")
    for name in (MANIFEST, SHARDS[2]):
        files.rm_file(f"{root}/{name}")
    forget_mirrors(tmp_path)
    computed.clear()
    project.module(cache_dir=place, **SIZES).states("train")
    assert len(computed) == 1
    assert content(f"{place}/train") == undisturbed


@every_system
def test_an_unfinished_cache_of_another_recipe_is_not_overwritten(project, place, tmp_path):
    project.module(cache_dir=place, **SIZES).states("train")
    files, root = fsspec.core.url_to_fs(f"{place}/train")
    files.rm_file(f"{root}/{MANIFEST}")
    forget_mirrors(tmp_path)
    with pytest.raises(CacheError, match="other settings: positions"):
        project.module(cache_dir=place, positions="compact").states("train")


@on_s3
def test_shards_are_uploaded_once_during_the_build_and_the_manifest_last(
    project, place, server, undisturbed, computed
):
    done = []
    server.cut[f"PUT {SHARDS[1]}"] = lambda: done.extend(computed)  # and the client retries
    project.module(cache_dir=place, **SIZES).states("train")
    assert len(done) < len(SHARDS) == len(computed)
    sent = server.files("PUT")
    assert sent == [IDENTITY, SHARDS[0], SHARDS[1], *SHARDS[1:], *TARGETS, STARTS, MANIFEST]
    assert content(f"{place}/train") == undisturbed


@on_s3
def test_unchanged_files_are_not_transferred(project, place, server):
    project.module(cache_dir=place, **SIZES).states("train")
    server.seen.clear()
    project.module(cache_dir=place, **SIZES).states("train")
    assert server.seen == []


@on_s3
@pytest.mark.parametrize(
    "at", [slow_param(IDENTITY), SHARDS[3], slow_param(TARGETS[2]), slow_param(MANIFEST)]
)
def test_a_build_killed_while_uploading_resumes_and_uploads_nothing_twice(
    project, place, server, undisturbed, at
):
    killed_at(server, f"PUT {at}", project, place)
    sent = server.files("PUT")
    assert sent[-1] == at
    assert MANIFEST not in sent[:-1]
    finished(project, started(project, place))
    order = [IDENTITY, *SHARDS, *TARGETS, STARTS, MANIFEST]
    assert server.files("PUT") == order[order.index(at) :]
    assert content(f"{place}/train") == undisturbed


@on_s3
@pytest.mark.parametrize("at", [slow_param(SHARDS[0]), SHARDS[3], slow_param(MANIFEST)])
def test_a_reader_killed_while_downloading_resumes_and_downloads_nothing_twice(
    project, place, server, tmp_path, undisturbed, at
):
    project.module(cache_dir=place, **SIZES).states("train")
    forget_mirrors(tmp_path)
    server.seen.clear()
    killed_at(server, f"GET {at}", project, place)
    first = server.files("GET")
    folder = remote.Mirror(f"{place}/train", FILES).folder
    assert not (folder / MANIFEST).exists()
    finished(project, started(project, place))
    assert [*first[:-1], *server.files("GET")] == [IDENTITY, *SHARDS, STARTS, *TARGETS, MANIFEST]
    assert content(str(folder)) == undisturbed


@pytest.mark.slow
@on_s3
def test_a_rebuild_deletes_the_old_manifest_first_and_leftover_files_last(
    project, place, server, undisturbed
):
    project.module(cache_dir=place, shard_mb=0.005).states("train")
    assert len(content(f"{place}/train")) > len(undisturbed)
    server.seen.clear()
    project.module(cache_dir=place, overwrite=True, **SIZES).states("train")
    changes = [request for request in server.seen if request.split()[0] in {"PUT", "DELETE"}]
    assert changes[0] == f"DELETE {MANIFEST}"
    assert changes[-1] == f"PUT {MANIFEST}"
    assert content(f"{place}/train") == undisturbed


@pytest.mark.slow
@on_s3
def test_a_file_changed_on_either_side_is_downloaded_again(
    project, place, server, undisturbed, computed
):
    folder = remote.Mirror(f"{place}/train", FILES).folder
    project.module(cache_dir=place, **SIZES).states("train")
    flipped = bytearray(undisturbed[SHARDS[3]])
    flipped[-60] ^= 1
    (folder / SHARDS[3]).write_bytes(flipped)
    computed.clear()
    server.seen.clear()
    project.module(cache_dir=place, **SIZES).states("train")
    assert server.seen == [f"GET {SHARDS[3]}", f"GET {MANIFEST}"]
    assert content(str(folder)) == undisturbed
    files, root = fsspec.core.url_to_fs(f"{place}/train")
    files.pipe_file(f"{root}/{SHARDS[1]}", bytes(flipped))
    server.seen.clear()
    with pytest.raises(CacheError, match="does not have its checksum"):
        project.module(cache_dir=place, **SIZES).states("train")
    assert server.seen == [f"GET {SHARDS[1]}", f"GET {MANIFEST}"]
    assert not computed


@pytest.mark.slow
@on_s3
@pytest.mark.parametrize(
    "notes", [slow_param("{"), '{"manifest.json": 3, "x": null}', slow_param("another's")]
)
def test_damaged_mirror_records_only_cost_a_transfer(project, place, server, undisturbed, notes):
    mirror = remote.Mirror(f"{place}/train", FILES)
    project.module(cache_dir=place, **SIZES).states("train")
    path = mirror.folder / remote.NOTES
    if notes == "another's":
        known = json.loads(path.read_text())
        names = sorted(known)
        notes = json.dumps(dict(zip(names, (known[name] for name in names[::-1]), strict=True)))
    path.write_text(notes)
    server.seen.clear()
    project.module(cache_dir=place, **SIZES).states("train")
    assert MANIFEST in server.files("GET")
    assert content(str(mirror.folder)) == undisturbed


def two_machines(project, place, tmp_path, *more):
    """Two real processes of one run with separate mirrors, started as on a cluster."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = ("--trainer.num_nodes", "2", "--trainer.devices", "1", *more)
    return [
        started(
            project, place, *run, LSPADE_CACHE=str(tmp_path / f"machine{rank}"),
            NODE_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )
        for rank in range(2)
    ]  # fmt: skip


def mirrors_of(tmp_path):
    return [content(str(folder)) for folder in sorted(tmp_path.glob("machine?/mirrors/*"))]


@pytest.mark.slow
@on_s3
def test_two_machines_without_a_shared_folder_build_one_cache(
    project, place, server, undisturbed, tmp_path
):
    finished(project, *two_machines(project, place, tmp_path))
    sent = server.files("PUT")
    assert sorted(sent) == sorted([IDENTITY, *SHARDS, *TARGETS, STARTS, MANIFEST])
    assert sent[-1] == MANIFEST
    assert content(f"{place}/train") == undisturbed
    assert mirrors_of(tmp_path) == [undisturbed, undisturbed]


@pytest.mark.slow
@on_s3
def test_losing_a_machine_stops_the_run_which_resumes_without_duplicate_uploads(
    project, place, server, undisturbed, tmp_path
):
    both = two_machines(project, place, tmp_path)
    server.cut[f"PUT {SHARDS[3]}"] = lambda: os.kill(both[1].pid, signal.SIGKILL)
    for process in both:
        process.join(120)
    errors = (project.home / "stderr").read_text()
    assert [process.exitcode for process in both] == [1, -signal.SIGKILL], errors
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    shutil.rmtree(tmp_path / "machine1")  # its disk is lost as well
    first = server.files("PUT")
    finished(project, *two_machines(project, place, tmp_path))
    assert {*first} & {*server.files("PUT")} == {SHARDS[3]}
    assert content(f"{place}/train") == undisturbed
    assert mirrors_of(tmp_path) == [undisturbed, undisturbed]


@pytest.mark.slow
@on_s3
def test_two_machines_rebuild_a_cache_that_both_have(project, place, undisturbed, tmp_path):
    project.module(cache_dir=place, shard_mb=0.005).states("train")
    finished(project, *two_machines(project, place, tmp_path))
    assert len(mirrors_of(tmp_path)[1]) > len(undisturbed)
    finished(project, *two_machines(project, place, tmp_path, "--overwrite"))
    assert content(f"{place}/train") == undisturbed
    assert mirrors_of(tmp_path) == [undisturbed, undisturbed]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["file", "s3"], indirect=True)
@pytest.mark.parametrize("seed", range(10))
def test_a_build_stopped_at_a_random_moment_resumes_on_any_machine(
    project, place, undisturbed, tmp_path, seed
):
    draw = random.Random(seed)
    process = started(project, place)
    time.sleep(draw.uniform(0, 1))
    os.kill(process.pid, draw.choice((signal.SIGKILL, signal.SIGTERM)))
    process.join(60)
    if seed % 2:
        shutil.rmtree(tmp_path / "mirrors", ignore_errors=True)
    finished(project, started(project, place))
    assert content(f"{place}/train") == undisturbed


def test_only_files_of_a_cache_or_of_heads_are_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("LSPADE_CACHE", str(tmp_path / "mirrors"))
    system = fsspec.filesystem("memory")
    system.store.clear()
    for name in ("config.json", "heads.safetensors", "evil.py", "training.ckpt"):
        system.pipe_file(f"/far/{name}", b"{}")
    folder = remote.Mirror("memory://far", PATTERNS).fetch()
    assert {path.name for path in folder.iterdir() if path.name[0] != "."} == {
        "config.json",
        "heads.safetensors",
    }


@on_s3
def test_a_missing_bucket_raises_a_clear_error(project, place):
    with pytest.raises(CacheError, match="that the bucket exists, and your credentials"):
        project.module(cache_dir="s3://no-such-bucket/toy").states("train")
    assert not list(remote.Mirror("s3://no-such-bucket/toy/train", FILES).folder.glob("shard-*"))


@on_s3
def test_missing_credentials_raise_a_clear_error(place, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(LSpadeError, match=r"your credentials for it") as caught:
        remote.Mirror(place, PATTERNS).fetch()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    assert len(str(caught.value).splitlines()) == 2


def test_a_mirror_that_cannot_be_created_raises_a_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LSPADE_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        LSpadeError, match=r"mirror of memory://x cannot be written.*\n.*LSPADE_CACHE"
    ):
        remote.Mirror("memory://x", PATTERNS).fetch()


def test_an_unsupported_url_scheme_raises_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("LSPADE_CACHE", str(tmp_path))
    with pytest.raises(LSpadeError, match="which no installed package reads"):
        remote.Mirror("nosuch://x/y", PATTERNS).fetch()
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(LSpadeError, match="gs:// needs a package that is not installed"):
        remote.Mirror("gs://x/y", PATTERNS).fetch()


@on_s3
def test_fit_writes_and_reads_its_cache_through_a_url(project, place, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(project.home)
    recipe = project.recipe(data__cache_dir=place, trainer__max_epochs=1)
    assert main(["fit", "--config", str(recipe)]) == 0
    assert sorted(path.name for path in project.home.iterdir()) == [
        "checkpoints", "mirrors", "recipe.yaml",
    ]  # fmt: skip
