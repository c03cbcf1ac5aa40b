"""What the model and the rows of results are called. Knows nothing of figures, tables or files."""

from typing import Any


def short_model(results: dict[str, Any]) -> str:
    """A Hub id, or the end of a folder's path."""
    return "/".join(results["model_id"].rstrip("/").split("/")[-2:])


def rows_measured(results: dict[str, Any]) -> str:
    """The rows that results stand on: `test split`, or `validation split, held-out half`."""
    part = results.get("part", "all")
    half = "" if part == "all" else f", {part.replace('_', '-')} half"
    return f"{results['split']} split{half}"
