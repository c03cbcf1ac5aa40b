"""`init`: writes a commented recipe for the user's own data, based on a sample of its rows."""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lspade_train.recipe import DataConfig
    from lspade_train.tasks.survey import Survey

INIT = """\
Look at your own data and write a recipe for it: the kind of task, the columns, the answers and
their balance, the splits. Nothing is run and nothing is overwritten; edit the file as you like.
FILE is JSONL, CSV, TSV or plain text, or a folder of train.jsonl, validation.jsonl and test.jsonl.

  lspade-train init reviews.jsonl --model_id Qwen/Qwen3-0.6B
  lspade-train fit --config reviews.yaml"""


def init(arguments: list[str]) -> int:
    """Write a recipe; returns 0."""
    parser = argparse.ArgumentParser(
        prog="lspade-train init",
        usage="lspade-train init FILE --model_id MODEL [--output RECIPE.yaml]",
        description=INIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", help="JSONL, CSV, TSV or text file, or a folder of them")
    parser.add_argument("--model_id", required=True, help="Hub id or folder of the frozen model")
    parser.add_argument("--output", help="recipe to write; default: FILE's name with .yaml")
    given = parser.parse_args(arguments)

    from lspade_train.errors import RecipeError
    from lspade_train.io.storage import write_text

    name = re.sub(r"[^\w-]+", "-", Path(given.file).stem).strip("-") or "recipe"
    output = Path(given.output or f"{name}.yaml").expanduser()
    if output.exists():
        raise RecipeError(
            f"{output} already exists and is not overwritten. Choose another file with --output."
        )
    recipe, config = describe_data(given.file, given.model_id, name)
    warning = _answers_that_are_not_tokens(config)
    write_text(output, recipe, RecipeError)
    told = [line.removeprefix("# ") for line in recipe.splitlines() if line.startswith("# ")]
    sys.stderr.write("\n".join(told) + f"\nrecipe: {output}\n")
    sys.stderr.write(warning or f"next:   lspade-train fit --config {output}\n")
    return 0


def _answers_that_are_not_tokens(config: "DataConfig") -> str | None:
    """What to change first, if the model is local and its tokenizer splits an answer."""
    if config.task == "text" or not Path(config.model_id).is_dir():
        return None
    from lspade_train.errors import TaskError
    from lspade_train.models.tokenizer import load_tokenizer
    from lspade_train.tasks import load_rows
    from lspade_train.tasks.encoding import render

    try:
        render(config, load_rows(config, "train"), load_tokenizer(config.model_id))
    except TaskError as error:
        return f"first:  {error}\n"
    return None


def describe_data(dataset: str, model_id: str, name: str) -> "tuple[str, DataConfig]":
    """The text of a recipe for a data set, and its data section.

    Raises:
        TaskError: the data cannot be read, or a row does not have the format of the others.
    """
    from lspade_train import tasks
    from lspade_train.recipe import DataConfig, PromptConfig, TextConfig
    from lspade_train.tasks.sources import open_source
    from lspade_train.tasks.survey import survey

    source = open_source(dataset, None, None, _readers(), lambda row: row)
    split = next(iter(source.splits), "train")
    found = survey(source.splits[split]() if source.splits else [])
    config = DataConfig(
        model_id=model_id,
        task=found.task,
        dataset=dataset,
        columns=found.columns or None,
        text=TextConfig(column=found.asks if found.task == "text" else "text"),
        prompt=PromptConfig(template=found.template, labels=list(found.labels) or None),
    )
    rows = {split: len(tasks.load_rows(config, split).records) for split in tasks.splits(config)}
    cut = len(source.splits) < len(rows)
    lines = [*_header(dataset, found, rows), *_body(name, config, found, rows, cut)]
    return "\n".join(lines) + "\n", config


def _readers() -> dict[str, Any]:
    """Readers that return every row unchanged."""
    from functools import partial

    from lspade_train.tasks.files import read_csv, read_jsonl, read_paragraphs

    as_it_is = {"adapt": lambda row: row}
    tables = dict.fromkeys((".csv", ".tsv"), partial(read_csv, **as_it_is))
    text = partial(read_paragraphs, column="text", **as_it_is)
    return {".jsonl": partial(read_jsonl, **as_it_is), **tables, ".txt": text}


def _header(dataset: str, found: "Survey", rows: dict[str, int]) -> Iterator[str]:
    total = sum(rows.values())
    counted = ", ".join(f"{count:,} {split}" for split, count in rows.items())
    yield f"# {total:,} rows of {dataset}: {counted}. Costs: see the size that fit prints first."
    if found.task == "text":
        yield f"# No answers: next-token heads from the running text under {found.asks!r}."
    elif found.listed:
        yield f"# Questions under {found.asks!r}, each with its own choices."
    elif found.labels:
        yield f"# Texts under {found.asks!r}, answered by one of {len(found.labels)} labels."
    else:
        yield f"# Prompts under {found.asks!r} with free answers, each of which must be one token."
    if found.balance:
        labelled = sum(found.balance.values())
        most_common = list(found.balance.items())[:8]
        # Escaped, so that a line break in an answer does not end the comment.
        names = [json.dumps(name, ensure_ascii=False)[1:-1] for name, _ in most_common]
        shares = [
            f"{name} {n / labelled:.1%}" for name, (_, n) in zip(names, most_common, strict=True)
        ]
        more = f" and {len(found.balance) - 8} more" if len(found.balance) > 8 else ""
        most = max(found.balance.values()) / labelled
        yield f"# Answers: {', '.join(shares)}{more} (majority baseline {most:.1%})."


def _body(
    name: str, config: "DataConfig", found: "Survey", rows: dict[str, int], cut: bool
) -> Iterator[str]:
    yield from (f"name: {json.dumps(name)}", "data:")
    yield f"  model_id: {json.dumps(config.model_id)}"
    yield f"  task: {config.task}"
    yield f"  dataset: {json.dumps(config.dataset)}"
    if found.columns:
        yield "  # The task's names for your columns."
        yield f"  columns: {json.dumps(found.columns)}"
    if cut:
        yield "  # Splits that the data lacks, cut by a hash of each row: new rows move no others."
        for split in ("validation", "test"):
            if split in rows:
                yield f"  {split}_fraction: {getattr(config, f'{split}_fraction')}"
    if found.task == "text":
        yield f"  text: {{column: {json.dumps(found.asks)}}}"
    else:
        yield from _prompt(config, found)
    if found.listed or found.labels:
        # As a trailing comment: comments on lines of their own are printed.
        yield (
            "model: {target: both, scope: choices}  # L-SPADE heads and a tuned lens, over the "
            "answers only: minutes where the vocabulary takes hours"
        )
    yield "trainer: {max_epochs: 20}"


def _prompt(config: "DataConfig", found: "Survey") -> Iterator[str]:
    yield "  prompt:"
    yield "    # Wording matters more than anything else here: try several."
    own = json.dumps(config.prompt.template, ensure_ascii=False)
    yield f"    {'# ' if config.prompt.template is None else ''}template: {own}"
    if found.labels:
        yield "    # Decided at their first tokens; an integer answer counts them from 0."
        yield f"    labels: {_texts(found.labels)}"
    yield "    # chat: true  # for an instruction-tuned model: its chat format"
    yield "    # shots: 4  # solved examples in front of every prompt"


def _texts(values: Sequence[str]) -> str:
    return json.dumps(list(values), ensure_ascii=False)
