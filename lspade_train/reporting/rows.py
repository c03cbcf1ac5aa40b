"""Names for the model and the rows of results. Independent of figures, tables and files."""

from typing import Any


def short_model(results: dict[str, Any]) -> str:
    """The model's Hub id, or the last component of its folder's path."""
    return "/".join(results["model_id"].rstrip("/").split("/")[-2:])


def rows_measured(results: dict[str, Any]) -> str:
    """The rows that were measured: `test split`, or `validation split, held-out half`."""
    part = results.get("part", "all")
    half = "" if part == "all" else f", {part.replace('_', '-')} half"
    return f"{results['split']} split{half}"
