"""Five test questions of one to three hops for `predict`, and its answers as a table.

`five.py ask | lspade-train predict ... | five.py show FOLDER`; see the Makefile.
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ASKED = (
    ("yes_no", "hops: 1"),
    ("multiple_choice", "hops: 1"),
    ("multiple_choice", "hops: 2"),
    ("yes_no", "hops: 3"),
    ("multiple_choice", "hops: 3"),
)
TEST = Path(__file__).parent / "data/test.jsonl"
FILES = {
    "heads": "heads.safetensors",
    "policy": "policy.json",
    "figure": "figures/accuracy_by_layer.png",
    "report": "report.html",
    "model card": "README.md",
}


def questions() -> list[dict[str, Any]]:
    """The first test question of each kind and number of hops in `ASKED`."""
    with TEST.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [next(row for row in rows if (row["kind"], row["group"]) == wanted) for wanted in ASKED]


def show(folder: Path, lines: list[str]) -> None:
    """Print the answers, and where everything is."""
    table = Table("hops", "question", "answer", "right answer", "left at layer", "entropy (nats)")
    for row, line in zip(questions(), lines, strict=True):
        answer = json.loads(line)
        asked = row["prompt"].splitlines()[-1]
        table.add_row(
            row["group"].removeprefix("hops: "), asked, answer["text"], row["answer"],
            str(answer["layer"]), f"{answer['entropy']:.3f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    for what, name in FILES.items():
        console.print(f"{what:<11} {folder / name}", highlight=False, soft_wrap=True)


def main() -> None:
    """`ask` prints the questions as JSONL; `show FOLDER` reads their answers."""
    if sys.argv[1:2] == ["ask"]:
        print(*map(json.dumps, questions()), sep="\n")  # noqa: T201
    else:
        show(Path(sys.argv[2]), sys.stdin.read().splitlines())


if __name__ == "__main__":
    main()
