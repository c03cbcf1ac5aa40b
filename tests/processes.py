"""Real processes that run commands, forked from this one so that they skip the imports."""

import csv
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import lightning.pytorch  # noqa: F401  (forked processes inherit these imports)
import torch
import toy

from lspade_train.cli import main
from lspade_train.io.storage import file_digest
from lspade_train.training import datamodule, module  # noqa: F401

HEADS = Path("checkpoints/toy")
CONTEXT = multiprocessing.get_context("fork")


def _child(home: Path, arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.chdir(home)
    os.environ |= {"WANDB_MODE": "disabled"} | environment
    with (home / log).open("a", buffering=1) as file:
        sys.stderr = file
        logging.getLogger().handlers.clear()  # inherited from pytest
        sys.exit(main(arguments))


def started(
    home: Path, arguments: list[str], log: str = "stderr", environment: dict[str, str] | None = None
) -> BaseProcess:
    """Start a process that runs a command in `home`; its output goes to `log` there."""
    (home / log).touch()  # the process may be stopped before it opens the file
    process = CONTEXT.Process(
        target=_child, args=(home, arguments, log, environment or {}), daemon=True
    )
    process.start()
    return process


def finished(home: Path, arguments: list[str]) -> float:
    """Run to completion; return the seconds it took."""
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


def wait_for(what: Callable[[], object], *processes: BaseProcess) -> None:
    """Wait until a condition holds that only running processes can bring about."""
    give_up = time.monotonic() + 60
    while not what():
        assert all(process.is_alive() for process in processes), "a process ended too early"
        assert time.monotonic() < give_up
        time.sleep(0.002)


def slurm(home: Path, arguments: list[str]) -> list[BaseProcess]:
    """Two tasks of one job on one node, with the environment srun gives them; logs err0, err1."""
    job = {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "2", "SLURM_NNODES": "1",
        "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    asked = [*arguments, "--trainer.devices", "2"]
    return [
        started(home, asked, f"err{n}", job | {"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)})
        for n in range(2)
    ]


def codes(processes: list[BaseProcess]) -> list[int | None]:
    """The processes' exit codes, once they have ended."""
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def free_port() -> int:
    """A loopback port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def recipe(project: toy.Project, **changes) -> list[str]:
    """Write a recipe with relative paths, so that heads anywhere record the same one."""
    settings = {
        "data__cache_dir": "cache", "data__shard_mb": 0.01, "data__tokens_per_batch": 128,
        "data__batch_size": 4, "trainer__max_epochs": 3, "trainer__log_every_n_steps": 1,
    }  # fmt: skip
    path = project.recipe(**settings | changes)
    return ["--config", path.name]


def digests(home: Path, *patterns: str) -> dict[str, str]:
    """Digests of files, by path; bookkeeping such as the times of the last check is left out."""
    found = [path for pattern in patterns for path in sorted(home.glob(pattern)) if path.is_file()]
    own = [path for path in found if not path.name.startswith(".") or path.suffix == ".tmp"]
    return {str(path.relative_to(home)): file_digest(path) for path in own}


def heads_made(home: Path) -> dict[str, str]:
    """Digests of the heads' files, without durations and other values that vary between runs."""
    found = digests(home, f"{HEADS}/*")
    for name in ("config.json", "README.md"):
        del found[f"{HEADS}/{name}"]
    settings = json.loads((home / HEADS / "config.json").read_text())
    for name in ("source", "seconds"):
        del settings["training"][name]
    return found | {"config.json": json.dumps(settings)}


def cache_digests(home: Path) -> dict[str, str]:
    """Digests of the caches in `home`."""
    return digests(home, "cache/*/*.json", "cache/*/*.safetensors", "cache/**/*.tmp")


def shards(home: Path) -> dict[str, int]:
    """The complete shards: path and inode."""
    return {str(p): p.stat().st_ino for p in home.glob("cache/*/shard-*.safetensors")}


def steps_saved(home: Path) -> int:
    """Number of steps in the last checkpoint."""
    path = home / HEADS / "training/last.ckpt"
    return torch.load(path, weights_only=True)["global_step"] if path.exists() else 0


def steps_logged(log: Path) -> list[int]:
    """Number of steps whose loss was logged."""
    with log.open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row.get("train/loss/mean")]
