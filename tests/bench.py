"""`make bench`: every figure as a ratio against a baseline timed in the same process.

A ratio holds on any machine; the absolute times beside it are this machine's. On a GPU the same
parts run there, at the size of Llama-7B in bf16. Parts can be named
(`python tests/bench.py extraction fit`); `--json FILE` keeps the table.
"""

import argparse
import json
from pathlib import Path

import bench_cache
import bench_fit
import bench_loss
import bench_online
import bench_runtime
import torch
from rich.console import Console
from rich.table import Table

PARTS = {
    **bench_cache.PARTS,
    **bench_online.PARTS,
    **bench_fit.PARTS,
    **bench_loss.PARTS,
    **bench_runtime.PARTS,
}


def main() -> None:
    """Run the asked benchmarks, all by default, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    asked = parser.parse_args()
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; expected some of {', '.join(PARTS)}")
    rows = [row for part in asked.parts or PARTS for row in PARTS[part]()]
    where = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    names = ("figure", "ratio", "detail")
    table = Table(*names, title="{device}, {threads} threads, torch {torch}".format(**where))
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if asked.json:
        found = [dict(zip(names, row, strict=True)) for row in rows]
        asked.json.write_text(json.dumps(where | {"rows": found}, indent=2))


if __name__ == "__main__":
    main()
