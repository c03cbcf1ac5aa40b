"""Timing and memory for the benchmarks: interleaved cases, ratios of medians, peak memory."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Row = tuple[str, str, str]
"""Figure, its ratio with the range over the rounds, and what it was measured on."""


@dataclass(frozen=True)
class Part:
    """A benchmark, run by name.

    Attributes:
        run: returns its rows.
        seconds: duration on two idle cores.
        quick: the same with the smaller sizes of `--quick`; None leaves it out.
    """

    run: Callable[[], list[Row]]
    seconds: int
    quick: int | None = None


def interleaved(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case, run alternately so that a slow spell affects all; round one warms up.

    On a GPU the time between two CUDA events around the case; on a CPU the wall time, or with
    BENCH_CPU_TIME=1 the CPU time of this process.
    """
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, run in cases.items():
            taken[name].append(_seconds(run))
    return {name: seconds[1:] for name, seconds in taken.items()}


def versus(taken: dict[str, list[float]], case: str, base: str) -> str:
    """Ratio of two cases' median times, and the range of the ratios within one round."""
    paired = [one / other for one, other in zip(taken[case], taken[base], strict=True)]
    middle = seconds(taken, case) / seconds(taken, base)
    return f"{middle:.2f} ({min(paired):.2f}-{max(paired):.2f})"


def seconds(taken: dict[str, list[float]], case: str) -> float:
    """Median seconds of a case."""
    return statistics.median(taken[case])


def peak_memory(module: str, prepare: str, run: str, *, whole: bool = False) -> float:
    """Peak MB of a run in a subprocess: device memory on a GPU, else resident memory.

    Args:
        module: a benchmark beside this file.
        prepare: expression whose value the run can use as `it`.
        run: expression to measure.
        whole: count the whole process instead of what the run adds.
    """
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import bench_timing
from {module} import *
it = {prepare}
start = bench_timing.forget_peak()
{run}
print((bench_timing.peak() - {"0" if whole else "start"}) / 1e6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def forget_peak() -> int:
    """Reset the peak and return the bytes in use now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the peak
    return _resident("VmRSS:")


def peak() -> int:
    """Peak bytes in use since `forget_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _resident("VmHWM:")


def _seconds(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1000
    clock = time.process_time if os.environ.get("BENCH_CPU_TIME") == "1" else time.perf_counter
    start = clock()
    run()
    return clock() - start


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
