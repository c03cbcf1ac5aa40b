"""Prints results as tables that fit a terminal. Independent of how they were measured."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lspade_train.probes.lenses import SPADE, label_of
from lspade_train.reporting.rows import rows_measured
from lspade_train.reporting.tables import exit_lens
from lspade_train.reporting.verdict import verdict

METRICS = {
    "accuracy": "acc.",
    "agrees_model": "agree",
    "kl_to_spade": "KL",
}
LEGEND = "acc.: accuracy; agree: top token matches the full model's; KL to SPADE in nats"
FLATTERED = " *"
LAYERS_SHOWN = 16
WIDTH = 100


def print_results(results: dict[str, Any]) -> None:
    """Print the verdict, what was measured, a table of layers and lenses, and one of exits."""
    console = Console()
    console = Console(width=max(console.width, WIDTH))
    console.print()
    for sentence in verdict(results):
        console.print(sentence, highlight=False)
    console.print(_headline(results), highlight=False, soft_wrap=True)
    console.print(_by_layer(results))
    if results["exits"]:
        console.print(_exits_table(results))


def print_baselines(results: dict[str, Any]) -> None:
    """Print other early-exit methods, and the policy, on the same rows."""
    found = results["baselines"]
    title = (
        f"other early-exit methods, tuned on {found['n']:,} separate rows for a risk of "
        f"{found['budget']:g} (no test); *: no setting met it"
    )
    table = new_table("rule", "setting", "drop", "differs", "FLOPs saved", "of oracle", title=title)
    rules = [(r["name"] + ("" if r["within_budget"] else FLATTERED), r) for r in found["rules"]]
    policy = (results["exits"] or {}).get("policy")
    if policy and policy["row"]:
        rules.append(("policy.json", {"setting": "tested", "row": policy["row"]}))
    for name, rule in rules:
        row = rule["row"]
        shares = ("compute_saved", "efficiency")
        saved = ("-" if row[key] is None else f"{row[key]:.1%}" for key in shares)
        cells = (number(row["drop"]), number(row["disagreement"]), *saved)
        table.add_row(name, rule["setting"], *cells)
    console = Console()
    Console(width=max(console.width, WIDTH)).print(table)


def print_cross_task(cross: dict[str, Any]) -> None:
    """Print the heads and threshold of each task (rows) used on each task (columns)."""
    tasks = [
        f"{task['name']}\n{number(task['full_model'])}, n {task['n']:,}" for task in cross["tasks"]
    ]
    title = "SPADE-EXIT: accuracy / mean exit layer; the full model's accuracy under a task's name"
    table = new_table("heads and threshold of", *tasks, title=title)
    for heads, cells in zip(cross["heads"], cross["cells"], strict=True):
        table.add_row(heads["name"], *(_cell(cell) for cell in cells))
    console = Console()
    Console(width=max(console.width, WIDTH)).print(table)


def print_ablations(ablations: dict[str, Any], layers: Sequence[int]) -> None:
    """Print the effect of each change, mean over the layers."""
    title = f"ablations, mean over layers {layers[0]} to {layers[-1]}; against the full model"
    table = new_table("change", "accuracy", "answer agrees", "KL (nats)", title=title)
    for group, variants in ablations.items():
        for variant in variants:
            values = (variant[m] for m in ("accuracy", "answer_agrees_model", "kl_to_model"))
            table.add_row(
                f"{group}: {variant['label']}", *(number(_mean(value)) for value in values)
            )
    Console(width=WIDTH).print(table)


def print_comparison(results: Sequence[dict[str, Any]]) -> None:
    """Print a row per heads folder: its heads and SPADE, mean over the layers, and its policy."""
    table = new_table(
        "folder", "model", "task", "split", "n", "full model", "heads", "SPADE", "KL to SPADE",
        "policy", "saved", title="accuracy and KL, mean over the layers; FLOPs saved by the policy",
    )  # fmt: skip
    if any(map(_is_flattered, results)):
        table.caption = f"{FLATTERED.strip()} on the rows used for selection (optimistic)"
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
    """Half the width of the widest interval in the table."""
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
        if values[metric] is not None and (lens, metric) != (SPADE.key, "kl_to_spade")
    ]
    headings = (f"{METRICS[metric]}\n{label_of(lens, short=True)}" for metric, lens in columns)
    table = new_table("layer", *headings)
    table.caption = LEGEND
    for place in spread(len(results["layers"])):
        values = (results["lenses"][lens][metric][place] for metric, lens in columns)
        table.add_row(str(results["layers"][place]), *(number(value) for value in values))
    return table


def _exits_table(results: dict[str, Any]) -> Table:
    exits = results["exits"]
    oracle, over = exits["oracle_saving"], exits.get("scope", "vocabulary")
    table = new_table(
        "SPADE-EXIT at", "accuracy", "drop", "disagreement", "mean exit layer", "FLOPs saved",
        title=f"thresholds in nats over the {over}; an oracle saves {oracle:.1%}",
    )  # fmt: skip
    rows = [("never", exits["never"]), *((f"{r['threshold']:g}", r) for r in exits["paper"])]
    if exits["policy"] and exits["policy"]["row"]:
        rows.append((exits["policy"].get("label", "policy.json"), exits["policy"]["row"]))
    for name, row in rows:
        numbers = ("accuracy", "drop", "disagreement")
        table.add_row(
            name,
            *(number(row[key]) for key in numbers),
            f"{row['mean_exit_layer']:.2f}",
            f"{row['compute_saved']:.1%}",
        )
    return table


def spread(count: int) -> list[int]:
    """All indices, or as many as fit a screen: evenly spaced, with the last."""
    if count <= LAYERS_SHOWN:
        return list(range(count))
    step = -(-count // LAYERS_SHOWN)
    return list(range((count - 1) % step, count, step))


def _compared(results: dict[str, Any]) -> list[str]:
    labelled = results["n_labelled"] > 0
    metric = "accuracy" if labelled else "answer_agrees_model"
    heads, spade = results["lenses"][exit_lens(results)], results["lenses"][SPADE.key]
    policy = (results["exits"] or {}).get("policy") or {}
    row = policy.get("row") or {}
    return [
        results["label"],
        str(results["model_id"]).rstrip("/").rsplit("/", 1)[-1],
        results["task"],
        results["split"],
        f"{results['n']:,}",
        number(results["full_model"]["accuracy"]),
        number(_mean(heads[metric])),
        number(_mean(spade[metric])),
        number(_mean(heads["kl_to_spade"])),
        number(row.get("accuracy")),
        "-" if not row else f"{row['compute_saved']:.1%}" + FLATTERED * _is_flattered(results),
    ]


def _is_flattered(results: dict[str, Any]) -> bool:
    """Whether the policy's figures are from the rows on which it was selected."""
    policy = (results["exits"] or {}).get("policy") or {}
    return bool(policy.get("row")) and policy.get("chosen_on_these_rows", False)


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    row = cell["policy"]
    return f"{number(row['accuracy'])} / {row['mean_exit_layer']:.2f}"


def _mean(values: Sequence[float | None] | None) -> float | None:
    known = [value for value in values or [] if value is not None]
    return sum(known) / len(known) if known else None


def number(value: float | None) -> str:
    """Three decimals, or a dash for an unknown value."""
    return "-" if value is None else f"{value:.3f}"


def new_table(*columns: str, title: str | None = None) -> Table:
    """An empty table in the common style: names left-aligned, numbers right-aligned."""
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
