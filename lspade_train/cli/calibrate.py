"""`calibrate`: choose an exit policy within a risk budget."""

import logging
import sys
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
policies: what decides (the entropy of a head, a learned gate, a fixed layer), who answers at an
exit (SPADE or a head), thresholds, and the checks worth their cost. The validation split tests
those that no other beats (one half of it where the data have no labelled test split: the other
half is for evaluate). Writes policy.json, and gate.safetensors where a gate decides, beside the
heads and prints the trade-off. Where nothing qualifies the policy is: never exit.

  lspade-train calibrate --config recipes/arc.yaml --max_accuracy_drop 0.01
  lspade-train calibrate --config recipes/arc.yaml --max_disagreement 0.02   (needs no labels)
  lspade-train calibrate --config recipes/arc.yaml --decoder spade   (answers by SPADE alone)
  lspade-train calibrate --config recipes/arc.yaml --paper   (the paper's rule)
  lspade-train calibrate --config recipes/arc.yaml --plan   (rows it takes; loads no model)"""

OPTIONS = (
    *("max_accuracy_drop", "max_disagreement", "confidence"),
    *("interval", "scope", "measure", "reader", "decoder", "paper", "per_group", "per_depth"),
    "small_groups",
)
"""The command's own options, by their names in `policies.selection.calibrate`."""


def calibrate(arguments: list[str]) -> None:
    """Choose a policy on the validation split."""
    parser = command_parser("calibrate", CALIBRATE, with_trainer="--help" not in arguments)
    heads_option(parser)
    add = parser.add_argument
    add("--max_accuracy_drop", type=float, default=None, help="budget, such as 0.01 for one point")
    add("--max_disagreement", type=float, default=None, help="budget for answers that differ")
    add("--confidence", type=float, default=0.95, help="probability that the promise holds")
    add("--interval", type=int, default=1, help="check every n-th layer that has a head")
    add(
        "--scope",
        type=str | None,
        default=None,
        help="what a check looks at: vocabulary or choices; null: choices where there are some",
    )
    add(
        "--measure",
        type=str | None,
        default=None,
        help="what decides: entropy, margin, max_prob or another registered measure, gate "
        "(learned), or fixed (always at one layer); null: the best of entropy, gate and fixed",
    )
    add(
        "--reader",
        type=str | None,
        default=None,
        help="whose logits a measure is of: l-spade, tuned_lens or logit_lens; null: the best",
    )
    add(
        "--decoder",
        type=str | None,
        default=None,
        help="who answers at an exit: spade, l-spade, logit_lens or tuned_lens; null: the best of "
        "spade and the heads, which may differ from layer to layer",
    )
    add(
        "--paper", type=bool, default=False, nargs="?", const=True,
        help="the paper's rule: one entropy threshold of the L-SPADE heads, SPADE answers",
    )  # fmt: skip
    add(
        "--per_group", type=bool, default=False, nargs="?", const=True,
        help="promise the same within every group of the task that has rows enough",
    )  # fmt: skip
    add(
        "--per_depth", type=bool, default=False, nargs="?", const=True,
        help="promise the same for the rows that exit at or before each layer",
    )  # fmt: skip
    add(
        "--small_groups", type=str | None, default=None,
        help="with --per_group, what becomes of groups with too few rows to prove anything: "
        "never_exit (the full model answers their rows, and predict then needs each row's group) "
        "or exclude (the promise leaves them out); null: never_exit",
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
    asked = {name: options[name] for name in OPTIONS}
    found = choose(data, heads, **asked, seed=recipe.seed_everything)
    _print_kinds(found)
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


def _print_kinds(found: "Selection") -> None:
    """One row per kind of policy, and the chosen one."""
    from rich.console import Console
    from rich.table import Table

    result, policy = found.calibration, found.policy
    table = Table(
        "decides -> answers", "checks", "accuracy", "drop", "differs", "mean exit",
        "FLOPs saved", "of oracle", "p-value",
        title=f"over the {policy.scope}; {result.n:,} rows ({found.side.words}), "
        f"which choose the policy; an oracle saves {result.oracle_saving:.1%}",
        caption="differs: share of answers that are not the full model's; p-value: of the test",
    )  # fmt: skip
    table.columns[0].no_wrap = True
    chosen = result.chosen
    for row in [found.never, *sorted(found.kinds, key=lambda row: row.compute_saved)]:
        table.add_row(*_cells(row))
    if chosen.threshold is not None:
        table.add_section()
        table.add_row(*_cells(chosen), style="bold reverse")
    Console(width=max(Console().width, 110)).print(table)


def _cells(row: "PolicyRow") -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        "full model" if row.threshold is None else row.name,
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
        f"Chosen: {chosen.name}. {chosen.compute_saved:.1%} of the FLOPs saved "
        f"({1 / (1 - chosen.compute_saved):.2f} times fewer), mean exit at layer "
        f"{chosen.mean_exit_layer:.2f}; checks at {layers}.\n"
        "These figures are of the rows that chose the policy; evaluate measures it on others.\n"
        f"Promise: {promise(found.policy.calibration)}"
    )
