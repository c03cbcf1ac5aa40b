"""`inspect`: one prompt, layer by layer, in the terminal and as HTML."""

import logging
import sys
from pathlib import Path
from typing import Any

from lspade_train.cli.options import heads_option
from lspade_train.cli.parsing import command_parser, parse

log = logging.getLogger(__name__)

INSPECT = """\
What every layer would answer, for one prompt: a table of layer x position and one of layer x
likeliest tokens at the answer position, coloured by entropy. The prompt is read as it stands.

  lspade-train inspect "The capital of France is" --config recipes/arc.yaml --lens logit_lens
  lspade-train inspect --config recipes/arc.yaml --html view.html < prompt.txt

logit_lens and spade need no heads; l_spade and tuned_lens read those of --heads."""

TRAINED = {"l_spade": ("spade", "."), "tuned_lens": ("final", "tuned_lens")}
UNTRAINED = ("logit_lens", "spade")


def inspect(arguments: list[str]) -> None:
    """Show one prompt through one lens."""
    parser = command_parser("inspect", INSPECT)
    parser.usage = 'lspade-train inspect ["PROMPT"] --config RECIPE.yaml [--dotted.key VALUE ...]'
    add = parser.add_argument
    add("prompt", type=str, nargs="?", help="the prompt; - or none: standard input")
    add("--lens", type=str, default="l_spade", help="logit_lens, tuned_lens, l_spade or spade")
    heads_option(parser)
    add("--last", type=int, default=64, help="positions, counted from the prompt's end")
    add("--top_k", type=int, default=5, help="tokens listed per cell")
    add("--html", type=str, default=None, help="also write one self-contained HTML file here")
    parsed = parse(parser, arguments)

    from rich.console import Console

    from lspade_train.inspection import inspect_prompt, render_html, render_terminal
    from lspade_train.models import ModelAdapter
    from lspade_train.models.tokenizer import load_tokenizer
    from lspade_train.runtime.batching import encode

    options, data = parsed.options, parsed.recipe.data
    heads = _heads(parsed)
    prompt = _prompt(options.prompt)
    adapter = ModelAdapter.from_pretrained(
        data.model_id,
        revision=data.revision,
        dtype=data.dtype,
        device=data.device,
        device_map=data.device_map,
        quantization=data.quantization,
        trust_remote_code=data.trust_remote_code,
        gguf_file=data.gguf_file,
    )
    tokenizer = load_tokenizer(
        data.model_id,
        revision=data.revision,
        trust_remote_code=data.trust_remote_code,
        gguf_file=data.gguf_file,
    )
    [query] = encode([prompt], None, adapter, tokenizer)
    lens, layers = _lens(options.lens, heads, adapter)
    view = inspect_prompt(
        adapter, tokenizer, query.ids, lens, layers,
        last=options.last, top_k=options.top_k, positions=data.positions,
    )  # fmt: skip
    render_terminal(view, Console())
    if options.html:
        log.info("view: %s", render_html(view, Path(options.html), model=data.model_id))


def _prompt(given: str | None) -> str:
    from lspade_train.errors import TaskError

    prompt = sys.stdin.read().rstrip("\n") if given in (None, "-") else given
    if not prompt.strip():
        raise TaskError(
            'No prompt; expected text. Give it as lspade-train inspect "PROMPT" --config '
            "RECIPE.yaml, or on standard input."
        )
    return prompt


def _heads(parsed: Any) -> Any:
    """The heads that the asked lens reads; None for a lens without any. Read before the model."""
    from lspade_train.artifacts.folder import heads_folder
    from lspade_train.errors import ArtifactError, RecipeError
    from lspade_train.io.remote import is_remote
    from lspade_train.probes.heads import LSpadeHeads

    lens = parsed.options.lens
    if lens in UNTRAINED:
        return None
    if lens not in TRAINED:
        known = ", ".join([*TRAINED, *UNTRAINED])
        raise RecipeError(f"No lens {lens!r}; expected one of {known}. Set --lens.")
    target, place = TRAINED[lens]
    given = parsed.options.heads
    if given and is_remote(given):
        return LSpadeHeads.from_pretrained(f"{given}/{place}".removesuffix("/."))
    folder = (Path(given) if given else heads_folder(parsed.recipe)) / place
    if not folder.is_dir() and (lens == "tuned_lens" or not given):
        raise ArtifactError(
            f"No heads for {lens} in {folder}. Fit them (lspade-train fit --config RECIPE.yaml "
            f"--model.target {target}),\nor use a lens that needs none: --lens logit_lens or spade."
        )
    return LSpadeHeads.from_pretrained(folder)


def _lens(name: str, heads: Any, adapter: Any) -> tuple[Any, tuple[int, ...]]:
    """The lens, and the layers that it can read."""
    from lspade_train.probes.lenses import HeadsLens, LogitLens, SpadeLens

    if heads is not None:
        return HeadsLens(heads.bind(adapter), name), heads.layers
    every = tuple(range(adapter.num_layers))
    return (SpadeLens() if name == "spade" else LogitLens(adapter.unembed)), every
