"""`evaluate`: every lens at every layer, printed, written and drawn."""

import logging
from pathlib import Path
from typing import Any

from lspade_train.cli.parsing import command_parser, parse

log = logging.getLogger(__name__)

EVALUATE = """\
Accuracy, agreement, KL and entropy by layer for the logit lens, the tuned lens (where one was
fitted with --model.target final), L-SPADE and SPADE, against the full model.
Reads cached states, builds the split's cache where it is missing, and writes results.json and
figures/ into the heads folder."""


def evaluate(arguments: list[str]) -> None:
    """Measure and write `results.json`."""
    parser = command_parser("evaluate", EVALUATE, with_trainer="--help" not in arguments)
    parser.add_argument(
        "--heads", type=str, default=None, help="heads folder; null: checkpoints/NAME"
    )
    parser.add_argument(
        "--split",
        type=str,
        default=None,
        help="split to measure; null: test, or validation where test has no labels",
    )
    parsed = parse(parser, arguments)

    from lspade_train import tasks
    from lspade_train.artifact import heads_folder, write_results
    from lspade_train.card import write_card
    from lspade_train.data import HiddenStateDataModule
    from lspade_train.errors import RecipeError
    from lspade_train.evaluation import read_lenses, summarise
    from lspade_train.heads import LSpadeHeads
    from lspade_train.plots import accuracy_by_layer

    recipe = parsed.recipe
    split = parsed.options.split or tasks.evaluation_split(recipe.data)
    if split not in tasks.splits(recipe.data):
        raise RecipeError(
            f"No split {split!r} in this data; it has {', '.join(tasks.splits(recipe.data))}. "
            "Set --split."
        )
    folder = Path(parsed.options.heads) if parsed.options.heads else heads_folder(recipe)
    heads = LSpadeHeads.from_pretrained(folder)
    data = HiddenStateDataModule(
        recipe.data, recipe.model.layers, seed=recipe.seed_everything, name=recipe.name
    )
    heads.bind(data.adapter)
    lenses = _lenses(folder, heads, data)
    layers = [layer for layer in data.layers if layer in heads.layers]
    readings = read_lenses(data.stored(split), data.adapter.unembed, lenses, layers)
    results = {
        "task": recipe.data.task,
        "split": split,
        "model_id": recipe.data.model_id,
        "seed": recipe.seed_everything,
        **summarise(readings),
    }
    _print(results)
    write_results(folder, results)
    figure = accuracy_by_layer(results, folder / "figures")
    write_card(folder)
    log.info("results: %s", folder / "results.json")
    log.info("figure:  %s", figure)


def _lenses(folder: Path, heads: Any, data: Any) -> list[Any]:
    from lspade_train.heads import LSpadeHeads
    from lspade_train.lenses import HeadsLens, LogitLens, SpadeLens

    lenses: list[Any] = [LogitLens(data.adapter.unembed)]
    tuned = folder / "tuned_lens"
    if tuned.is_dir():
        tuned_heads = LSpadeHeads.from_pretrained(tuned).bind(data.adapter)
        lenses.append(HeadsLens(tuned_heads, "tuned_lens"))
    return [*lenses, HeadsLens(heads), SpadeLens()]


TITLES = {
    "logit_lens": "logit lens",
    "tuned_lens": "tuned lens",
    "l_spade": "L-SPADE",
    "spade": "SPADE",
}
COLUMNS = {
    "accuracy": "accuracy",
    "agrees_model": "agreement with the full model",
    "agrees_spade": "agreement with SPADE",
    "kl_to_spade": "KL to SPADE (nats)",
    "entropy": "entropy (nats)",
}


def _print(results: dict[str, Any]) -> None:
    """One small table per metric, side by side where the terminal is wide enough."""
    from rich.columns import Columns
    from rich.console import Console
    from rich.table import Table

    console = Console()
    full = results["full_model"]
    accuracy = "" if full["accuracy"] is None else f" accuracy {full['accuracy']:.3f},"
    console.print(
        f"\n{results['task']}, {results['split']} split, n = {results['n']:,}, "
        f"seed {results['seed']}. Full model:{accuracy} entropy {full['entropy']:.3f} nats\n",
        highlight=False,
    )
    tables: list[Table] = []
    for metric, title in COLUMNS.items():
        lenses = _shown(metric, results)
        if not lenses:
            continue
        table = Table("layer", *(TITLES[lens] for lens in lenses), title=title)
        for column in table.columns:
            column.justify = "right"
        for place, layer in enumerate(results["layers"]):
            values = (results["lenses"][lens][metric][place] for lens in lenses)
            table.add_row(str(layer), *(f"{value:.3f}" for value in values))
        tables.append(table)
    console.print(Columns(tables, padding=(0, 3)))


def _shown(metric: str, results: dict[str, Any]) -> list[str]:
    """Lenses for which a metric says something."""
    if metric == "accuracy" and not results["n_labelled"]:
        return []
    lenses = list(results["lenses"])
    if metric in {"agrees_spade", "kl_to_spade"}:
        return [lens for lens in lenses if lens != "spade"]
    return lenses
