"""`calibrate`: choose an exit policy within a risk budget."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lspade_train.cli.options import heads_given, heads_option
from lspade_train.cli.parsing import Parsed, command_parser, parse

if TYPE_CHECKING:
    from lspade_train.policies.policy import ExitPolicy

log = logging.getLogger(__name__)

CALIBRATE = """\
Choose the exit policy that saves the most compute while the risk stays within your budget, with a
distribution-free guarantee (Learn then Test, arXiv:2110.01052). The training split proposes
thresholds, the validation split tests them. Writes policy.json beside the heads and prints the
trade-off. Where nothing qualifies the policy is: never exit.

  lspade-train calibrate --config recipes/arc.yaml --max_accuracy_drop 0.01
  lspade-train calibrate --config recipes/arc.yaml --max_disagreement 0.02   (needs no labels)
  lspade-train calibrate --config recipes/arc.yaml --heads checkpoints/arc/tuned_lens"""

DESIGN_ROWS = 4_000
"""Training rows that propose thresholds: more would change them little."""

STEP = 0.08
"""Least difference in saving between two rows of the printed table."""


def calibrate(arguments: list[str]) -> None:
    """Choose a policy on the validation split."""
    parser = command_parser("calibrate", CALIBRATE, with_trainer="--help" not in arguments)
    heads_option(parser)
    add = parser.add_argument
    add("--max_accuracy_drop", type=float, default=None, help="budget, such as 0.01 for one point")
    add(
        "--max_disagreement", type=float, default=None, help="budget for answers unlike the model's"
    )
    add("--confidence", type=float, default=0.95, help="probability that the promise holds")
    add("--interval", type=int, default=1, help="check every n-th layer that has a head")
    add(
        "--scope",
        type=str | None,
        default=None,
        help="what a check looks at: vocabulary or choices; null: what saves more in training",
    )
    add("--measure", type=str, default="entropy", help="of a check: entropy, margin or max_prob")
    add(
        "--decoder",
        type=str | None,
        default=None,
        help="who answers at an exit: spade, l-spade, logit_lens or tuned_lens; null: spade, or "
        "tuned_lens for heads of that kind",
    )
    parsed = parse(parser, arguments)

    from lspade_train.artifacts.card import write_card
    from lspade_train.policies.calibration import calibrate as choose
    from lspade_train.policies.exit_table import evaluate_policy

    risk, budget = _budget(parsed.options)
    folder, heads, data = _model(parsed)
    policy, proposed = _design(parsed, heads, data, risk, budget)
    table = _table(data, heads, policy, "validation")
    sequences = [(table, table.grid()), *([(table, proposed)] if proposed else [])]
    result = choose(sequences, risk, budget, parsed.options.confidence)
    _print_curve(result, evaluate_policy(table, None))
    policy = replace(policy, threshold=result.chosen.threshold, calibration=result.to_json())
    policy.save(folder)
    write_card(folder)
    sys.stdout.write(f"{_verdict(result)}\n")
    log.info("policy: %s", folder / "policy.json")


def _design(
    parsed: Parsed, heads: Any, data: Any, risk: Any, budget: float
) -> "tuple[ExitPolicy, list[Any]]":
    """Everything of a policy but its threshold, and thresholds to test, from training rows.

    Without stored training rows (`data.mode: online`) only the grid is tested.
    """
    from lspade_train.policies.calibration import most_promising, propose

    policies = _candidates(parsed, heads, data)
    policies[0].check_heads(heads.digest, heads.target)
    if data.config.mode == "online":
        return policies[0], []
    tables = [_table(data, heads, policy, "train", DESIGN_ROWS) for policy in policies]
    best = most_promising(tables, risk, budget)
    return policies[best], propose(tables[best])


def _candidates(parsed: Parsed, heads: Any, data: Any) -> "list[ExitPolicy]":
    """One policy per scope to choose from."""
    from lspade_train.policies.policy import ExitPolicy

    options = parsed.options
    offered = data.stored("validation").shards[0]["choice_ids"].shape[1] > 0
    scopes: Any = [options.scope] if options.scope else ["choices", "vocabulary"][not offered :]
    layers = [layer for layer in data.layers if layer in heads.layers]
    return [
        ExitPolicy(
            layers=tuple(layers[options.interval - 1 :: options.interval]),
            measure=options.measure,
            scope=scope,
            decoder=options.decoder or ("tuned_lens" if heads.target == "final" else "spade"),
            positions=parsed.recipe.data.positions,
            heads_digest=heads.digest,
        )
        for scope in scopes
    ]


def _table(data: Any, heads: Any, policy: "ExitPolicy", split: str, rows: int | None = None) -> Any:
    from lspade_train.evaluation import exit_table

    return exit_table(data.stored(split), data.adapter, heads, policy, rows=rows)


def _budget(options: Any) -> tuple[Any, float]:
    from lspade_train.errors import PolicyError

    drop, disagreement = options.max_accuracy_drop, options.max_disagreement
    if drop is not None and disagreement is not None:
        raise PolicyError("Give one budget: --max_accuracy_drop or --max_disagreement, not both.")
    if disagreement is not None:
        return "disagreement", disagreement
    return "accuracy_drop", 0.01 if drop is None else drop


def _model(parsed: Parsed) -> tuple[Path, Any, Any]:
    from lspade_train.probes.heads import LSpadeHeads
    from lspade_train.training.datamodule import HiddenStateDataModule

    recipe = parsed.recipe
    folder = heads_given(parsed, written_by="calibrate")
    heads = LSpadeHeads.from_pretrained(folder)
    data = HiddenStateDataModule(
        recipe.data, recipe.model.layers, seed=recipe.seed_everything, name=recipe.name
    )
    return folder, heads.bind(data.adapter), data


def _print_curve(result: Any, never: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "threshold", "accuracy", "drop", "disagreement", "mean exit", "FLOPs saved",
        "of oracle", "p-value",
        title=f"{result.n:,} validation rows, oracle saves {result.oracle_saving:.1%}",
    )  # fmt: skip
    chosen = result.chosen
    rows = [] if chosen.threshold is None else _telling(result.curve, chosen)
    for row in [never, *rows]:
        table.add_row(*_cells(row), style="bold reverse" if row is chosen else "")
    Console(width=max(Console().width, 100)).print(table)


def _telling(curve: Sequence[Any], chosen: Any) -> list[Any]:
    """What no other row beats in saving and disagreement, a few points apart, and the chosen."""
    best: list[Any] = []
    for row in sorted(curve, key=lambda row: -row.compute_saved):
        if not best or row.disagreement < best[-1].disagreement:
            best.append(row)
    shown: list[Any] = []
    for row in reversed(best):
        near = shown and row.compute_saved < shown[-1].compute_saved + STEP
        if row is chosen or not (near or abs(row.compute_saved - chosen.compute_saved) < STEP):
            shown.append(row)
    return shown if chosen in shown else sorted([*shown, chosen], key=lambda row: row.compute_saved)


def _cells(row: Any) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    several = isinstance(row.threshold, tuple)
    return [
        "per layer" if several else "never" if row.threshold is None else f"{row.threshold:.3f}",
        number(row.accuracy, ".3f"),
        number(row.drop, "+.3f"),
        number(row.disagreement, ".3f"),
        number(row.mean_exit_layer, ".2f"),
        number(row.compute_saved, ".1%"),
        number(row.efficiency, ".0%"),
        number(row.p_value, ".3f"),
    ]


def _verdict(result: Any) -> str:
    """The choice in words: what it saves and what is promised."""
    chosen = result.chosen
    if chosen.threshold is None:
        return result.reason
    what = "accuracy drop" if result.risk == "accuracy_drop" else "disagreement with the model"
    return (
        f"Chosen: {chosen.compute_saved:.1%} of the FLOPs saved "
        f"({1 / (1 - chosen.compute_saved):.2f} times fewer), mean exit at layer "
        f"{chosen.mean_exit_layer:.2f}.\nPromise: {what} of at most {result.budget:g} with "
        f"{result.confidence:.0%} confidence, for prompts like the validation split's."
    )
