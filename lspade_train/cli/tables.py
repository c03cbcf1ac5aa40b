"""Results as tables that fit a screen. Knows nothing of how they were measured."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lspade_train.reporting.rows import rows_measured

LENSES = {"logit_lens": "logit", "tuned_lens": "tuned", "l_spade": "L-SPADE", "spade": "SPADE"}
METRICS = {
    "accuracy": "acc.",
    "agrees_model": "agree",
    "kl_to_spade": "KL",
}
LEGEND = "acc.: right answer; agree: best token is the full model's; KL to SPADE in nats"
FLATTERED = " *"
LAYERS_SHOWN = 16
WIDTH = 100


def print_results(results: dict[str, Any]) -> None:
    """One line of what was measured, one table of layers and lenses, one of exits."""
    console = Console()
    console = Console(width=max(console.width, WIDTH))
    console.print(_headline(results), highlight=False, soft_wrap=True)
    console.print(_by_layer(results))
    if results["exits"]:
        console.print(_exits(results))


def print_cross_task(cross: dict[str, Any]) -> None:
    """Heads and thresholds of each task (rows) used on each task (columns)."""
    tasks = [
        f"{task['name']}\n{_number(task['full_model'])}, n {task['n']:,}" for task in cross["tasks"]
    ]
    title = "SPADE-EXIT: accuracy / mean exit layer; under a task's name its full model"
    table = _table("heads and threshold of", *tasks, title=title)
    for heads, cells in zip(cross["heads"], cross["cells"], strict=True):
        table.add_row(heads["name"], *(_cell(cell) for cell in cells))
    console = Console()
    Console(width=max(console.width, WIDTH)).print(table)


def print_ablations(ablations: dict[str, Any], layers: Sequence[int]) -> None:
    """What each change does, mean over the layers."""
    title = f"ablations, mean over layers {layers[0]} to {layers[-1]}; against the full model"
    table = _table("change", "accuracy", "same answer", "KL (nats)", title=title)
    for group, variants in ablations.items():
        for variant in variants:
            values = (variant[m] for m in ("accuracy", "answer_agrees_model", "kl_to_model"))
            table.add_row(
                f"{group}: {variant['label']}", *(_number(_mean(value)) for value in values)
            )
    Console(width=WIDTH).print(table)


def print_comparison(results: Sequence[dict[str, Any]]) -> None:
    """One row per heads folder: L-SPADE and SPADE, mean over their layers, and their policy."""
    table = _table(
        "heads", "model", "task", "split", "n", "model's", "L-SPADE", "SPADE", "KL to SPADE",
        "policy", "saved", title="accuracy and KL, mean over the layers; FLOPs saved by the policy",
    )  # fmt: skip
    if any(map(_is_flattered, results)):
        table.caption = f"{FLATTERED.strip()} on the rows that chose the policy"
    for column in table.columns[:2]:
        column.no_wrap = True
    for one in results:
        table.add_row(*_compared(one))
    console = Console()
    Console(width=max(console.width, WIDTH)).print(table)


def _headline(results: dict[str, Any]) -> str:
    full, interval = results["full_model"], results["interval"]
    accuracy = ""
    if full["accuracy"] is not None:
        low, high = full["accuracy_interval"]
        accuracy = f" accuracy {full['accuracy']:.3f} [{low:.3f}, {high:.3f}],"
    return (
        f"\n{results['name']}: {results['task']}, {rows_measured(results)}, n = {results['n']:,}, "
        f"seed {results['seed']}. Full model:{accuracy} entropy {full['entropy']:.3f} nats. "
        f"Half-width of the {interval['level']:.0%} intervals: at most {_widest(results):.3f}."
    )


def _widest(results: dict[str, Any]) -> float:
    """Half the widest interval of the fractions in the table."""
    metrics = ("accuracy_interval", "agrees_model_interval")
    pairs = (
        pair
        for lens in results["lenses"].values()
        for metric in metrics
        for pair in lens[metric] or []
    )
    return max((high - low) / 2 for low, high in pairs)


def _by_layer(results: dict[str, Any]) -> Table:
    columns = [
        (metric, lens)
        for metric in METRICS
        for lens, values in results["lenses"].items()
        if values[metric] is not None and (lens, metric) != ("spade", "kl_to_spade")
    ]
    table = _table("layer", *(f"{METRICS[metric]}\n{LENSES[lens]}" for metric, lens in columns))
    table.caption = LEGEND
    for place in _spread(len(results["layers"])):
        values = (results["lenses"][lens][metric][place] for metric, lens in columns)
        table.add_row(str(results["layers"][place]), *(_number(value) for value in values))
    return table


def _exits(results: dict[str, Any]) -> Table:
    exits = results["exits"]
    oracle = exits["oracle_saving"]
    table = _table(
        "SPADE-EXIT at", "accuracy", "drop", "disagreement", "mean exit layer", "FLOPs saved",
        title=f"thresholds in nats over the vocabulary; an oracle saves {oracle:.1%}",
    )  # fmt: skip
    rows = [("never", exits["never"]), *((f"{r['threshold']:g}", r) for r in exits["paper"])]
    if exits["policy"] and exits["policy"]["row"]:
        rows.append((exits["policy"].get("label", "policy.json"), exits["policy"]["row"]))
    for name, row in rows:
        numbers = ("accuracy", "drop", "disagreement")
        table.add_row(
            name,
            *(_number(row[key]) for key in numbers),
            f"{row['mean_exit_layer']:.2f}",
            f"{row['compute_saved']:.1%}",
        )
    return table


def _spread(count: int) -> list[int]:
    """All places, or as many as fit a screen: evenly spread, the last one among them."""
    if count <= LAYERS_SHOWN:
        return list(range(count))
    step = -(-count // LAYERS_SHOWN)
    return list(range((count - 1) % step, count, step))


def _compared(results: dict[str, Any]) -> list[str]:
    labelled = results["n_labelled"] > 0
    metric = "accuracy" if labelled else "answer_agrees_model"
    heads, spade = results["lenses"]["l_spade"], results["lenses"]["spade"]
    policy = (results["exits"] or {}).get("policy") or {}
    row = policy.get("row") or {}
    return [
        results["label"],
        str(results["model_id"]).rstrip("/").rsplit("/", 1)[-1],
        results["task"],
        results["split"],
        f"{results['n']:,}",
        _number(results["full_model"]["accuracy"]),
        _number(_mean(heads[metric])),
        _number(_mean(spade[metric])),
        _number(_mean(heads["kl_to_spade"])),
        _number(row.get("accuracy")),
        "-" if not row else f"{row['compute_saved']:.1%}" + FLATTERED * _is_flattered(results),
    ]


def _is_flattered(results: dict[str, Any]) -> bool:
    """Whether the policy's figures stand on rows that chose it."""
    policy = (results["exits"] or {}).get("policy") or {}
    return bool(policy.get("row")) and policy.get("chosen_on_these_rows", False)


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    row = cell["policy"]
    return f"{_number(row['accuracy'])} / {row['mean_exit_layer']:.2f}"


def _mean(values: Sequence[float | None] | None) -> float | None:
    known = [value for value in values or [] if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=title,
        title_justify="left",
        caption_justify="left",
    )
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table
