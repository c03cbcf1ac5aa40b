"""`inspect`: one prompt, layer by layer, in the terminal and as HTML."""

import logging
import sys
from pathlib import Path
from typing import Any

from lspade_train.cli.options import heads_option
from lspade_train.cli.parsing import command_parser, parse
from lspade_train.probes.lenses import L_SPADE, LENSES, HeadsSource, Lens, find_lens

log = logging.getLogger(__name__)

INSPECT = """\
What every layer would answer, for one prompt: a table of layer x position, and one of layer x
likeliest tokens at the answer position, coloured by entropy. --choices also scores labels of your
own against each other, layer by layer. The prompt is taken as it is, without a template.

  lspade-train inspect "The capital of France is" --config recipes/arc.yaml --lens logit_lens
  lspade-train inspect "Is iron a metal? Answer:" --config arc --lens spade --choices yes,no
  lspade-train inspect --config recipes/arc.yaml --html view.html < prompt.txt

"""


def inspect(arguments: list[str]) -> None:
    """Show one prompt through one lens."""
    parser = command_parser("inspect", INSPECT + _about_heads())
    parser.usage = 'lspade-train inspect ["PROMPT"] --config RECIPE.yaml [--dotted.key VALUE ...]'
    add = parser.add_argument
    add("prompt", type=str, nargs="?", help="the prompt; - or none: standard input")
    add("--lens", type=str, default=L_SPADE.key, help=f"one of {', '.join(LENSES)}")
    heads_option(parser)
    add("--last", type=int, default=64, help="positions, counted from the prompt's end")
    add("--top_k", type=int, default=5, help="tokens listed per cell")
    add(
        "--choices",
        type=str | None,
        default=None,
        help="labels, separated by commas: their probabilities among each other by layer; those of "
        "several tokens at the first in which they differ",
    )
    add("--html", type=str, default=None, help="also write one self-contained HTML file here")
    parsed = parse(parser, arguments)
    options, data = parsed.options, parsed.recipe.data
    lens, prompt = find_lens(options.lens), _prompt(options.prompt)

    from rich.console import Console

    from lspade_train.inspection import inspect_prompt, render_html, render_terminal
    from lspade_train.models.open import open_model
    from lspade_train.runtime.batching import encode

    heads = None if lens.heads is None else _heads(parsed, lens, lens.heads)
    adapter, tokenizer = open_model(data)
    labels = options.choices and [label.strip() for label in options.choices.split(",")]
    [query] = encode([prompt], labels, adapter, tokenizer)
    layers = range(adapter.num_layers) if heads is None else heads.bind(adapter).layers
    view = inspect_prompt(
        adapter, tokenizer, query.ids, lens, layers,
        heads=heads, last=options.last, top_k=options.top_k, positions=data.positions,
        choices=_scored(query),
    )  # fmt: skip
    render_terminal(view, Console())
    if options.html:
        log.info("view: %s", render_html(view, Path(options.html), model=data.model_id))


def _about_heads() -> str:
    """Which lenses need heads."""
    with_heads = " and ".join(lens.key for lens in LENSES.values() if lens.heads)
    without = " and ".join(_without_heads())
    return f"{without} work without heads; {with_heads} need heads (--heads)."


def _scored(query: Any) -> dict[str, int] | None:
    """Label -> token; labels that continue with the same token are grouped."""
    if query.fork is None:
        return None
    return {" or ".join(labels): token for token, labels in query.fork.options.items()}


def _without_heads() -> list[str]:
    return [lens.key for lens in LENSES.values() if lens.heads is None]


def _prompt(given: str | None) -> str:
    from lspade_train.errors import TaskError
    from lspade_train.io.text import lines_of, require_text

    if given in (None, "-"):
        buffer = getattr(sys.stdin, "buffer", None)
        given = (sys.stdin if buffer is None else lines_of(buffer)).read().rstrip("\n")
    prompt = given or ""
    try:
        require_text(prompt)
    except ValueError as cause:
        raise TaskError(f"The prompt {cause}. Give it as UTF-8.") from cause
    if not prompt.strip():
        raise TaskError(
            'No prompt; expected text. Give one with lspade-train inspect "PROMPT" --config '
            "RECIPE.yaml, or on standard input."
        )
    return prompt


def _heads(parsed: Any, lens: Lens, source: HeadsSource) -> Any:
    """The heads that a lens uses; loaded before the model, which takes longer."""
    from lspade_train.errors import ArtifactError
    from lspade_train.io.remote import is_remote
    from lspade_train.probes.heads import LSpadeHeads
    from lspade_train.recipe import heads_folder

    given = parsed.options.heads
    if given and is_remote(given):
        return LSpadeHeads.from_pretrained(f"{given}/{source.folder}".removesuffix("/."))
    folder = (Path(given) if given else heads_folder(parsed.recipe)) / source.folder
    if not folder.is_dir() and (source.folder != "." or not given):
        raise ArtifactError(
            f"No heads for {lens.key} in {folder}. Fit them (lspade-train fit --config RECIPE.yaml "
            f"--model.target {source.target}),\nor use a lens that needs none: --lens "
            f"{' or '.join(_without_heads())}."
        )
    return LSpadeHeads.from_pretrained(folder)
