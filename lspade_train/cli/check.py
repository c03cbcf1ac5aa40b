"""`check`: a recipe before it costs anything."""

import logging
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lspade_train.cli.parsing import command_parser, parse

if TYPE_CHECKING:
    from lspade_train.evaluation.check import Check

log = logging.getLogger(__name__)

CHECK = """\
Look at a recipe before it costs anything, on a sample of training rows: one prompt as the model
reads it, with its answer; the frozen model's accuracy against chance and the most frequent answer;
the balance of the labels; rows over the context; disk and time that fit will take. Trains nothing
that is kept, and writes nothing. Try prompts with it: never on test rows, which it does not use.

  lspade-train check --config recipes/arc.yaml
  lspade-train check --config reviews.yaml --data.prompt.shots 4"""

LABELS = 8
"""Labels whose shares are printed."""


def check(arguments: list[str]) -> None:
    """Run the model on a few rows and print what was seen."""
    parser = command_parser("check", CHECK, with_trainer="--help" not in arguments)
    add = parser.add_argument
    add("--rows", type=int, default=200, help="training prompts to run the model on, at most")
    add("--seconds", type=float, default=30.0, help="no further prompts are run after so long")
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
            "Try another prompt (--data.prompt.template, .shots, .chat) or model before fit: exits "
            "of a model that guesses mean nothing."
        )
    else:
        log.info("next: lspade-train fit --config %s", parsed.recipes[-1])


def _lines(found: "Check") -> Iterator[tuple[str, str]]:
    """What was seen, line by line: a name and a text."""
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
        f"{_size(found.cache_bytes)} of cache for fit, {_size(found.test_bytes)} more for test, "
        f"{_size(found.heads_bytes)} of heads",
    )
    fit = "until you stop it (trainer.max_epochs and max_steps are off)"
    if found.fit_seconds is not None:
        fit = f"{_duration(found.fit_seconds)} to fit in {found.steps:,} steps"
    yield (
        "time",
        f"about {_duration(found.cache_seconds)} to cache ({found.prompt_seconds:.2g} s a prompt), "
        f"{fit}; on {found.device}, as busy as it was",
    )


def _texts(found: "Check") -> str:
    shown = found.shown.answers[:LABELS]
    more = len(found.shown.answers) - len(shown)
    return ", ".join(map(repr, shown)) + (f" and {more} more" if more else "") or "any token"


def _model(found: "Check") -> str:
    if found.baseline is None:
        words = f"no right answers in {found.sampled:,} sampled rows"
    else:
        words = found.baseline.verdict
    if found.on_choices is None:
        return words
    return f"{words}. {found.on_choices:.1%} of its probability falls on the choices"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
