"""`check`: preview a recipe on a few training rows."""

import logging
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lspade_train.cli.again import another
from lspade_train.cli.parsing import command_parser, parse
from lspade_train.io.text import byte_size, duration

if TYPE_CHECKING:
    from lspade_train.evaluation.check import Check

log = logging.getLogger(__name__)

CHECK = """\
Preview a recipe on a sample of training rows: one rendered prompt with its answer; the frozen
model's accuracy against chance and against always giving the most frequent answer; the balance of
the labels; rows that exceed the model's context; disk space and time that fit will take. Nothing
is saved. Use it to try prompts; test rows are not touched.

  lspade-train check --config recipes/arc.yaml
  lspade-train check --config reviews.yaml --data.prompt.shots 4"""

LABELS = 8
"""Most labels whose fractions are printed."""


def check(arguments: list[str]) -> None:
    """Run the model on a few rows and print the findings."""
    parser = command_parser("check", CHECK, with_trainer="--help" not in arguments)
    add = parser.add_argument
    add("--rows", type=int, default=200, help="training prompts to run the model on, at most")
    add("--seconds", type=float, default=30.0, help="time limit in seconds for running prompts")
    parsed = parse(parser, arguments)

    from lspade_train.evaluation.check import check_recipe

    options = parsed.options
    log.info("loading the model, then up to %d training prompts", options.rows)
    found = check_recipe(parsed.recipe, rows=options.rows, seconds=options.seconds)
    shown = found.shown
    answer = "" if shown.right is None else f"[[{shown.answers[shown.right]}]]"
    sys.stdout.write(f"row {shown.row + 1} of train; the right answer's token is in [[ ]]:\n\n")
    sys.stdout.write(f"{shown.prompt}{answer}\n\n")
    for name, text in _lines(found):
        sys.stdout.write(f"{name:<12}{text}\n")
    if found.baseline is not None and found.baseline.at_chance:
        log.warning(
            "Early exits are not meaningful for a model at chance. Try another prompt "
            "(--data.prompt.template, .shots, .chat) or model before fit."
        )
    else:
        log.info("next: %s", another("fit", parsed.arguments, without=parsed.own))


def _lines(found: "Check") -> Iterator[tuple[str, str]]:
    """The findings, line by line: a name and a text."""
    yield "answers", f"{_texts(found)}; the model says {found.shown.given!r}"
    yield "model", _model(found)
    if found.balance:
        shares = [f"{name!r} {share:.1%}" for name, share in list(found.balance.items())[:LABELS]]
        rest = len(found.balance) - LABELS
        yield "labels", ", ".join(shares) + (f" and {rest:,} more" if rest > 0 else "")
    for split, size in found.splits.items():
        mean = size.tokens / max(size.rows * (1 - size.over_context), 1)
        yield (
            split,
            f"{size.rows:,} rows, {mean:.0f} tokens each, {size.longest:,} at most; "
            f"{size.over_context:.1%} over the model's context",
        )
    yield (
        "disk",
        f"{byte_size(found.cache_bytes)} of cache for fit, {byte_size(found.test_bytes)} more for "
        f"test, {byte_size(found.heads_bytes)} of heads",
    )
    fit = f"{duration(found.fit_seconds)} to fit in {found.steps:,} steps"
    yield (
        "time",
        f"about {duration(found.cache_seconds)} to cache ({found.prompt_seconds:.2g} s a prompt), "
        f"{fit}; measured on {found.device} at its current load",
    )


def _texts(found: "Check") -> str:
    shown = found.shown.answers[:LABELS]
    more = len(found.shown.answers) - len(shown)
    return ", ".join(map(repr, shown)) + (f" and {more} more" if more else "") or "any token"


def _model(found: "Check") -> str:
    if found.baseline is None:
        words = f"the {found.sampled:,} sampled rows have no labels"
    else:
        words = found.baseline.verdict
    if found.on_choices is None:
        return words
    return f"{words}. {found.on_choices:.1%} of its probability falls on the choices"
