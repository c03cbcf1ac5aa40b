"""Wall time and peak memory of one call, on the CPU or an accelerator."""

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

CPU_INFO = Path("/proc/cpuinfo")
SMAPS_RESET = Path("/proc/self/clear_refs")


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, including the device's pending work."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_mb(run: Callable[[], object], device: torch.device) -> float | None:
    """Peak memory in MB during one run, above the memory in use before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    if device.type != "cpu" or not SMAPS_RESET.exists():
        return None
    try:
        SMAPS_RESET.write_text("5")  # Linux: reset the peak
    except OSError:
        return None
    before = _resident("VmRSS:")
    run()
    return max(_resident("VmHWM:") - before, 0.0)


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def hardware(device: torch.device) -> str:
    """The accelerator's name, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    named = [line for line in _lines(CPU_INFO) if line.startswith("model name")]
    return named[0].split(":", 1)[1].strip() if named else platform.machine()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the CPU and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
