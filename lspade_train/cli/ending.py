"""Output at the end of `fit`, `validate` and `test`: a table by layer, and the files written."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from lspade_train.cli.printing import new_table, number, spread
from lspade_train.errors import ArtifactError
from lspade_train.io.layout import CONFIG, TUNED_LENS, WEIGHTS
from lspade_train.io.storage import read_json
from lspade_train.io.text import byte_size, duration
from lspade_train.probes.lenses import label_of, lens_of_target
from lspade_train.recipe import Recipe

METRICS = {"loss": "loss", "kl": "KL", "agreement": "agree", "accuracy": "acc."}
LEGEND = (
    "loss and KL in nats; agree: top token matches the target's; acc.: accuracy over the choices"
)


def print_by_layer(
    metrics: Mapping[str, float], targets: tuple[str, ...], title: str, *, loss: bool = False
) -> None:
    """KL, agreement and accuracy of fitted heads, a row per layer and their mean.

    Args:
        metrics: logged metrics of one stage, by `STAGE/[TARGET/]METRIC/layer_NN`; may be empty.
        targets: what the heads were fitted to (`HeadConfig.targets`).
        title: title of the table.
        loss: also show the loss.
    """
    rows = _rows(metrics)
    if not rows:
        return
    shown = [metric for metric in METRICS if loss or metric != "loss"]
    columns = [(place, metric) for place in range(len(targets)) for metric in shown]
    headings = [f"{METRICS[metric]}\n{_label(targets[place])}" for place, metric in columns]
    table = new_table("layer", *headings, title=title)
    table.caption = LEGEND if loss else LEGEND.replace("loss and KL", "KL")
    *layers, mean = rows
    for name in [*(layers[place] for place in spread(len(layers))), mean]:
        if name == mean:
            table.add_section()
        found = (rows[name].get((targets[p] if p else "", metric)) for p, metric in columns)
        table.add_row(name, *map(number, found))
    console = Console()
    Console(width=max(console.width, 80)).print(table)


def print_fitted(recipe: Recipe, folder: Path, seconds: float, after: str) -> None:
    """Print a fit's metrics, time and files, and the next command.

    Args:
        recipe: the recipe that was run.
        folder: the heads folder that it wrote.
        seconds: seconds since the command was called.
        after: the next command line.
    """
    targets = recipe.model.targets
    folders = [folder, folder / TUNED_LENS][: len(targets)]
    metrics: dict[str, float] = {}
    for place, target in zip(folders, ("", *targets[1:]), strict=True):
        prefix = f"/{target}/" if target else "/"
        found = _training(place)["metrics"]
        metrics |= {name.replace("/", prefix, 1): value for name, value in found.items()}
    model = recipe.model
    bounded = model.scope == "vocabulary" and model.validation_rows
    rows = f"at most {bounded:,} validation rows" if bounded else "the validation split"
    print_by_layer(metrics, targets, f"{recipe.name}: heads on {rows}")
    size = sum((place / WEIGHTS).stat().st_size for place in folders)
    sys.stdout.write(
        f"heads: {folder} ({byte_size(size)}), {_training(folder)['steps']:,} steps; "
        f"this run took {duration(seconds)}\nnext:  {after}\n"
    )


def _rows(metrics: Mapping[str, float]) -> dict[str, dict[tuple[str, str], float]]:
    """Layer, in order and `mean` last -> (target, metric) -> value; the first target is `""`."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    for name, value in metrics.items():
        _, *target, metric, layer = name.split("/")
        row = found.setdefault(layer.removeprefix("layer_").lstrip("0") or "0", {})
        row["".join(target), metric] = value
    return dict(sorted(found.items(), key=lambda item: (item[0] == "mean", item[0].rjust(6))))


def _training(folder: Path) -> dict[str, Any]:
    return read_json(folder / CONFIG, ArtifactError)["training"]


def _label(target: str) -> str:
    return label_of(lens_of_target(target).key, short=True)
