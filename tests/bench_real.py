"""A real model from a folder: single prompts, and prompts with a shared prefix."""

from functools import partial
from pathlib import Path

import bench_prefix
import bench_single
from bench_shape import ROUNDS
from bench_subject import real_subject
from bench_timing import Part, Row


def single(folder: Path) -> list[Row]:
    """No exit and exits half-way, on prompts of several lengths."""
    return bench_single.rows_of(real_subject(folder), 3 * ROUNDS)


def prefix(folder: Path) -> list[Row]:
    """The same prompts with and without sharing their prefix."""
    return bench_prefix.rows_of(real_subject(folder), max(ROUNDS - 1, 1))


def parts(folder: Path) -> dict[str, Part]:
    """The benchmarks that take a model folder."""
    return {
        "real": Part(partial(single, folder), 120),
        "real-prefix": Part(partial(prefix, folder), 480),
    }
