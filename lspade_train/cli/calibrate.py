"""`calibrate`: choose an exit policy within a risk budget."""

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lspade_train.cli.options import heads_given, heads_option
from lspade_train.cli.parsing import Parsed, command_parser, parse

if TYPE_CHECKING:
    from lspade_train.policies.exit_table import PolicyRow
    from lspade_train.policies.selection import Selection

log = logging.getLogger(__name__)

CALIBRATE = """\
Choose the exit policy that saves the most compute while the risk stays within your budget, with a
distribution-free guarantee (Learn then Test, arXiv:2110.01052). The training split proposes
thresholds and the checks worth their cost, the validation split tests them (one half of it where
the data have no labelled test split: the other half is for evaluate). Writes policy.json beside
the heads and prints the trade-off. Where nothing qualifies the policy is: never exit.

  lspade-train calibrate --config recipes/arc.yaml --max_accuracy_drop 0.01
  lspade-train calibrate --config recipes/arc.yaml --max_disagreement 0.02   (needs no labels)
  lspade-train calibrate --config recipes/arc.yaml --plan   (rows it takes; loads no model)
  lspade-train calibrate --config recipes/arc.yaml --heads checkpoints/arc/tuned_lens"""

OPTIONS = (
    *("max_accuracy_drop", "max_disagreement", "confidence"),
    *("interval", "scope", "measure", "decoder", "per_group", "per_depth"),
)
"""The command's own options, by their names in `policies.selection.calibrate`."""

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
    add(
        "--measure",
        type=str,
        default="entropy",
        help="of a check: entropy, margin, max_prob or another registered measure",
    )
    add(
        "--decoder",
        type=str | None,
        default=None,
        help="who answers at an exit: spade, l-spade, logit_lens or tuned_lens; null: spade, or "
        "tuned_lens for heads of that kind",
    )
    add(
        "--per_group", type=bool, default=False, nargs="?", const=True,
        help="promise the same within every group of the task that has rows enough",
    )  # fmt: skip
    add(
        "--per_depth", type=bool, default=False, nargs="?", const=True,
        help="promise the same for the rows that exit at or before each layer",
    )  # fmt: skip
    add(
        "--plan",
        type=bool,
        default=False,
        nargs="?",
        const=True,
        help="only say how many rows the budget takes and what these data can prove; loads no "
        "model and needs no heads",
    )
    parsed = parse(parser, arguments)

    from lspade_train.artifacts.card import write_card
    from lspade_train.policies.selection import calibrate as choose
    from lspade_train.probes.heads import LSpadeHeads
    from lspade_train.training.datamodule import HiddenStateDataModule

    recipe, options = parsed.recipe, parsed.options
    if options.plan:
        _print_plan(parsed)
        return
    folder = heads_given(parsed, written_by="calibrate")
    heads = LSpadeHeads.from_pretrained(folder)
    data = HiddenStateDataModule(
        recipe.data, recipe.model.layers, seed=recipe.seed_everything, name=recipe.name
    )
    found = choose(data, heads, **{name: options[name] for name in OPTIONS})
    _print_curve(found)
    found.policy.save(folder)
    write_card(folder)
    sys.stdout.write(f"{_verdict(found)}\n")
    log.info("policy: %s", folder / "policy.json")


def _print_plan(parsed: Parsed) -> None:
    """Rows that the budget takes, and what the rows at hand can prove."""
    from rich.console import Console
    from rich.table import Table

    from lspade_train.policies.plan import plan
    from lspade_train.policies.selection import risk_budget
    from lspade_train.training.datamodule import HiddenStateDataModule

    recipe, options = parsed.recipe, parsed.options
    risk, budget = risk_budget(options.max_accuracy_drop, options.max_disagreement)
    data = HiddenStateDataModule(recipe.data, recipe.model.layers, name=recipe.name)
    found = plan(data, risk, budget, options.confidence)
    what = "an accuracy drop" if risk == "accuracy_drop" else "a disagreement"
    table = Table(
        "losses among the tested rows", f"rows to prove {what} of {budget:g}",
        f"smallest budget that {found.rows:,} rows prove",
        title=f"{found.confidence:.0%} confidence; {found.rows:,} rows to test on "
        f"({found.side.words})",
    )  # fmt: skip
    for losses, needed in found.needed.items():
        least = found.provable[losses]
        table.add_row(f"{losses}", f"{needed:,}", "none" if least is None else f"{least:.4f}")
    Console(width=max(Console().width, 100)).print(table)
    if found.losses is None:
        words = (
            f"These {found.rows:,} rows cannot prove it, even without one loss: give at least "
            f"{found.needed[0]:,}, or a larger budget."
        )
    else:
        gains = ", or more where it also gains" if risk == "accuracy_drop" else ""
        words = (
            f"These {found.rows:,} rows prove it for a policy that loses at most "
            f"{found.losses:,} of them{gains}."
        )
    sys.stdout.write(f"{words}\n")


def _print_curve(found: "Selection") -> None:
    from rich.console import Console
    from rich.table import Table

    result, policy = found.calibration, found.policy
    table = Table(
        "threshold", "checks", "accuracy", "drop", "disagreement", "mean exit",
        "FLOPs saved", "of oracle", "p-value",
        title=f"{policy.measure} over {policy.scope}; {result.n:,} rows ({found.side.words}), "
        f"which choose the policy; an oracle saves {result.oracle_saving:.1%}",
    )  # fmt: skip
    chosen = result.chosen
    rows = [] if chosen.threshold is None else _frontier(result.curve, chosen)
    for row in [found.never, *rows]:
        table.add_row(*_cells(row), style="bold reverse" if row is chosen else "")
    Console(width=max(Console().width, 100)).print(table)


def _frontier(curve: "Sequence[PolicyRow]", chosen: "PolicyRow") -> "list[PolicyRow]":
    """What no other row beats in saving and disagreement, a few points apart, and the chosen."""
    best: list[PolicyRow] = []
    for row in sorted(curve, key=lambda row: -row.compute_saved):
        if not best or row.disagreement < best[-1].disagreement:
            best.append(row)
    shown: list[PolicyRow] = []
    for row in reversed(best):
        near = shown and row.compute_saved < shown[-1].compute_saved + STEP
        if row is chosen or not (near or abs(row.compute_saved - chosen.compute_saved) < STEP):
            shown.append(row)
    return shown if chosen in shown else sorted([*shown, chosen], key=lambda row: row.compute_saved)


def _cells(row: "PolicyRow") -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    several = isinstance(row.threshold, tuple)
    return [
        "per layer" if several else "never" if row.threshold is None else f"{row.threshold:.3g}",
        "0" if row.threshold is None else f"{len(row.layers)}",
        number(row.accuracy, ".3f"),
        number(row.drop, "+.3f"),
        number(row.disagreement, ".3f"),
        number(row.mean_exit_layer, ".2f"),
        number(row.compute_saved, ".1%"),
        number(row.efficiency, ".0%"),
        number(row.p_value, ".3f"),
    ]


def _verdict(found: "Selection") -> str:
    """The choice in words: what it saves and what is promised."""
    from lspade_train.policies.promise import promise

    result = found.calibration
    chosen = result.chosen
    if chosen.threshold is None:
        return result.reason
    layers = ", ".join(map(str, chosen.layers))
    return (
        f"Chosen: {chosen.compute_saved:.1%} of the FLOPs saved "
        f"({1 / (1 - chosen.compute_saved):.2f} times fewer), mean exit at layer "
        f"{chosen.mean_exit_layer:.2f}, checks at layers {layers}.\n"
        "These figures are of the rows that chose the policy; evaluate measures it on others.\n"
        f"Promise: {promise(found.policy.calibration)}"
    )
