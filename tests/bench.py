"""`make bench`: every figure as a ratio against a baseline timed in the same process.

A ratio holds on any machine; the absolute times beside it are this machine's. `--json FILE` keeps
the table.
"""

import json
import sys
from pathlib import Path

import bench_loss
import bench_runtime
import torch
from rich.console import Console
from rich.table import Table


def main() -> None:
    """Run every benchmark and print one table."""
    rows = [*bench_loss.run(), *bench_runtime.run()]
    table = Table("figure", "ratio", "detail", title=f"{torch.get_num_threads()} CPU threads")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if "--json" in sys.argv:
        target = Path(sys.argv[sys.argv.index("--json") + 1])
        names = ("figure", "ratio", "detail")
        target.write_text(
            json.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=2)
        )


if __name__ == "__main__":
    main()
