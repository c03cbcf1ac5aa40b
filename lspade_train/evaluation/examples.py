"""Rows that a policy answers unlike the full model, with the end of their prompts."""

from typing import Any

import numpy as np

from lspade_train.evaluation.readings import Readings
from lspade_train.policies.exit_table import ExitTable, Threshold, pick
from lspade_train.policies.sides import Side
from lspade_train.training.datamodule import HiddenStateDataModule

SHOWN = 8
CHARACTERS = 200
"""Of the prompt, counted from its end."""
TOKENS = 200
"""As many are decoded for them."""


def worst_disagreements(
    data: HiddenStateDataModule,
    side: Side,
    readings: Readings,
    table: ExitTable,
    threshold: Threshold | None,
    count: int = SHOWN,
) -> dict[str, Any]:
    """Of the rows that a policy answers unlike the full model, those it was surest of, as JSON.

    Args:
        data: the prompts.
        side: which rows were measured.
        readings: of the same rows, the full model's among them.
        table: what the policy answers at each of its layers, on the same rows.
        threshold: the policy's.
        count: rows that are shown.

    Returns:
        `n`, the number of such rows, and `rows`: the prompt's end, the answers of the full model
        (with its probability among the choices), of the exit (with its layer) and of the data.
    """
    never = np.full(len(table), len(table.layers))
    stops = never if threshold is None else table.exits(threshold)
    answers = pick(table.answers, table.full_answer, stops)
    differ = np.flatnonzero(answers != table.full_answer)
    sure = readings.full["confidence"].double().numpy()
    worst = differ[np.argsort(-sure[differ], kind="stable")][:count].tolist()
    prompts = side.prompts(data, worst) if worst else []

    def text(token: Any) -> str:
        decoded = data.tokenizer.decode([int(token)], clean_up_tokenization_spaces=False)
        return str(decoded).strip() or str(data.tokenizer.convert_ids_to_tokens(int(token)))

    rows = [
        {
            "prompt_end": _end(str(data.tokenizer.decode(ids[-TOKENS:]))),
            "full_model": text(table.full_answer[row]),
            "confidence": float(sure[row]),
            "exit": text(answers[row]),
            "layer": int(table.layers[stops[row]]),
            "label": text(readings.answer_id[row]) if readings.labelled[row] else None,
        }
        for row, ids in zip(worst, prompts, strict=True)
    ]
    return {"n": len(differ), "rows": rows}


def _end(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"…{text[-CHARACTERS:]}"
