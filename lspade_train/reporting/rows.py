"""How the rows that results stand on are called. Knows nothing of figures, tables or files."""

from typing import Any


def rows_measured(results: dict[str, Any]) -> str:
    """The rows that results stand on: `test split`, or `validation split, held-out half`."""
    part = results.get("part", "all")
    half = "" if part == "all" else f", {part.replace('_', '-')} half"
    return f"{results['split']} split{half}"
