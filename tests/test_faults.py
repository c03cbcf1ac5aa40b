"""Recovery from real signals, sent to real processes at random moments, and from damaged files.

`LSPADE_KILLS=20 pytest tests/test_faults.py` sends twenty per command instead of two.
"""

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import toy
from processes import (
    HEADS,
    cache_digests,
    digests,
    finished,
    heads_made,
    recipe,
    shards,
    started,
    steps_logged,
    steps_saved,
    stopped,
    wait_for,
)

from lspade_train.cache import open_cache, reader
from lspade_train.cli import main
from lspade_train.errors import CacheError
from lspade_train.io.storage import file_digest

KILLS = int(os.environ.get("LSPADE_KILLS", "2"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
RESUMABLE = (128 + signal.SIGTERM, -signal.SIGTERM)
"""Exit codes after SIGTERM: handled, or before the handler was installed."""


@dataclass(frozen=True)
class Job:
    """One command: its arguments, its outputs, and what a kill must not cost."""

    prepare: Callable[[toy.Project], list[str]]
    made: Callable[[Path], dict[str, str]]
    kept: Callable[[Path], object]
    lost: Callable[[Path, object], object]


def shards_written_again(home: Path, before) -> list[str]:
    after = shards(home)
    return [path for path, node in before.items() if after.get(path) != node]


CACHE = Job(
    prepare=lambda project: ["cache", *recipe(project)],
    made=cache_digests,
    kept=shards,
    lost=shards_written_again,
)


def logs_of(home: Path) -> set[Path]:
    return set((home / HEADS / "logs").glob("*/metrics.csv"))


def steps_not_taken_once(home: Path, kept) -> set[int]:
    """In the resumed run: steps that had already been saved, or that it skipped."""
    saved, before = kept
    # A run stopped between its last step and its export has no steps left, and no log.
    taken = [step for log in logs_of(home) - before for step in steps_logged(log)]
    return set(taken) ^ set(range(saved, steps_saved(home)))


FIT = Job(
    prepare=lambda project: ["fit", *recipe(project), "--ckpt_path", "last"],
    made=lambda home: heads_made(home) | cache_digests(home),
    kept=lambda home: (steps_saved(home), logs_of(home)),
    lost=steps_not_taken_once,
)


def answers(home: Path) -> list[str]:
    path = home / "answers.jsonl"
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def predict_arguments(project: toy.Project) -> list[str]:
    prompts = [json.dumps(row) for row in toy.questions(1500, seed=9)]
    (project.home / "prompts.jsonl").write_text("\n".join(prompts))
    ends = ["--input", "prompts.jsonl", "--output", "answers.jsonl", "--resume"]
    return ["predict", *recipe(project), "--threshold", "3.9", *ends]


PREDICT = Job(
    prepare=predict_arguments,
    made=lambda home: digests(home, "answers.jsonl"),
    kept=answers,
    lost=lambda home, before: [a for a, b in zip(before, answers(home), strict=False) if a != b],
)

JOBS = {"cache": CACHE, "fit": FIT, "predict": PREDICT}


@pytest.fixture(scope="module")
def undisturbed(toy_root, tmp_path_factory):
    """Undisturbed runs of every command, by name: the project, its outputs, the seconds."""
    places = {}
    questions = toy.write_data(tmp_path_factory.mktemp("more"), train=100, validation=15)

    def prepared(name: str) -> tuple[toy.Project, list[str]]:
        project = toy.Project(toy_root, tmp_path_factory.mktemp(name))
        project.data = questions
        if name == "predict" and "fit" in places:
            shutil.copytree(places["fit"][0].home / HEADS, project.home / HEADS)
        return project, JOBS[name].prepare(project)

    def run(name: str):
        if name == "predict":
            run("fit")
        if name not in places:
            project, arguments = prepared(name)
            seconds = finished(project.home, arguments)
            places[name] = (project, JOBS[name].made(project.home), seconds)
        return places[name]

    run.prepared = prepared
    return run


def test_a_fit_stopped_between_last_step_and_export_repeats_no_step(undisturbed):
    project, arguments = undisturbed.prepared("fit")
    finished(project.home, arguments)
    made, kept = FIT.made(project.home), FIT.kept(project.home)
    (project.home / HEADS / "heads.safetensors").unlink()
    finished(project.home, arguments)
    assert FIT.made(project.home) == made
    assert not FIT.lost(project.home, kept)


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        pytest.param(name, seed, marks=pytest.mark.slow if seed or name != "cache" else ())
        for name in JOBS
        for seed in range(KILLS)
    ],
)
def test_a_process_stopped_at_a_random_moment_resumes_to_the_same_bytes(undisturbed, name, seed):
    # A fit that is killed resumes from its last checkpoint; one that is terminated saves one first.
    job, sent = JOBS[name], SIGNALS[(seed + (name == "fit")) % 2]
    _, made, seconds = undisturbed(name)
    assert made
    part = random.Random(f"{name} {seed}").random()
    while True:
        project, arguments = undisturbed.prepared(name)
        code = stopped(project.home, arguments, sent, part * seconds)
        if code != 0:
            break
        part *= 0.9  # it had already finished
    log = (project.home / "stderr").read_text()
    assert code in (RESUMABLE if sent == signal.SIGTERM else (-signal.SIGKILL,)), log
    kept = job.kept(project.home)
    finished(project.home, arguments)
    assert job.made(project.home) == made
    assert not job.lost(project.home, kept)


def test_a_fit_ended_by_a_scheduler_saves_its_last_step_and_says_how_to_resume(project):
    arguments = [*FIT.prepare(project), "--trainer.max_epochs", "2000"]
    process = started(project.home, arguments)
    log = project.home / HEADS / "logs/version_0/metrics.csv"
    wait_for(log.exists, process)
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(60)
    printed = (project.home / "stderr").read_text()
    assert process.exitcode == 143, printed
    *_, last_line = printed.splitlines()
    assert last_line.startswith("terminated; resume it with: lspade-train fit --config "), printed
    assert last_line.endswith(" --ckpt_path last")
    assert steps_saved(project.home) == max(steps_logged(log)) + 1
    assert not list(project.home.glob("checkpoints/**/*.tmp"))


def test_a_process_waiting_for_a_killed_builder_takes_over(undisturbed):
    project, arguments = undisturbed.prepared("cache")
    log = project.home / "stderr"
    first = started(project.home, arguments)
    wait_for(lambda: len(shards(project.home)) > 2, first)
    os.kill(first.pid or 0, signal.SIGSTOP)  # however long the second takes to start
    second = started(project.home, arguments)
    wait_for(lambda: "Another process is building" in log.read_text(), second)
    os.kill(first.pid or 0, signal.SIGKILL)
    for process, code in ((first, -signal.SIGKILL), (second, 0)):
        process.join(60)
        assert process.exitcode == code, log.read_text()
    assert CACHE.made(project.home) == undisturbed("cache")[1]


# Damage before resuming


@pytest.fixture(scope="module")
def other(toy_root, tmp_path_factory):
    """A cache of the same prompts with different numbers."""
    project = toy.Project(toy_root, tmp_path_factory.mktemp("other"))
    finished(project.home, ["cache", *recipe(project, data__positions="compact")])
    return project.cache / "train"


@pytest.fixture
def unfinished(undisturbed, monkeypatch):
    """A copy of the undisturbed cache without its manifests, as a killed run leaves it."""
    project, arguments = undisturbed.prepared("cache")
    shutil.copytree(undisturbed("cache")[0].cache, project.cache)
    for manifest in project.cache.glob("*/manifest.json"):
        manifest.unlink()
    monkeypatch.chdir(project.home)
    return project.home, arguments


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "deleted": lambda path, _: path.unlink(),
    "truncated": lambda path, _: os.truncate(path, path.stat().st_size // 2),
    "bit flipped": lambda path, _: flip(path, -60),
    "bit of the header flipped": lambda path, _: flip(path, 40),
    "bit of the tag flipped": lambda path, _: flip(path, path.read_bytes().index(b"xxh3:") + 7),
    "another file's": lambda path, _: shutil.copy(path.with_name("shard-00003.safetensors"), path),
    "another cache's": lambda path, other: shutil.copy(other / path.name, path),
}


def each_damage():
    """Every kind of damage to a shard; the start tokens' file is read by the same code."""
    for damage in DAMAGES:
        yield "shard-00001.safetensors", damage
        slow = damage != "bit flipped"
        start = "starts.safetensors"
        yield pytest.param(start, damage, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize(("file", "damage"), [*each_damage()])
def test_a_file_damaged_before_the_run_resumes_is_rebuilt(
    undisturbed, unfinished, other, damage, file
):
    home, arguments = unfinished
    path = home / "cache/train" / file
    before = path.read_bytes()
    DAMAGES[damage](path, other)
    assert not path.exists() or path.read_bytes() != before
    assert main(arguments) == 0
    assert CACHE.made(home) == undisturbed("cache")[1]


# Modified files, clock jumps


@pytest.fixture
def reopened(undisturbed, project):
    """A copy of the undisturbed cache that was opened, and so verified, once."""
    shutil.copytree(undisturbed("cache")[0].cache / "train", project.cache)
    open_cache(project.cache)
    return project.cache


def test_a_change_that_keeps_size_and_mtime_is_detected(reopened):
    shard = reopened / "shard-00001.safetensors"
    stat = shard.stat()
    flip(shard, -60)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors does not have its checksum"):
        open_cache(reopened)


@pytest.fixture
def hashed(monkeypatch):
    """The files that are hashed to verify them, by name."""
    names = []

    def counted(path, error):
        names.append(path.name)
        return file_digest(path, error)

    monkeypatch.setattr(reader, "file_digest", counted)
    return names


def test_a_cache_is_not_verified_by_the_run_that_wrote_it(project, hashed, monkeypatch):
    monkeypatch.chdir(project.home)
    arguments = ["cache", *recipe(project), "--splits", "[train]"]
    assert main(arguments) == main(arguments) == 0
    assert hashed == []


@pytest.mark.parametrize("file", ["shard-00001.safetensors", "starts.safetensors"])
def test_files_modified_since_writing_are_verified(project, hashed, monkeypatch, file):
    monkeypatch.chdir(project.home)
    assert main(["cache", *recipe(project), "--splits", "[train]"]) == 0
    path = project.cache / "train" / file
    stat = path.stat()
    flip(path, -60)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(CacheError, match=rf"{file} does not have its checksum"):
        open_cache(project.cache / "train")
    assert hashed == [file]


@pytest.mark.parametrize("year", [1971, 2100])
def test_a_clock_jump_only_costs_a_verification(reopened, hashed, year):
    for path in reopened.iterdir():
        os.utime(path, times=((year - 1970) * 31_556_952,) * 2)
    manifest, _ = open_cache(reopened)
    assert len(hashed) == len(manifest.files) + 1
    open_cache(reopened)
    assert len(hashed) == len(manifest.files) + 1


# Disks


@pytest.mark.slow
def test_predict_resumes_where_a_full_disk_stopped_it(undisturbed, monkeypatch, capsys):
    undisturbed("predict")
    project, arguments = undisturbed.prepared("predict")
    place = project.home / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    monkeypatch.chdir(project.home)
    arguments[arguments.index("answers.jsonl")] = "small/answers.jsonl"
    try:
        assert main(arguments) == 1
        assert "No space left" in capsys.readouterr().err
        grown = ["mount", "-o", "remount,size=16m", str(place)]
        subprocess.run(grown, check=True)
        assert main(arguments) == 0
        assert answers(place) == answers(undisturbed("predict")[0].home)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
