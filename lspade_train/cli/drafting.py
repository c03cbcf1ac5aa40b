"""`calibrate --for generate`: choose where to draft, by time on this machine."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lspade_train.cli.options import heads_given, runtime_parts
from lspade_train.cli.parsing import Parsed
from lspade_train.errors import RecipeError, TaskError

if TYPE_CHECKING:
    from lspade_train.profiling.drafting import DraftingChoice

log = logging.getLogger(__name__)

PROMPTS, SHOWN = 8, 4
"""Validation prompts that are continued; layers that are shown where none was timed."""

OTHERS = ("max_accuracy_drop", "max_disagreement", "scope", "measure", "reader", "decoder",
          "small_groups", "prompt_length")  # fmt: skip
"""Options of exits, which a lossless text has none of."""


def check_purpose(options: Any) -> None:
    """Refuse a purpose that is not known, and options of the other one.

    Raises:
        RecipeError: there is one.
    """
    purpose = options["for"]
    if purpose not in ("decide", "generate"):
        raise RecipeError(f"--for is {purpose!r}; expected decide or generate.")
    given = [name for name in OTHERS if options[name] is not None]
    given += [name for name in ("paper", "per_group", "per_depth", "plan") if options[name]]
    given += ["cost"] if options.cost != "flops" else []
    if purpose == "generate" and given:
        raise RecipeError(
            f"--{given[0]} is of exits; --for generate has none: the text is the full model's. "
            "Leave it out."
        )


def calibrate_drafting(parsed: Parsed) -> None:
    """Measure, write `drafting.json` beside the heads or remove it, and say what was found."""
    from lspade_train.io.layout import DRAFTING
    from lspade_train.profiling import prompts_of, untouched
    from lspade_train.profiling.drafting import choose_drafting

    config, options = parsed.recipe.data, parsed.options
    folder = heads_given(parsed, written_by="calibrate")
    heads, adapter, tokenizer = runtime_parts(parsed, folder)
    batch_size = 1 if options.batch_size is None else options.batch_size
    room = (adapter.max_length or 2**31) - options.new_tokens
    prompts, _ = prompts_of(config, tokenizer, adapter.max_length, lambda _: True)
    prompts = [ids for ids in prompts if len(ids) <= room]
    if not prompts:
        raise TaskError(
            f"No validation prompt leaves room for {options.new_tokens} tokens in the model's "
            f"context of {adapter.max_length}. Lower --new_tokens."
        )
    found = choose_drafting(
        adapter, untouched(config), heads, prompts[:PROMPTS],
        new_tokens=options.new_tokens, batch_size=batch_size,
    )  # fmt: skip
    _print_rows(found, options.new_tokens, batch_size)
    sys.stdout.write(f"{_verdict(found)}\n")
    if found.chosen is None:
        (folder / DRAFTING).unlink(missing_ok=True)  # of an earlier run, on another machine maybe
        return
    found.chosen.save(folder)
    log.info("drafting: %s", Path(folder) / DRAFTING)


def _print_rows(found: "DraftingChoice", new_tokens: int, batch_size: int) -> None:
    from rich.console import Console

    from lspade_train.cli.printing import WIDTH, new_table

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    table = new_table(
        "layer", "head", "drafts", "conf.", "predicts", "ceiling", "tokens per\nverif.", "speed-up",
        "slowest\nround", "same\ntext",
        title=f"{new_tokens} greedy tokens, {batch_size} at a time; model.generate: "
        f"{found.tokens_per_second:,.1f} tokens/s",
    )  # fmt: skip
    table.caption = (
        "predicts: fraction of the model's tokens that the head predicts; ceiling: speed-up in "
        "weights read if a verification of several tokens cost as much as one token"
    )
    table.columns[1].no_wrap = True
    for row in found.timed or found.rows[:SHOWN]:
        drafting = row.drafting
        table.add_row(
            f"{drafting.layer}", str(drafting.reader), f"{drafting.tokens}",
            f"{drafting.confidence:g}", f"{row.acceptance:.2f}", f"{row.ceiling:.2f}x",
            number(row.tokens_per_verification, ".2f"), number(row.speedup, ".2f"),
            number(row.slowest, ".2f"), number(row.equal, ".0%"),
        )  # fmt: skip
    console = Console()
    Console(width=max(console.width, WIDTH)).print(table)


def _verdict(found: "DraftingChoice") -> str:
    chosen = found.chosen
    if not found.timed:
        return (
            "No layer predicts enough tokens for drafting to pay, even if a verification of "
            "several tokens cost as much as one: no drafting is chosen. Use model.generate."
        )
    if chosen is None:
        return (
            "Nothing that was timed is faster than plain decoding in every round: no drafting is "
            "chosen. Use model.generate."
        )
    return (
        f"Chosen: draft at layer {chosen.layer} with {chosen.reader}, at most {chosen.tokens} "
        f"tokens per verification: {chosen.calibration['speedup']:.2f}x as fast as model.generate "
        "on these prompts and this machine.\nThe setting was selected on the same prompts. In "
        "Python: runtime.generate(prompts, n, drafting=Drafting.from_pretrained(folder))."
    )
