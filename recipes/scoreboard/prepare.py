"""Writes the rows of a task as JSONL: prompts with their choices, a seeded sample of a given size.

Every task is converted to prompts, so that size limits and disjoint splits work the same for all.
The prompts are exactly those that the task itself would render.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from lspade_train.errors import TaskError
from lspade_train.io.storage import write_text
from lspade_train.recipe import DataConfig, PromptConfig
from lspade_train.tasks import Split, load_rows
from lspade_train.tasks.base import Question, Rows
from lspade_train.tasks.prompts import fill
from lspade_train.tasks.registry import find_task
from lspade_train.tasks.rows import rename, to_questions

SPLITS: tuple[Split, ...] = get_args(Split)


def prepare(
    task: Mapping[str, Any], wanted: Mapping[str, int], data: Path, out: Path, seed: int = 0
) -> dict[str, int]:
    """Write `train.jsonl`, `validation.jsonl` and `test.jsonl`; returns the rows in each.

    Args:
        task: an entry of `tasks` in pairs.yaml.
        wanted: most rows of each part.
        data: base of relative `dataset` paths.
        out: folder to write into.
        seed: seed of the sample.
    """
    parts = {part: task["from"][part] for part in SPLITS}
    rows: dict[str, list[dict[str, Any]]] = {}
    for source in dict.fromkeys(parts.values()):
        questions = read(task["data"], source, data)
        order = np.random.default_rng(seed).permutation(len(questions)).tolist()
        # The test part first, so that it does not depend on the sizes of the others.
        for part in [one for one in reversed(SPLITS) if parts[one] == source]:
            taken, order = order[: wanted[part]], order[wanted[part] :]
            rows[part] = [as_row(task["data"], questions[i]) for i in sorted(taken)]
    for part in SPLITS:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows[part]]
        write_text(out / f"{part}.jsonl", "".join(lines), TaskError)
    return {part: len(rows[part]) for part in SPLITS}


def read(section: Mapping[str, Any], split: Split, data: Path) -> list[Question]:
    """All labelled questions of an official split."""
    labels = section.get("prompt", {}).get("labels")
    config = DataConfig(
        model_id="unused",
        task=section["task"],
        dataset=section["dataset"],
        prompt=PromptConfig(labels=labels),
    )
    if "{split}" not in section["dataset"]:
        local = data / section["dataset"]
        hub_id = "/".join(section["dataset"].split("/")[-2:])
        config = replace(config, dataset=str(local) if local.exists() else hub_id)
        questions = to_questions(config, load_rows(config, split))
    else:
        path = located(section["dataset"].format(split=split), data)
        with path.open(encoding="utf-8") as lines:  # splitlines would split at U+2028, too
            records = [json.loads(line) for line in lines]
        records = [rename(record, section.get("columns")) for record in records]
        questions = to_questions(config, Rows(split, records, None, None, "", []))
    return [question for question in questions if question.answer is not None]


def located(name: str, data: Path) -> Path:
    """A file of this project, or one in `data`."""
    return Path(name) if Path(name).exists() else data / name


def as_row(section: Mapping[str, Any], question: Question) -> dict[str, Any]:
    """A question as a row for the `jsonl` task."""
    template = section.get("prompt", {}).get("template") or find_task(section["task"]).template
    return {
        "prompt": fill(template, question.fields),
        "choices": list(question.labels),
        "answer": question.answer,
    }
