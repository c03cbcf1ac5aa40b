"""`make bench`: every figure as a ratio against a baseline timed in the same process.

A ratio holds on any machine; the absolute times beside it are this machine's. Parts can be named
(`python tests/bench.py extraction fit`); `--json FILE` keeps the table.
"""

import argparse
import json
from pathlib import Path

import bench_cache
import bench_fit
import bench_loss
import bench_runtime
import torch
from rich.console import Console
from rich.table import Table

PARTS = {
    **bench_cache.PARTS,
    **bench_fit.PARTS,
    "loss": bench_loss.run,
    "runtime": bench_runtime.run,
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
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    table = Table("figure", "ratio", "detail", title=f"{where}, {torch.get_num_threads()} threads")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if asked.json:
        names = ("figure", "ratio", "detail")
        found = [dict(zip(names, row, strict=True)) for row in rows]
        asked.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
