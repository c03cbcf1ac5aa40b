"""What survives real signals, sent to real processes at random moments, and damaged files.

`LSPADE_KILLS=20 pytest tests/test_faults.py` sends twenty per command instead of two.
"""

import csv
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch  # noqa: F401  (the forked processes inherit what is imported here)
import pytest
import torch
import toy

from lspade_train import data, module  # noqa: F401
from lspade_train.cli import main
from lspade_train.storage import file_digest

KILLS = int(os.environ.get("LSPADE_KILLS", "2"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
HEADS = Path("checkpoints/toy")
RESUMABLE = (128 + signal.SIGTERM, -signal.SIGTERM)
"""Exit codes of SIGTERM: told, or before anything had begun."""

CONTEXT = multiprocessing.get_context("fork")


def _child(home: Path, arguments: list[str]) -> None:
    os.chdir(home)
    os.environ["WANDB_MODE"] = "disabled"
    with (home / "stderr").open("a", buffering=1) as log:
        os.dup2(log.fileno(), 2)
        sys.stderr = log
        sys.exit(main(arguments))


def started(home: Path, arguments: list[str]):
    """A real process, forked from this one so that it need not import everything again."""
    process = CONTEXT.Process(target=_child, args=(home, arguments))
    process.start()
    return process


def finished(home: Path, arguments: list[str]) -> float:
    """Run to the end; seconds that it took."""
    began = time.monotonic()
    process = started(home, arguments)
    process.join(120)
    assert process.exitcode == 0, (home / "stderr").read_text()
    return time.monotonic() - began


def stopped(home: Path, arguments: list[str], sent: signal.Signals, after: float) -> int | None:
    """The exit code of a process that was sent a signal after so many seconds."""
    process = started(home, arguments)
    time.sleep(after)
    os.kill(process.pid or 0, sent)
    process.join(120)
    return process.exitcode


@dataclass(frozen=True)
class Job:
    """One command: what it is given, what it makes, and what a kill may not cost."""

    prepare: Callable[[toy.Project], list[str]]
    made: Callable[[Path], dict[str, str]]
    kept: Callable[[Path], object]
    lost: Callable[[Path, object], object]


def digests(home: Path, *patterns: str) -> dict[str, str]:
    """Of files, by path; not of notes to oneself, such as the times of the last check."""
    found = [path for pattern in patterns for path in sorted(home.glob(pattern)) if path.is_file()]
    own = [path for path in found if not path.name.startswith(".") or path.suffix == ".tmp"]
    return {str(path.relative_to(home)): file_digest(path) for path in own}


def recipe(project: toy.Project, **changes) -> list[str]:
    """Paths in it are relative, so that the recipe recorded with the heads is the same one."""
    settings = {"data__shard_mb": 0.01, "data__tokens_per_batch": 128, "data__batch_size": 4}
    path = project.recipe(data__cache_dir="cache", trainer__max_epochs=3, **settings | changes)
    return ["--config", path.name]


def shards(home: Path) -> dict[str, int]:
    return {str(p): p.stat().st_ino for p in home.glob("cache/*/shard-*.safetensors")}


def shards_written_again(home: Path, before) -> list[str]:
    after = shards(home)
    return [path for path, node in before.items() if after.get(path) != node]


CACHE = Job(
    prepare=lambda project: ["cache", *recipe(project)],
    made=lambda home: digests(home, "cache/*/*.json", "cache/*/*.safetensors", "cache/**/*.tmp"),
    kept=shards,
    lost=shards_written_again,
)


def steps_saved(home: Path) -> int:
    path = home / HEADS / "training/last.ckpt"
    return torch.load(path, weights_only=True)["global_step"] if path.exists() else 0


def steps_taken_again(home: Path, saved) -> list[int]:
    logs = sorted((home / HEADS / "logs").glob("*/metrics.csv"), key=lambda p: p.stat().st_mtime)
    with logs[-1].open(newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row.get("train/loss/mean")]
    return [step for step in steps if step < saved]


FIT = Job(
    prepare=lambda project: ["fit", *recipe(project), "--ckpt_path", "last"],
    made=lambda home: digests(home, f"{HEADS}/*", "cache/*/*.json", "cache/*/*.safetensors"),
    kept=steps_saved,
    lost=steps_taken_again,
)


def answers(home: Path) -> list[str]:
    path = home / "answers.jsonl"
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def predict_arguments(project: toy.Project) -> list[str]:
    prompts = [json.dumps(row) for row in toy.questions(3000, seed=9)]
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
def calm(toy_root, tmp_path_factory):
    """Undisturbed runs of every command, by name: the project, what it made, the seconds."""
    places = {}
    questions = toy.write_data(tmp_path_factory.mktemp("more"), train=200, validation=30)

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


@pytest.mark.parametrize("seed", range(KILLS))
@pytest.mark.parametrize("name", JOBS)
def test_a_process_stopped_at_a_random_moment_goes_on_and_ends_with_the_same_bytes(
    calm, name, seed
):
    job, sent = JOBS[name], SIGNALS[seed % 2]
    _, made, seconds = calm(name)
    assert made
    part = random.Random(f"{name} {seed}").random()
    while True:
        project, arguments = calm.prepared(name)
        code = stopped(project.home, arguments, sent, part * seconds)
        if code != 0:
            break
        part *= 0.9  # it was done already
    log = (project.home / "stderr").read_text()
    assert code in (RESUMABLE if sent == signal.SIGTERM else (-signal.SIGKILL,)), log
    kept = job.kept(project.home)
    finished(project.home, arguments)
    assert job.made(project.home) == made
    assert not job.lost(project.home, kept)
