"""The cache: its contents, what it rejects, and surviving kills."""

import contextlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import toy
from test_spade import hidden_states, naive_spade
from tiny_models import LAYERS, VOCAB

from lspade_train import cache
from lspade_train.cache import StateDataset, open_cache, verify
from lspade_train.cache.buffers import BufferPool
from lspade_train.cache.extract import beginnings
from lspade_train.cache.manifest import Manifest
from lspade_train.cli import main
from lspade_train.errors import CacheError, NumericsError
from lspade_train.io.storage import file_digest
from lspade_train.io.tensors import read_tensors
from lspade_train.recipe import PromptConfig, TextConfig
from lspade_train.training.datamodule import HiddenStateDataModule

extraction = sys.modules[beginnings.__module__]  # `cache.extract` is its function
TINY_SHARDS = 0.01  # MB: a handful of prompts per shard
TEXT = {
    "task": "text",
    "text": TextConfig(length=20, first_position=3, positions_per_sequence=4),
}


def everything(dataset):
    return dataset.gather(torch.arange(len(dataset)))


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file that belongs to a cache."""
    own = ("manifest.json", "identity.json", "*.safetensors")
    return {p.name: file_digest(p) for pattern in own for p in sorted(folder.glob(pattern))}


def assert_same_rows(one, other, **tolerance):
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert (a is None) == (b is None), field.name
        if a is not None:
            torch.testing.assert_close(a, b, msg=lambda m, n=field.name: f"{n}: {m}", **tolerance)


def build(project, split="train", **settings):
    data = project.module(**settings)
    return data, data.states(split)


def encoded_of(data, split="train"):
    return data.encoded(split).examples


@pytest.fixture(scope="module")
def finished(toy_root, tmp_path_factory):
    """A finished cache of several shards; tests that damage it make a copy."""
    project = toy.Project(toy_root, tmp_path_factory.mktemp("finished"))
    build(project, shard_mb=TINY_SHARDS)
    return project


@pytest.fixture
def damaged(finished, project):
    """A per-test copy of the finished cache, already checked once."""
    shutil.copytree(finished.cache, project.cache)
    return project


# Contents of the rows


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("settings", [{}, TEXT], ids=["questions", "text"])
@torch.no_grad()
def test_rows_equal_plain_hooks_and_the_naive_two_token_forward(project, settings, positions):
    source = {"dataset": str(project.texts)} if settings else {}
    layers = [0, 1, 3]
    data, dataset = build(
        project, layers=layers, positions=positions, limit=7, tokens_per_batch=64,
        **settings, **source,
    )  # fmt: skip
    examples, batch, model = encoded_of(data), everything(dataset), data.adapter.model
    assert len({len(e.input_ids) for e in examples}) > 1
    assert dataset.layers == (0, 1, 3)
    row = 0
    for example in examples:
        ids = torch.from_numpy(example.input_ids).long()
        states = hidden_states(model, ids[None])
        for number, position in enumerate(example.positions):
            for place, layer in enumerate(layers):
                torch.testing.assert_close(batch.hidden[row, place], states[layer][0, position])
                torch.testing.assert_close(
                    data.adapter.unembed(batch.target[row, place]),
                    naive_spade(model, ids[: position + 1], layer, positions=positions),
                    rtol=1e-5,
                    atol=1e-5,
                )
            torch.testing.assert_close(batch.final[row], states[LAYERS][0, position])
            assert batch.start_id[row] == ids[0]
            assert batch.position_id[row] == position
            assert batch.answer_id[row] == example.answer_ids[number]
            choices = batch.choice_ids[row, : batch.choice_count[row]]
            assert tuple(choices.tolist()) == example.choice_ids
            row += 1
    assert row == len(dataset)


def test_selecting_rows_gives_the_right_rows_from_any_shard(finished):
    dataset = finished.module().states("train")
    some = dataset.select(torch.tensor([40, 3, 3, 17, 0]))
    again = some.select(torch.tensor([3, 0, 4]))
    assert (len(some), len(again), len(again.first(2))) == (5, 3, 2)
    expected = dataset.gather(torch.tensor([17, 40, 0]))
    assert_same_rows(everything(again), expected)
    assert torch.equal(again.labels["answer_id"], expected.answer_id)


@torch.no_grad()
def test_stored_logits_match_the_stored_hidden_state(project):
    data, hidden = build(project, mode="memory")
    _, logits = build(project, mode="memory", targets="logits")
    expected = data.adapter.unembed(everything(hidden).target)
    got = everything(logits).target_logits
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("k", [5, 1000])
def test_stored_topk_are_the_largest_logits(project, k):
    _, logits = build(project, mode="memory", targets="logits")
    _, best = build(project, mode="memory", targets="topk", topk=k)
    expected = everything(logits).target_logits.float().topk(min(k, VOCAB))
    got = everything(best)
    torch.testing.assert_close(got.target_values.float(), expected.values)
    whole = everything(logits).target_logits.gather(-1, got.target_tokens.long())
    torch.testing.assert_close(got.target_values, whole)


def test_a_row_does_not_depend_on_its_shard_or_batch(project):
    _, one = build(project, mode="memory")
    _, many = build(project, shard_mb=TINY_SHARDS, tokens_per_batch=40)
    assert len(one.shards) == 1
    assert len(many.shards) > 4
    assert_same_rows(everything(one), everything(many), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", ["hidden", "logits", "topk"])
def test_every_mode_gives_the_same_batches(project, targets):
    found = {
        mode: everything(build(project, mode=mode, targets=targets, topk=4)[1])
        for mode in ("disk", "memory", "online")
    }
    assert_same_rows(found["disk"], found["memory"])
    assert_same_rows(found["disk"], found["online"])


def test_online_mode_yields_all_positions_of_a_text(project):
    settings = TEXT | {"dataset": str(project.texts)}
    _, disk = build(project, **settings)
    data, online = build(project, mode="online", **settings)
    assert len(online) == len(encoded_of(data)) < len(disk)
    assert_same_rows(everything(disk), everything(online), rtol=1e-5, atol=1e-5)
    assert_same_rows(everything(disk), everything(data.stored("train")), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_online_states_stay_on_the_device_and_equal_those_on_the_host(project):
    data, online = build(project, mode="online", device="cuda")
    batch, host = everything(online), everything(data.stored("train"))
    assert batch.hidden.is_cuda
    assert batch.target.is_cuda
    assert not host.hidden.is_cuda
    assert_same_rows(batch.to("cpu"), host, rtol=1e-5, atol=1e-5)


def test_gathering_across_shards_preserves_the_requested_order():
    pieces = torch.arange(12.0).reshape(12, 1)
    shards = [{"final": pieces[a:b], "hidden": pieces[a:b, None]} for a, b in ((0, 5), (5, 12))]
    labels = ("start_id", "position_id", "answer_id", "labelled", "choice_ids", "choice_count")
    for shard in shards:
        shard |= {n: torch.zeros(len(shard["final"]), dtype=torch.int) for n in (*labels, "group")}
    dataset = StateDataset(shards, [""], [1])
    asked = torch.tensor([11, 0, 5, 4, 5, 7])
    assert dataset.gather(asked).final[:, 0].tolist() == [11, 0, 5, 4, 5, 7]
    assert dataset.gather(torch.tensor([3, 1])).hidden[:, 0, 0].tolist() == [3, 1]


@pytest.mark.parametrize("targets", ["hidden", "logits", "topk"])
def test_the_size_estimate_is_within_10_percent_of_the_size_on_disk(project, targets, caplog):
    with caplog.at_level("INFO", "lspade_train"):
        build(project, targets=targets, topk=16)
    logged = re.search(r"caching (\d+) rows x [\d.]+ k?B = ([\d.]+) kB in", caplog.text)
    rows, estimate = int(logged[1]), 1000 * float(logged[2])
    manifest = Manifest.read(project.cache / "train")
    header = 2000
    assert rows == manifest.rows == 48
    assert 0.99 * (manifest.bytes - header) <= estimate <= manifest.bytes * 1.1


def test_the_start_tokens_states_are_stored_once(project):
    _, dataset = build(project)
    starts = read_tensors(project.cache / "train/starts.safetensors", CacheError)
    assert starts["token_id"].tolist() == [1]
    assert starts["hidden"].shape == (1, len(dataset.layers), 32)


def test_reading_memory_maps_the_files(project):
    _, dataset = build(project)
    assert len(dataset) == 48
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc to list memory mappings")
    assert str(project.cache / "train/shard-00000.safetensors") in maps.read_text()


# Identity

OTHERS = {
    "dtype": {"dtype": "bfloat16"},
    "template": {"prompt": PromptConfig(template="{prompt} w1 :")},
    "labels": {"prompt": PromptConfig(labels=["A", "B", "C"])},
    "layers": {"layers": [1, 2]},
    "positions": {"positions": "compact"},
    "targets": {"targets": "logits"},
    "limit": {"limit": 47},
    "answer_prefix": {"prompt": PromptConfig(answer_prefix=" ")},
    "shots": {"prompt": PromptConfig(shots=1)},
    "overlong": {"overlong": "skip"},
}


@pytest.mark.parametrize("field", OTHERS)
def test_a_cache_of_another_recipe_is_rejected_naming_the_differing_field(finished, field):
    before = contents(finished.cache / "train")
    with pytest.raises(CacheError, match=rf"other settings: {field} is") as caught:
        build(finished, **OTHERS[field])
    assert "lspade-train cache --config RECIPE.yaml --overwrite" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2
    assert contents(finished.cache / "train") == before


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_cache_of_another_model_is_rejected(finished, tmp_path, family):
    other = toy.save_model(tmp_path / "other", family, seed=3)
    with pytest.raises(CacheError, match=r"other settings: model_(config|weights)"):
        build(finished, model_id=str(other))


def test_a_cache_of_other_data_is_rejected(finished, tmp_path):
    other = toy.write_data(tmp_path / "other", train=48)
    rows = toy.questions(48, seed=99)
    toy.write_jsonl(other / "train.jsonl", rows)
    with pytest.raises(CacheError, match="other settings: rows_digest"):
        build(finished, dataset=str(other))


def test_a_cache_with_another_topk_is_rejected(project):
    build(project, targets="topk", topk=4)
    with pytest.raises(CacheError, match="topk is 4 there, and 5 in the recipe"):
        build(project, targets="topk", topk=5)


def test_the_identity_depends_on_the_models_content_not_its_folder(finished, tmp_path):
    shutil.copytree(finished.model, tmp_path / "moved")
    data, _ = build(finished, model_id=str(tmp_path / "moved"))
    assert data.reused == {"train": True}


def test_the_default_cache_folder_differs_by_recipe(project, monkeypatch):
    monkeypatch.setenv("LSPADE_CACHE", str(project.home / "root"))
    data, _ = build(project, cache_dir=None)
    build(project, cache_dir=None, positions="compact")
    assert len(list((project.home / "root").glob("toy-*/train/manifest.json"))) == 2
    again, _ = build(project, cache_dir=None)
    assert again.reused["train"]
    assert again.folder("train") == data.folder("train")


def test_overwrite_replaces_another_cache(damaged):
    data, dataset = build(damaged, overwrite=True, positions="compact")
    assert data.reused == {"train": False}
    manifest = Manifest.read(damaged.cache / "train")
    assert manifest.identity["positions"] == "compact"
    assert len(list((damaged.cache / "train").glob("shard-*"))) == len(dataset.shards) == 1


def test_overwrite_keeps_the_old_cache_if_the_new_one_cannot_be_built(damaged, monkeypatch):
    before = contents(damaged.cache / "train")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 100, 0))
    with pytest.raises(CacheError, match=r"\d B free"):
        build(damaged, overwrite=True, targets="topk")
    assert contents(damaged.cache / "train") == before


# Targets added later


def without_targets(project, **settings):
    data = HiddenStateDataModule(project.config(**settings), name="toy", spade=False)
    return data, data.states("train")


def test_a_cache_for_the_final_target_holds_no_spade_targets(project):
    _, dataset = without_targets(project)
    assert not list(project.cache.glob("train/target-*"))
    assert everything(dataset).target is None
    _, whole = build(project, cache_dir=str(project.home / "whole"))
    torch.testing.assert_close(everything(dataset).hidden, everything(whole).hidden)


@pytest.mark.parametrize("targets", ["hidden", "logits", "topk"])
def test_targets_can_be_added_later_without_touching_the_states(project, monkeypatch, targets):
    settings = {"shard_mb": TINY_SHARDS, "targets": targets, "topk": 4}
    without_targets(project, **settings)
    folder = project.cache / "train"
    before = {path: path.stat().st_ino for path in folder.glob("shard-*")}
    with monkeypatch.context() as patch:
        patch.setattr("lspade_train.cache.writer.extract", lambda *_: pytest.fail("prompts ran"))
        data, _ = build(project, **settings | {"shard_mb": 256})
    assert data.reused == {"train": False}
    assert {path: path.stat().st_ino for path in folder.glob("shard-*")} == before
    build(project, cache_dir=str(project.home / "whole"), **settings)
    assert contents(folder) == contents(project.home / "whole/train")


def test_the_command_caches_what_the_recipes_target_needs(project):
    recipe = ["--config", str(project.recipe()), "--splits", "[train]"]
    assert main(["cache", *recipe, "--model.target", "final"]) == 0
    assert not list(project.cache.glob("train/target-*"))
    assert main(["cache", *recipe]) == 0
    assert list(project.cache.glob("train/target-*"))
    assert main(["cache", "--verify", str(project.cache)]) == 0


def test_a_cache_with_spade_targets_also_serves_the_final_target(finished):
    data, dataset = without_targets(finished)
    assert data.reused == {"train": True}
    assert everything(dataset).target is None


def test_adding_targets_to_damaged_states_is_rejected(project):
    without_targets(project, shard_mb=TINY_SHARDS)
    flip_a_bit(project.cache / "train/shard-00001.safetensors")
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors does not have its checksum"):
        build(project)


def test_missing_targets_raise_an_error_saying_how_to_add_them(project):
    without_targets(project)
    with pytest.raises(CacheError, match=r"without SPADE targets.*\nAdd them: lspade-train cache"):
        open_cache(project.cache / "train")


def test_the_sweep_stays_within_its_row_limit(project, monkeypatch):
    settings = TEXT | {
        "dataset": str(project.texts),
        "text": TextConfig(length=20, first_position=3),
    }
    held = []
    continued = extraction.continue_states

    def counted(adapter, hidden, layers, *rest, **more):
        held.append(len(hidden) * len(layers))
        return continued(adapter, hidden, layers, *rest, **more)

    _, whole = build(project, mode="memory", **settings)
    monkeypatch.setattr(extraction, "continue_states", counted)
    monkeypatch.setattr(extraction, "SWEEP_ROWS", 30)
    _, parts = build(project, mode="memory", **settings)
    assert len(held) > 5
    assert max(held) <= 30
    torch.testing.assert_close(everything(parts).target, everything(whole).target)


# Damage


def truncate(path):
    os.truncate(path, path.stat().st_size - 100)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def flip_a_bit_of_the_header(path):
    content = bytearray(path.read_bytes())
    content[9] ^= 1
    path.write_bytes(content)


def swap_with_the_next(path):
    other = path.with_name("shard-00002.safetensors")
    aside = path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def empty(path):
    path.write_bytes(b"")


DAMAGES = [truncate, flip_a_bit, flip_a_bit_of_the_header, Path.unlink, swap_with_the_next, empty]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_shard_raises_an_error_with_the_remedy(damaged, damage):
    damage(damaged.cache / "train/shard-00001.safetensors")
    for look in (
        lambda: build(damaged),
        lambda: verify(damaged.cache / "train", Manifest.read(damaged.cache / "train")),
    ):
        with pytest.raises(CacheError, match=r"shard-0000[12]\.safetensors") as caught:
            look()
        assert "Rebuild it: lspade-train cache --config RECIPE.yaml --overwrite" in str(
            caught.value
        )
        assert len(str(caught.value).splitlines()) <= 2


def test_a_shard_replaced_by_a_symlink_is_rejected(damaged, tmp_path):
    shard = damaged.cache / "train/shard-00000.safetensors"
    shutil.move(shard, tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="is missing"):
        build(damaged)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-40],
        lambda text: text.replace('"rows": 48', '"rows": 47'),
        lambda text: text.replace('"limit": null', '"limit": 3'),
        lambda text: text.replace('"format_version": 2', '"format_version": 9'),
        lambda text: text.replace('"shards"', '"shreds"'),
        lambda text: text.replace("shard-00000", "../shard-00000"),
        lambda text: "[]",
        lambda text: "",
    ],
    ids=["cut", "rows", "identity", "version", "key", "path", "list", "empty"],
)
def test_a_damaged_manifest_raises_an_error_with_the_remedy(damaged, change):
    path = damaged.cache / "train/manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(CacheError, match="--overwrite") as caught:
        build(damaged)
    assert "manifest.json" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_a_missing_cache_raises_an_error_saying_how_to_build_one(tmp_path):
    with pytest.raises(CacheError, match="lspade-train cache --config RECIPE.yaml"):
        cache.split_folders(tmp_path)
    with pytest.raises(CacheError, match="lspade-train cache --config RECIPE.yaml"):
        open_cache(tmp_path)


def test_an_unchanged_cache_is_not_verified_again(damaged, monkeypatch):
    build(damaged)
    monkeypatch.setattr("lspade_train.cache.reader.file_digest", lambda *_: pytest.fail("read"))
    build(damaged)


def test_a_damaged_record_of_the_last_check_only_costs_time(damaged):
    (damaged.cache / "train/.verified.json").write_text("{")
    build(damaged)


# NaN


def test_nan_states_stop_the_build_and_are_not_written(project, tmp_path):
    model = toy.save_model(tmp_path / "nan", poisoned=True)
    rows = toy.questions(12)
    rows[9]["prompt"] = f"w1 {toy.POISON} ? :"
    toy.write_jsonl(tmp_path / "rows/train.jsonl", rows)
    with pytest.raises(
        NumericsError, match=r"NaN or Inf in the model's hidden at layer 1"
    ) as caught:
        build(project, model_id=str(model), dataset=str(tmp_path / "rows"), shard_mb=TINY_SHARDS)
    assert "float32" in str(caught.value)
    folder = project.cache / "train"
    assert not (folder / "manifest.json").exists()
    assert not list(folder.glob(".*.tmp"))
    for shard in folder.glob("shard-*"):
        assert torch.isfinite(read_tensors(shard, CacheError)["hidden"]).all()


# Disks


@pytest.fixture
def mounted(tmp_path):
    """Mounts a small tmpfs; skips without the right to mount."""
    places = []

    def mount(size, *options):
        place = tmp_path / f"mount{len(places)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs"]
        try:
            subprocess.run([*command, str(place)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("needs the right to mount a small tmpfs")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_insufficient_disk_space_is_reported_before_the_model_runs(project, mounted):
    place = mounted("32k")
    data = project.module(cache_dir=str(place))
    data.adapter.check = lambda: pytest.fail("ran the model")
    with pytest.raises(CacheError, match=r"B free\.\nChoose another --data\.cache_dir"):
        data.states("train")
    assert [path.name for path in (place / "train").iterdir()] == [".lock"]


def test_a_disk_that_fills_up_midway_leaves_only_complete_shards(project, mounted, monkeypatch):
    place = mounted("30k")
    monkeypatch.setattr("lspade_train.cache.writer.require_space", lambda *_: None)
    with pytest.raises(
        CacheError, match=r"is full; shard-\d+\.safetensors was not written"
    ) as caught:
        build(project, cache_dir=str(place), shard_mb=TINY_SHARDS)
    assert len(str(caught.value).splitlines()) == 2
    left = sorted(path.name for path in (place / "train").glob("*.*") if path.name[0] != ".")
    assert "manifest.json" not in left
    assert not list((place / "train").glob(".*.tmp"))
    shards = list((place / "train").glob("shard-*"))
    assert shards
    for shard in shards:
        read_tensors(shard, CacheError)


def test_a_build_resumes_with_more_disk_space_to_the_same_bytes(finished, mounted, monkeypatch):
    place = mounted("48k")
    with monkeypatch.context() as patch:
        patch.setattr("lspade_train.cache.writer.require_space", lambda *_: None)
        with pytest.raises(CacheError):
            build(finished, cache_dir=str(place), shard_mb=TINY_SHARDS)
    subprocess.run(["mount", "-o", "remount,size=8m", str(place)], check=True)
    build(finished, cache_dir=str(place), shard_mb=TINY_SHARDS)
    assert contents(place / "train") == contents(finished.cache / "train")


def test_a_read_only_folder_raises_a_clear_error(project, mounted):
    place = mounted("1m", "ro")
    with pytest.raises(CacheError, match=r"cannot be (made|created|written).*--data\.cache_dir"):
        build(project, cache_dir=str(place / "cache"))


def test_a_file_in_place_of_the_cache_folder_raises_a_clear_error(project):
    project.cache.write_text("")
    with pytest.raises(CacheError, match=r"cannot be created.*--data\.cache_dir"):
        build(project)


def test_a_finished_cache_can_be_read_from_a_read_only_folder(finished, mounted):
    place = mounted("8m")
    shutil.copytree(finished.cache / "train", place / "train")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    data, dataset = build(finished, cache_dir=str(place))
    assert data.reused["train"]
    assert len(dataset) == 48


# Interruptions


def test_resuming_with_another_shard_or_batch_size_gives_the_same_rows(project, finished):
    build(project, shard_mb=TINY_SHARDS * 3, tokens_per_batch=64)
    (project.cache / "train/manifest.json").unlink()
    build(project, shard_mb=TINY_SHARDS)
    assert contents(project.cache / "train") == contents(finished.cache / "train")


def test_a_resumed_run_computes_only_what_is_missing(damaged, monkeypatch):
    folder = damaged.cache / "train"
    before = contents(folder)
    (folder / "manifest.json").unlink()
    (folder / "shard-00003.safetensors").unlink()
    calls = []
    extract = cache.extract

    def counted(adapter, examples, *rest, **more):
        calls.append(len(examples))
        return extract(adapter, examples, *rest, **more)

    monkeypatch.setattr("lspade_train.cache.writer.extract", counted)
    build(damaged, shard_mb=TINY_SHARDS)
    assert len(calls) == 1
    assert contents(folder) == before


def test_an_unfinished_cache_of_another_recipe_is_rejected(damaged):
    (damaged.cache / "train/manifest.json").unlink()
    with pytest.raises(CacheError, match="other settings: positions"):
        build(damaged, positions="compact")


def test_two_processes_building_the_same_cache_leave_one_valid_cache(project, finished):
    context = multiprocessing.get_context("fork")
    both = [
        context.Process(target=build, args=(project,), kwargs={"shard_mb": TINY_SHARDS})
        for _ in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert contents(project.cache / "train") == contents(finished.cache / "train")


# Several processes of one run

MAIN = "import sys\nfrom lspade_train.cli import main\nsys.exit(main())\n"


@contextlib.contextmanager
def many(project, processes, *more, **settings):
    """A real multi-process `lspade-train cache`, as Lightning launches it."""
    script = project.home / "main.py"
    script.write_text(MAIN)
    sizes = {"data__shard_mb": TINY_SHARDS, "data__tokens_per_batch": 128}
    recipe = project.recipe(trainer__devices=processes, **sizes | settings)
    with subprocess.Popen(
        [sys.executable, str(script), "cache", "--config", str(recipe), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow  # test_launchers covers two processes more quickly
def test_the_bytes_do_not_depend_on_the_number_of_processes(project, finished):
    before = contents(finished.cache / "train")
    with many(project, 2, "--splits", "[train]", data__tokens_per_batch=8192) as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert contents(project.cache / "train") == before


@pytest.mark.slow  # test_launchers covers two processes more quickly
def test_an_error_in_one_process_is_printed_once(project, tmp_path):
    model = toy.save_model(tmp_path / "nan", poisoned=True)
    rows = toy.questions(12)
    rows[-1]["prompt"] = f"w1 {toy.POISON} ? :"
    toy.write_jsonl(tmp_path / "rows/train.jsonl", rows)
    with many(
        project, 2, "--splits", "[train]",
        data__model_id=str(model), data__dataset=str(tmp_path / "rows"),
    ) as process:  # fmt: skip
        _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert error.count("error: NaN or Inf") == error.count("error:") == 1, error
    assert "Traceback" not in error


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_killed_process_raises_a_clear_error_and_the_run_resumes(project, seed):
    project.data = toy.write_data(project.home / "data", train=1500, validation=4)
    draw, folder = random.Random(seed), project.cache / "train"
    with many(project, 2, "--splits", "[train]") as process:
        while len(list(folder.glob("shard-*"))) < draw.randint(3, 60):
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        os.kill(child_of(process.pid), signal.SIGKILL)
        _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert error.count("error:") == 1, error
    assert "run the same command again" in error
    assert "Traceback" not in error
    with many(project, 2, "--splits", "[train]") as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    after = contents(folder)
    undisturbed = project.module(cache_dir=str(project.home / "undisturbed"), shard_mb=TINY_SHARDS,
                          tokens_per_batch=128)  # fmt: skip
    undisturbed.states("train")
    assert after == contents(project.home / "undisturbed/train")


def child_of(pid: int) -> int:
    """The process that Lightning started beside the first one (Linux)."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def test_a_batch_still_in_use_is_never_overwritten():
    count = torch.arange(64, dtype=torch.float32)
    states = count[:, None, None].expand(64, 2, 8).contiguous()
    shard = {"hidden": states, "target": states, "final": states[:, 0].contiguous()}
    ids = ("start_id", "position_id", "answer_id", "labelled", "choice_count", "group")
    labels = dict.fromkeys(ids, count.int()) | {"choice_ids": count.int()[:, None]}
    dataset = StateDataset([shard | labels], ("",), (1, 2))
    gathered = torch.randperm(64).split(4)
    # A view is enough to keep a batch alive.
    held = [dataset.gather(rows).hidden[:, 1] for rows in gathered]
    for rows, value in zip(gathered, held, strict=True):
        assert torch.equal(value[:, 0], rows.float())


def test_a_buffer_is_reused_once_no_tensor_references_it():
    memory = BufferPool()
    first = memory.take((4, 8), torch.float32)
    place, other = first.data_ptr(), memory.take((4, 8), torch.float32).data_ptr()
    assert other != place
    kept = first[1:, :2]
    del first
    assert memory.take((4, 8), torch.float32).data_ptr() != place
    del kept
    assert place in {memory.take((4, 8), torch.float32).data_ptr() for _ in range(2)}
