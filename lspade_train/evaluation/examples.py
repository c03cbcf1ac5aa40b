"""Rows where a policy's answer differs from the full model's, with the end of their prompts."""

from typing import Any

import numpy as np

from lspade_train.evaluation.readings import Readings
from lspade_train.policies.exit_table import ExitTable, Threshold, pick
from lspade_train.policies.sides import Side
from lspade_train.training.datamodule import HiddenStateDataModule

SHOWN = 8
CHARACTERS = 200
"""Characters to show of a prompt, from its end."""
TOKENS = 200
"""Tokens to decode for them."""


def worst_disagreements(
    data: HiddenStateDataModule,
    side: Side,
    readings: Readings,
    table: ExitTable,
    threshold: Threshold | None,
    count: int = SHOWN,
) -> dict[str, Any]:
    """The most confident exits whose answer differs from the full model's, as JSON.

    Args:
        data: the prompts.
        side: which rows were measured.
        readings: readings of the same rows, including the full model's.
        table: the policy's answers at each of its layers, on the same rows.
        threshold: the policy's threshold.
        count: number of rows to show.

    Returns:
        `n`, the number of such rows, and `rows`: the prompt's end, the full model's answer (with
        its probability among the choices), the exit's (with its layer) and the correct one.
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
