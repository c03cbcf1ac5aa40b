"""Progress of long jobs is reported, and interrupted work resumes where it stopped."""

import logging
import sys

import pytest
import torch
from processes import digests

from lspade_train.cache.unfinished import STEPS, Unfinished
from lspade_train.errors import CacheError
from lspade_train.io import progress
from lspade_train.io.progress import Progress, track


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until moved."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def lines(caplog):
    return [record.getMessage() for record in caplog.records]


@pytest.fixture(autouse=True)
def _listen(caplog):
    caplog.set_level(logging.INFO, "lspade_train")


def test_without_a_terminal_a_line_is_logged_every_half_minute(clock, caplog):
    with Progress("train: caching", 1000) as work:
        for _ in range(7):
            clock.now += 10
            work.advance(100, lambda: "loss 0.5")
    assert lines(caplog) == [
        "train: caching: 300 of 1,000 rows, 10 rows/s, 1 min 10 s left, loss 0.5",
        "train: caching: 600 of 1,000 rows, 10 rows/s, 40 s left, loss 0.5",
    ]


def test_work_of_unknown_size_is_shown_without_a_total(clock, caplog):
    with Progress("predict", None) as work:
        clock.now += 40
        work.advance(400)
    assert lines(caplog) == ["predict: 400 rows, 10 rows/s"]


def test_nested_work_reports_nothing(clock, caplog):
    with Progress("whole", 2) as whole, Progress("part", 4) as part:
        clock.now += 40
        part.advance()
        whole.advance()
    with Progress("after it", 2) as work:
        clock.now += 40
        work.advance()
    assert [line.split(":")[0] for line in lines(caplog)] == ["whole", "after it"]


def test_the_rate_counts_only_the_work_of_this_run(clock, caplog):
    with Progress("work", 10_000) as work:
        work.skip(4096)
        clock.now += 40
        work.advance(40)
    assert lines(caplog) == [
        "work: resumed at row 4,096 of 10,000",
        "work: 4,136 of 10,000 rows, 1 rows/s, 1 h 37 min left",
    ]


def test_unnamed_and_finished_work_reports_nothing(clock, caplog):
    for name in (None, "done"):
        with Progress(name, 10) as work:
            work.skip(10)
            clock.now += 60
    assert list(track("abc", "work", 3, "letters")) == ["a", "b", "c"]
    assert not caplog.records


def two_steps_and(work, error):
    with work:
        work.step(2)
        work.step(1)
        raise error


def test_an_interrupted_file_resumes_after_its_last_whole_step(tmp_path):
    path = tmp_path / "shard-00000.safetensors"
    first = Unfinished(path, "tag")
    first.tensors["hidden"] = torch.arange(6.0)
    with pytest.raises(KeyboardInterrupt):
        two_steps_and(first, KeyboardInterrupt)
    again = Unfinished(path, "tag", Progress(None, 6))
    assert (again.steps, again.tensors["hidden"].tolist()) == (2, [0, 1, 2, 3, 4, 5])
    assert STEPS not in again.tensors
    assert Unfinished(path, "another tag").steps == 0


def test_an_error_leaves_no_partial_file(tmp_path):
    with pytest.raises(CacheError):
        two_steps_and(Unfinished(tmp_path / "shard-00000.safetensors", "tag"), CacheError)
    assert not list(tmp_path.iterdir())


PLACES = {
    "states": "lspade_train.cache.extract.collect_states",
    "targets": "lspade_train.cache.extract.continue_states",
}


@pytest.mark.parametrize("place", PLACES)
def test_the_first_shard_survives_ctrl_c(place, project, monkeypatch, caplog):
    """Both parts of a cache: a second run computes only the rest and ends with the same bytes."""
    for module in ("extract", "added_targets"):  # ten rows of 3 layers
        monkeypatch.setattr(sys.modules[f"lspade_train.cache.{module}"], "SWEEP_ROWS", 30)
    calls, stop_at = [], 0
    module, name = PLACES[place].rsplit(".", 1)
    known = getattr(sys.modules[module], name)

    def counted(*given, **more):
        calls.append(place)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return known(*given, **more)

    def build(home):
        calls.clear()
        data = project.module(tokens_per_batch=100, cache_dir=str(project.home / home))
        data.states("train")
        return len(calls)

    monkeypatch.setattr(sys.modules[module], name, counted)
    whole = build("whole")
    stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        build("again")
    stop_at = 0
    landed = 2 if place == "states" else 3  # of states; the last one is still being written
    assert build("again") == whole - landed
    assert "resumed at row" in caplog.text
    whole, again = (digests(project.home / name, "**/*") for name in ("whole", "again"))
    assert list(whole.values()) == list(again.values())
    assert len(again) == 5  # no unfinished file is left
