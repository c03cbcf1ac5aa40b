"""`HiddenStateDataModule` and its loader: order, resumption, modes, and rejected inputs."""

import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from lspade_train.cache.loader import RowLoader
from lspade_train.errors import CacheError, RecipeError, TaskError


class Numbers:
    """A data set whose rows are their own indices, in two shards."""

    def __init__(self, rows, rows_at_once):
        self.rows, self.rows_at_once = rows, rows_at_once

    def __len__(self):
        return self.rows

    def order_by_shard(self, rows):
        return rows[(rows >= self.rows // 2).long().argsort(stable=True)]

    def split_batches(self, rows, count):
        return (rows[first::count].tolist() for first in range(count))


def loader(rows=23, batch_size=4, at_once=8, **options):
    return RowLoader(Numbers(rows, at_once), batch_size, **{"seed": 1} | options)


def test_an_epoch_holds_every_row_once_in_a_different_order_each_time():
    found = loader()
    first, second = list(found), list(found)
    for epoch in (first, second):
        assert sorted(sum(epoch, [])) == list(range(23))
        assert [len(batch) for batch in epoch] == [4] * 5 + [3]
    assert first != second


def test_rows_read_together_are_spread_evenly_and_reshuffled_every_epoch():
    found = loader(rows=1000, batch_size=10, at_once=1000)
    first, second = list(found), list(found)
    assert sorted(sum(first, [])) == list(range(1000))
    assert all(sum(row < 500 for row in batch) == 5 for batch in first)
    kept = [len(set(a) & set(b)) for a, b in zip(first, second, strict=True)]
    assert sum(kept) < 30  # 10 expected by chance


def test_the_order_depends_on_the_seed_alone():
    assert list(loader()) == list(loader())
    assert list(loader(seed=2)) != list(loader())


def test_without_a_seed_rows_come_in_order():
    found = loader(seed=None)
    assert sum(list(found), []) == sum(list(found), []) == list(range(23))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40), size=st.integers(1, 7), at_once=st.integers(1, 50),
    stop=st.integers(0, 30),
)  # fmt: skip
def test_a_loader_resumed_at_any_batch_continues_where_it_stopped(rows, size, at_once, stop):
    whole = loader(rows, size, at_once)
    expected = [*whole, *whole, *whole]
    first, got = loader(rows, size, at_once), []
    for _ in range(3):
        for batch in first:
            got.append(batch)
            if len(got) > stop:
                break
        if len(got) > stop:
            break
    second = loader(rows, size, at_once)
    second.load_state_dict(first.state_dict())
    # A state taken at an epoch's last batch belongs to that epoch, of which nothing remains.
    while len(got) < len(expected):
        got.extend(second)
    assert got == expected


OTHER_ORDERS = {
    "rows_per_step 4, and this run has 6": {"batch_size": 6},
    "rows_per_step 4, and this run has 8": {"world": 2},
    "training_rows 23, and this run has 20": {"rows": 20},
    "seed 1, and this run has 2": {"seed": 2},
}


@pytest.mark.parametrize("change", OTHER_ORDERS)
def test_a_loader_is_not_resumed_with_another_batch_size(change):
    first = loader()
    next(iter(first))
    with pytest.raises(RecipeError, match=rf"written with {change}: .* skip rows.*\nResume with"):
        loader(**OTHER_ORDERS[change]).load_state_dict(first.state_dict())


def test_resuming_with_more_processes_and_smaller_batches_continues_the_rows():
    whole = list(loader(rows=24))
    first = loader(rows=24)
    for _ in zip(range(2), first, strict=False):
        pass
    rest = []
    for rank in range(2):
        part = loader(rows=24, batch_size=2, rank=rank, world=2)
        part.load_state_dict(first.state_dict())
        rest.append(list(part))
    together = [sorted(sum(batches, [])) for batches in zip(*rest, strict=True)]
    assert together == [sorted(batch) for batch in whole[2:]]


def test_an_epoch_cut_short_is_not_continued_in_the_next():
    found = loader()
    for _ in zip(range(2), found, strict=False):
        pass
    found.set_epoch(1)
    whole = loader()
    _, second = list(whole), list(whole)
    assert list(found) == second


@pytest.mark.parametrize(("rows", "size"), [(24, 3), (23, 4), (5, 2), (2, 8)])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("at_once", [1, 12, 100])
def test_processes_split_the_batches_of_a_single_process(rows, size, world, at_once):
    parts = [list(loader(rows, size, at_once, rank=rank, world=world)) for rank in range(world)]
    assert all(len({len(batch) for batch in batches}) == 1 for batches in zip(*parts, strict=True))
    alone = list(loader(rows - rows % world, size * world, at_once))
    order = list(loader(rows, size * world, at_once))
    assert len({len(part) for part in parts}) == 1
    together = [sorted(sum(batches, [])) for batches in zip(*parts, strict=True)]
    assert sum(map(len, together)) == rows - rows % world
    if rows % world == 0:
        assert together == [sorted(batch) for batch in alone] == [sorted(batch) for batch in order]


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_every_validation_row_is_read_by_some_process(rows):
    parts = [list(loader(rows, 2, seed=None, rank=rank, world=2)) for rank in range(2)]
    assert sorted(sum(sum(parts, []), [])) == list(range(rows))


@pytest.mark.parametrize("mode", ["disk", "online"])
@pytest.mark.parametrize("targets", ["hidden", "logits", "topk"])
def test_a_process_without_validation_rows_gets_an_empty_batch(project, mode, targets):
    data = project.module(mode=mode, targets=targets, limit=1)
    found = data.states("validation")
    (one,), (none,) = (list(RowLoader(found, 2, seed=None, rank=r, world=2)) for r in range(2))
    assert (len(one), len(none)) == (1, 0)
    kinds = [{n: (v.dtype, v.shape[1:]) for n, v in b.tensors().items()} for b in (one, none)]
    assert kinds[0] == kinds[1]


def test_a_batch_size_below_one_raises_a_clear_error():
    with pytest.raises(RecipeError, match=r"data\.batch_size is 0; expected 1 or more"):
        loader(batch_size=0)


def test_fit_opens_only_the_train_and_validation_splits(project):
    data = project.module()
    data.setup("fit")
    assert data.reused == {"train": False, "validation": False}
    assert sorted(path.name for path in project.cache.iterdir()) == ["train", "validation"]
    data.setup("test")
    assert set(data.reused) == {"train", "validation", "test"}


def test_a_fit_releases_the_blocks_once_its_caches_are_built(project):
    data = project.module()
    expected = data.adapter.unembed.digest
    data.setup("fit")
    assert data.frozen._adapter is None
    assert data.unembed.digest == expected
    assert data.adapter.num_layers == 4  # reloaded


def test_layers_are_sorted_and_deduplicated(project):
    assert project.module([3, 0, 3]).layers == (0, 3)
    assert project.module("all").layers == (1, 2, 3)


@pytest.mark.parametrize("layers", [[4], [-1], []])
def test_a_layer_without_a_head_raises_a_clear_error(project, layers):
    with pytest.raises(RecipeError, match=r"this model has 4 blocks, so layers go from 0 to 3"):
        project.module(layers).states("train")


def test_splits_with_different_answer_tokens_are_rejected(project, tmp_path, monkeypatch):
    from lspade_train import tasks
    from lspade_train.training import datamodule as module

    plain = tasks.encode

    def encode(config, rows, *rest):
        found = plain(config, rows, *rest)
        prefix = "" if rows.split == "validation" else " "
        return tasks.Encoded(found.examples, found.skipped, prefix)

    monkeypatch.setattr(module.tasks, "encode", encode)
    for mode in ("disk", "memory", "online"):
        data = project.module(mode=mode)
        with pytest.raises(TaskError, match=r"follow ' ' in the train split, but ''") as e:
            data.setup("fit")
        assert "--data.prompt.answer_prefix" in str(e.value)
        assert not (project.cache / "validation/manifest.json").exists()


@pytest.mark.parametrize("mode", ["memory", "online"])
def test_states_that_do_not_fit_in_memory_are_rejected(project, monkeypatch, mode):
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    data = project.module(mode=mode)
    with pytest.raises(CacheError, match=r"machine has 10 kB of memory\.\nUse --data\.mode"):
        data.stored("train")


def test_skipped_rows_are_counted(project, tmp_path, caplog):
    rows = toy.questions(6)
    rows[2]["prompt"] = " ".join(["w1"] * 70)
    toy.write_jsonl(tmp_path / "long/train.jsonl", rows)
    data = project.module(dataset=str(tmp_path / "long"), overlong="skip")
    assert len(data.states("train")) == 5
    assert "train: 1 of 6 rows skipped" in caplog.text


def test_the_labels_mark_rows_without_a_right_answer(project, tmp_path):
    rows = toy.questions(6)
    del rows[4]["answer"]
    toy.write_jsonl(tmp_path / "some/train.jsonl", rows)
    data = project.module(dataset=str(tmp_path / "some"), mode="memory")
    batch = data.states("train").gather(torch.arange(6))
    assert batch.labelled.tolist() == [True] * 4 + [False, True]


def test_groups_are_named_and_indexed(project, tmp_path):
    rows = [row | {"group": name} for row, name in zip(toy.questions(3), "bab", strict=True)]
    toy.write_jsonl(tmp_path / "grouped/train.jsonl", rows)
    dataset = project.module(dataset=str(tmp_path / "grouped")).states("train")
    assert dataset.groups == ("a", "b")
    assert dataset.gather(torch.arange(3)).group.tolist() == [1, 0, 1]
