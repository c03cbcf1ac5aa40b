"""A real model from a folder: single prompts, and prompts with a shared prefix."""

from pathlib import Path

import bench_prefix
import bench_single
from bench_shape import ROUNDS
from bench_subject import real_subject
from bench_timing import Part, Row


def parts(folder: Path) -> dict[str, Part]:
    """The benchmarks that take a model folder."""

    def real() -> list[Row]:
        subject = real_subject(folder)
        return [
            *bench_single.rows_of(subject, 3 * ROUNDS),
            *bench_prefix.rows_of(subject, max(ROUNDS - 1, 1)),
        ]

    return {"real": Part(real, 600)}
