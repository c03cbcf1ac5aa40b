"""Identifies the prompts of a split."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from lspade_train.recipe import DataConfig
from lspade_train.tasks.base import Rows
from lspade_train.tasks.encoding import render
from lspade_train.tasks.registry import find_task
from lspade_train.tasks.rows import records_digest


def identity(config: DataConfig, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Everything that determines the prompts of a split, as flat JSON.

    A local data set is identified by its rows, not by its path. The rendered prompts are included,
    since a chat template may use the current date, which only the text reveals. The tokenizer has a
    separate digest.

    Args:
        config: the recipe's data section.
        rows: a split loaded with it.
        tokenizer: the model's tokenizer, for its chat template and the tokens of the answers.

    Raises:
        TaskError: the rows cannot be rendered.
    """
    task = find_task(config.task)
    common: dict[str, Any] = {
        "task": task.name,
        "dataset": rows.dataset,
        "dataset_revision": rows.revision,
        "subset": config.subset or task.subset,
        "split": rows.split,
        "rows": len(rows.records),
        "rows_digest": rows.digest,
        "limit": config.limit,
    }
    if task.to_question is None:
        text = config.text
        return common | {
            "text_column": text.column,
            "text_length": text.length,
            "text_first_position": text.first_position,
            "text_positions_per_sequence": text.positions_per_sequence,
        }
    prompt = config.prompt
    return common | {
        "overlong": config.overlong,
        "template": prompt.template or task.template,
        "labels": list(prompt.labels or task.labels) or None,
        "shots": prompt.shots,
        "shots_digest": records_digest(rows.shots) if rows.shots else None,
        "chat": prompt.chat,
        "chat_template": prompt.chat_template,
        "system": prompt.system,
        "answer_prefix": prompt.answer_prefix,
        "rendered_prompts": render(config, rows, tokenizer).digest,
    }
