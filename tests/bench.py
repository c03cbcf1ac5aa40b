"""`make bench`: every figure is a ratio to a baseline timed alternately in the same process.

Ratios carry over to other machines; the absolute times beside them are this machine's, and the
range in brackets is over the rounds. With a GPU the same parts run on it, at Llama-7B size in bf16.
Name parts to run only those (`python tests/bench.py extraction fit`); `--quick` uses smaller sizes
and takes under two minutes; `--model FOLDER` adds a real model (in `--dtype`); `--json FILE` saves
the table.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench_timing import Part


def main() -> None:
    """Run the selected benchmarks (default: all) and print each as it finishes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="names; all of them by default")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, under two minutes")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a real model to time, too")
    parser.add_argument(
        "--dtype", default="bfloat16", help="the real model's; float32 on a CPU that emulates bf16"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="time the processor's work, where others work, too"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    asked = parser.parse_args()
    if asked.quick:
        os.environ["BENCH_QUICK"] = "1"  # before the sizes are read, in subprocesses too
    if asked.cpu_time:
        os.environ["BENCH_CPU_TIME"] = "1"
    os.environ["BENCH_MODEL_DTYPE"] = asked.dtype
    known = parts_of(asked.model)
    if unknown := set(asked.parts) - set(known):
        parser.error(f"no part {', '.join(sorted(unknown))}; expected some of {', '.join(known)}")
    names = asked.parts or [n for n, part in known.items() if not asked.quick or part.quick]
    run({name: known[name] for name in names}, asked.quick, asked.json)


def parts_of(folder: Path | None) -> "dict[str, Part]":
    """All parts by name; those with optional dependencies only where these are installed."""
    import bench_cache
    import bench_fit
    import bench_lens
    import bench_loss
    import bench_online
    import bench_prefix
    import bench_real
    import bench_runtime
    import bench_single

    modules = (
        bench_cache, bench_online, bench_prefix, bench_fit, bench_loss, bench_runtime, bench_single
    )  # fmt: skip
    found = {name: part for module in modules for name, part in module.PARTS.items()}
    return found | bench_lens.parts(folder) | (bench_real.parts(folder) if folder else {})


def run(parts: "dict[str, Part]", quick: bool, file: Path | None) -> None:
    """Run the parts one after another; print and store each as it finishes."""
    import torch
    from rich.console import Console

    where = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "quick": quick,
        "clock": "CPU time" if os.environ.get("BENCH_CPU_TIME") else "wall time",
    }
    show = Console(highlight=False).print
    expected = {n: (quick and part.quick) or part.seconds for n, part in parts.items()}
    total = sum(expected.values())
    show("{device}, {threads} threads, torch {torch}, {clock}".format(**where))
    show(f"{len(parts)} parts, about {total // 60} min {total % 60} s on two idle cores")
    if quick:
        show("Smaller sizes: goals are those of the full run.")
    rows: list[dict[str, str]] = []
    for name, part in parts.items():
        show(f"\n[bold]{name}[/bold] (about {expected[name]} s)")
        start = time.perf_counter()
        for figure, ratio, detail in part.run():
            show(f"  {ratio:<20} {figure}\n  {'':<20} [dim]{detail}[/dim]")
            rows.append({"part": name, "figure": figure, "ratio": ratio, "detail": detail})
        show(f"  took {time.perf_counter() - start:.0f} s")
        if file:
            file.write_text(json.dumps(where | {"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
