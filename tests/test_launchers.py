"""Multi-process runs under every launcher, and when any one process is lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import toy
from processes import (
    HEADS,
    cache_digests,
    codes,
    finished,
    free_port,
    heads_made,
    recipe,
    shards,
    slurm,
    steps_logged,
    steps_saved,
    wait_for,
)
from safetensors.torch import load_file

# Launchers


def torchrun(home: Path, arguments: list[str], *nodes: list[str]) -> str:
    """Run a command with one torchrun, or with one per node; return the output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    command = [sys.executable, "-m", "torch.distributed.run", "--local_addr", "127.0.0.1"]
    launchers = [
        subprocess.Popen(
            [*command, *node, "-m", "lspade_train", *arguments],
            cwd=home, env=environment, stderr=subprocess.PIPE, text=True,
        )
        for node in nodes
    ]  # fmt: skip
    output = "".join(launcher.communicate(timeout=120)[1] for launcher in launchers)
    assert [launcher.returncode for launcher in launchers] == [0] * len(nodes), output
    return output


def by_torchrun(home: Path, arguments: list[str]) -> str:
    one = ["--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return torchrun(home, [*arguments, "--trainer.devices", "2"], one)


def by_torchrun_on_two_nodes(home: Path, arguments: list[str]) -> str:
    meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    node = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_id", "toy", *meet]
    here = ["--trainer.num_nodes", "2", "--trainer.devices", "1"]
    return torchrun(home, [*arguments, *here], node, node)


def by_slurm(home: Path, arguments: list[str]) -> str:
    ended = codes(slurm(home, arguments))
    output = "".join((home / f"err{n}").read_text() for n in range(2))
    assert ended == [0, 0], output
    return output


@pytest.fixture(scope="module")
def alone(toy_root, tmp_path_factory):
    """A single-process fit with the global batch size of two processes; read-only."""
    project = toy.Project(toy_root, tmp_path_factory.mktemp("alone"))
    finished(project.home, ["fit", *recipe(project, data__batch_size=8)])
    return project.home


@pytest.mark.parametrize(
    "launched",
    [
        by_slurm,
        pytest.param(by_torchrun, marks=pytest.mark.slow),
        pytest.param(by_torchrun_on_two_nodes, marks=pytest.mark.slow),
    ],
)
def test_two_processes_produce_the_same_cache_and_heads_as_one(alone, project, launched):
    output = launched(project.home, ["fit", *recipe(project), "--trainer.strategy", "ddp"])
    assert output.count("train: caching 48 rows") == 1, output
    assert cache_digests(project.home) == cache_digests(alone)
    expected, heads = (
        load_file(home / HEADS / "heads.safetensors") for home in (alone, project.home)
    )
    assert heads.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(heads[name], value, rtol=0, atol=1e-6)


# A lost process

LOST = [
    "error: Another process of this run ended before its work was done.",
    "Run it again with --ckpt_path last: it resumes from the last complete epoch.",
]


@pytest.fixture(scope="module")
def undisturbed(toy_root, tmp_path_factory):
    """The output of an undisturbed two-process fit."""
    project = toy.Project(toy_root, tmp_path_factory.mktemp("undisturbed"))
    by_slurm(project.home, fit_of_two(project))
    return heads_made(project.home)


def fit_of_two(project: toy.Project) -> list[str]:
    return ["fit", *recipe(project, trainer__max_epochs=6), "--ckpt_path", "last"]


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_fit_that_loses_a_process_raises_a_clear_error_and_resumes(undisturbed, project, lost):
    arguments = fit_of_two(project)
    both = slurm(project.home, arguments)
    wait_for((project.home / HEADS / "training/last.ckpt").exists, *both)
    os.kill(both[lost].pid or 0, signal.SIGKILL)
    ended = codes(both)
    output = (project.home / f"err{1 - lost}").read_text()
    assert ended[1 - lost] == 1, output
    assert ended[lost] == -signal.SIGKILL
    assert output.splitlines()[-2:] == LOST
    assert "Traceback" not in output
    assert steps_saved(project.home) < 6 * 6
    by_slurm(project.home, arguments)
    assert heads_made(project.home) == undisturbed


# A terminated process


@pytest.fixture(scope="module")
def large(toy_root, tmp_path_factory):
    """More questions, whose cache takes a while to build."""
    return toy.write_data(tmp_path_factory.mktemp("more"), train=700, validation=4)


@pytest.fixture(scope="module")
def large_cache(toy_root, large, tmp_path_factory):
    """The output of an undisturbed single-process `cache` on them."""
    project = toy.Project(toy_root, tmp_path_factory.mktemp("large"))
    project.data = large
    finished(project.home, ["cache", *recipe(project)])
    return cache_digests(project.home)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        ("cache", "run the same command again to resume"),
        ("fit", "resume it with: lspade-train fit"),
    ],
)
def test_sigterm_ends_all_cache_processes_and_keeps_their_shards(
    large_cache, project, large, command, remedy
):
    project.data = large
    arguments = recipe(project)
    both = slurm(project.home, [command, *arguments])
    wait_for(lambda: len(shards(project.home)) > 9, *both)
    for process in both:
        process.terminate()
    assert codes(both) == [143, 143]
    output = [(project.home / f"err{n}").read_text() for n in range(2)]
    assert f"terminated; {remedy}" in output[0], output
    assert not output[1]
    kept = shards(project.home)
    assert 9 < len(kept) < len(large_cache)
    finished(project.home, ["cache", *arguments])
    assert cache_digests(project.home) == large_cache
    assert kept.items() <= shards(project.home).items()


def test_sigterm_stops_a_process_that_waits_for_another(large_cache, project, large):
    project.data = large
    first, second = slurm(project.home, ["cache", *recipe(project)])
    wait_for(lambda: len(shards(project.home)) > 9, first, second)
    os.kill(second.pid or 0, signal.SIGSTOP)
    of_first = sorted(path for path in large_cache if "train/shard-" in path)[::2]
    wait_for(lambda: all((project.home / path).exists() for path in of_first), first)
    time.sleep(0.3)
    first.terminate()
    assert codes([first]) == [143]
    os.kill(second.pid or 0, signal.SIGCONT)
    assert codes([second]) == [1]
    output = (project.home / "err1").read_text()
    assert output.startswith("error: Another process of this run ended"), output


def test_sigterm_to_one_process_ends_the_fit_for_all_after_the_same_step(project):
    both = slurm(project.home, ["fit", *recipe(project, trainer__max_epochs=2000)])
    log = project.home / HEADS / "logs/version_0/metrics.csv"
    wait_for(log.exists, *both)
    both[1].terminate()
    assert codes(both) == [143, 143]
    output = [(project.home / f"err{n}").read_text() for n in range(2)]
    *_, last_line = output[0].splitlines()
    assert last_line.startswith("terminated; resume it with: lspade-train fit --config "), output
    assert last_line.endswith(" --ckpt_path last")
    assert not output[1]
    assert steps_saved(project.home) == max(steps_logged(log)) + 1


@pytest.mark.slow
def test_slurms_requeue_signal_leaves_no_checkpoint_for_another_recipe(project):
    both = slurm(project.home, ["fit", *recipe(project, trainer__max_epochs=2000)])
    wait_for((project.home / HEADS / "training/last.ckpt").exists, *both)
    for process in both:
        os.kill(process.pid or 0, signal.SIGUSR1)
    assert codes(both) == [-signal.SIGUSR1] * 2
    assert [path.name for path in project.home.rglob("*.ckpt")] == ["last.ckpt"]


# Lightning's own launcher, which starts and monitors the second process


@contextmanager
def by_lightning(home: Path, arguments: list[str]) -> Generator[subprocess.Popen]:
    """The first of two processes."""
    with (home / "output").open("w") as output:
        first = subprocess.Popen(
            [sys.executable, "-m", "lspade_train", *arguments, "--trainer.devices", "2"],
            cwd=home, stdout=output, stderr=output,
            env={**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            yield first
        finally:
            first.kill()
            first.wait()


def second_of(first: subprocess.Popen) -> int:
    """The process that Lightning started beside the first one (Linux)."""
    return int(Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()[0])


def has_ended(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["first", "second"])
def test_a_process_that_loses_its_peer_also_exits(project, lost):
    arguments = ["fit", *recipe(project, trainer__max_epochs=2000)]
    with by_lightning(project.home, arguments) as first:
        wait_for((project.home / HEADS / "training/last.ckpt").exists)
        second = second_of(first)
        os.kill(first.pid if lost == "first" else second, signal.SIGKILL)
        assert first.wait(60) == (-signal.SIGKILL if lost == "first" else 1)
        wait_for(lambda: has_ended(second))
    assert (project.home / "output").read_text().splitlines()[-2:] == LOST


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "phase"), [("cache", "caching"), ("fit", "caching"), ("fit", "training")]
)
def test_sigterm_to_the_first_process_reaches_the_one_it_started(project, large, command, phase):
    project.data = large
    arguments = [command, *recipe(project, trainer__max_epochs=2000)]
    begun = {
        "caching": lambda: len(shards(project.home)) > 9,
        "training": (project.home / HEADS / "training/last.ckpt").exists,
    }
    with by_lightning(project.home, arguments) as first:
        wait_for(begun[phase])
        second = second_of(first)
        first.terminate()
        assert first.wait(20) == 143
        wait_for(lambda: has_ended(second))
    output = (project.home / "output").read_text()
    assert output.count("terminated; ") == 1, output
    assert "error" not in output
    assert "Traceback" not in output
