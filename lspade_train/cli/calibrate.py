"""`calibrate`: choose an exit policy within a risk budget."""

import logging
import sys
from typing import TYPE_CHECKING, Any

from lspade_train.cli.again import another
from lspade_train.cli.drafting import calibrate_drafting, check_purpose
from lspade_train.cli.options import find_heads, heads_given, heads_option
from lspade_train.cli.parsing import Parsed, command_parser, parse
from lspade_train.errors import RecipeError

if TYPE_CHECKING:
    from lspade_train.policies.exit_table import PolicyRow
    from lspade_train.policies.selection import Selection

log = logging.getLogger(__name__)

CALIBRATE = """\
Choose the exit policy that saves the most FLOPs, or the most time on this machine (--cost time),
while the risk stays within your budget, with a distribution-free guarantee (Learn then Test,
arXiv:2110.01052). Candidate policies (exit criterion, answer method, thresholds, check layers) are
generated on the training split; the Pareto-optimal ones are tested on the validation split (on one
half of it without a labelled test split: the other half is for evaluate). Writes policy.json, and
gate.safetensors for a learned gate, into the heads folder and prints the trade-off. If no policy
passes, the saved policy never exits early.

  lspade-train calibrate --config recipes/arc.yaml --max_accuracy_drop 0.01
  lspade-train calibrate --config recipes/arc.yaml --max_disagreement 0.02   (needs no labels)
  lspade-train calibrate --config recipes/arc.yaml --decoder spade   (SPADE always answers)
  lspade-train calibrate --config recipes/arc.yaml --paper   (the paper's rule)
  lspade-train calibrate --config recipes/arc.yaml --cost time --batch_size 1   (seconds, here)
  lspade-train calibrate --config recipes/arc.yaml --plan   (rows needed; loads no model)

--for generate chooses at which layer ExitRuntime.generate drafts tokens for the full model to
verify, by time on this machine, and writes drafting.json. The text stays the full model's, so that
there is no budget and nothing to guarantee.

  lspade-train calibrate --config recipes/arc.yaml --for generate --new_tokens 64"""

MARK = "> "

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
    add(
        "--for", type=str, default="decide",
        help="what to choose: decide, an exit policy, or generate, a layer that drafts",
    )  # fmt: skip
    add(
        "--new_tokens", type=int, default=32, help="with --for generate, tokens of each prompt"
    )  # fmt: skip
    add(
        "--max_accuracy_drop",
        type=float,
        default=None,
        help="budget: maximum drop in accuracy from the full model's, such as 0.01 for one point",
    )
    add(
        "--max_disagreement",
        type=float,
        default=None,
        help="budget: maximum fraction of answers that differ from the full model's",
    )
    add("--confidence", type=float, default=0.95, help="probability that the guarantee holds")
    add("--interval", type=int, default=1, help="check every n-th layer that has a head")
    add(
        "--scope",
        type=str | None,
        default=None,
        help="compute the measure over the vocabulary or only the answer choices; default: choices "
        "if every row has some",
    )
    add(
        "--measure",
        type=str | None,
        default=None,
        help="exit criterion: entropy, margin, max_prob or another registered measure, gate "
        "(learned), or fixed (always at one layer); default: the best of entropy, gate and fixed",
    )
    add(
        "--reader",
        type=str | None,
        default=None,
        help="heads whose logits the measure is computed from: l-spade, tuned_lens or logit_lens; "
        "default: the best",
    )
    add(
        "--decoder",
        type=str | None,
        default=None,
        help="answer method at an exit: spade, l-spade, logit_lens or tuned_lens; default: the "
        "best of spade and the heads, which may differ from layer to layer",
    )
    add(
        "--paper", type=bool, default=False, nargs="?", const=True,
        help="the paper's rule: one entropy threshold of the L-SPADE heads, SPADE answers",
    )  # fmt: skip
    add(
        "--per_group", type=bool, default=False, nargs="?", const=True,
        help="the guarantee also holds within every group of the task with enough rows",
    )  # fmt: skip
    add(
        "--per_depth", type=bool, default=False, nargs="?", const=True,
        help="the guarantee also holds for the rows that exit at or before each layer",
    )  # fmt: skip
    add(
        "--small_groups", type=str | None, default=None,
        help="with --per_group, how to treat groups that are too small to test: never_exit (the "
        "full model answers their rows, and predict then needs each row's group; default) or "
        "exclude (not covered by the guarantee)",
    )  # fmt: skip
    add(
        "--cost", type=str, default="flops",
        help="what to save: flops, or time, for which the model's parts are timed on this machine "
        "against a second load of the original model; profile then checks the prediction",
    )  # fmt: skip
    add(
        "--batch_size", type=int | None, default=None,
        help="prompts in a batch as you will serve them: with --cost time (default 8) or "
        "--for generate (default 1)",
    )  # fmt: skip
    add(
        "--prompt_length", type=int | None, default=None,
        help="with --cost time, tokens of each prompt; default: the validation prompts' median",
    )  # fmt: skip
    add(
        "--plan",
        type=bool,
        default=False,
        nargs="?",
        const=True,
        help="only report how many rows the budget needs and what these data can prove; loads no "
        "model and needs no heads",
    )
    parsed = parse(parser, arguments, early=_find_what_it_reads)

    from lspade_train.artifacts.card import write_card
    from lspade_train.policies.selection import calibrate as choose
    from lspade_train.probes.heads import LSpadeHeads
    from lspade_train.training.datamodule import HiddenStateDataModule

    recipe, options = parsed.recipe, parsed.options
    if options.plan or options["for"] == "generate":
        (_print_plan if options.plan else calibrate_drafting)(parsed)
        return
    folder = heads_given(parsed, written_by="calibrate")
    heads = LSpadeHeads.from_pretrained(folder)
    data = HiddenStateDataModule(
        recipe.data, recipe.model.layers, seed=recipe.seed_everything, name=recipe.name
    )
    asked = {name: options[name] for name in OPTIONS}
    if options.cost == "time":
        from lspade_train.profiling import measure_seconds

        shape = {name: options[name] for name in ("batch_size", "prompt_length", "scope")}
        asked["cost"] = measure_seconds(data, heads, **shape)
    found = choose(data, heads, **asked, seed=recipe.seed_everything)
    _print_kinds(found)
    found.policy.save(folder)
    write_card(folder)
    sys.stdout.write(f"{_verdict(found)}\n")
    log.info("policy: %s", folder / "policy.json")
    heads_kept = [option for option in parsed.own if option != "--heads"]
    log.info("next:   %s", another("evaluate", parsed.arguments, without=heads_kept))


def _check_cost(options: Any) -> None:
    """Refuse a cost that is not known, and shapes that nothing is timed for."""
    if options.cost not in ("flops", "time"):
        raise RecipeError(f"--cost is {options.cost!r}; expected flops or time.")
    shaped = [name for name in ("batch_size", "prompt_length") if options[name] is not None]
    if shaped and options.cost == "flops" and options["for"] != "generate":
        raise RecipeError(f"--{shaped[0]} sets the shape that is timed: give it with --cost time.")


def _find_what_it_reads(parsed: Parsed) -> None:
    """Model and heads, but for a plan, which reads neither."""
    check_purpose(parsed.options)
    _check_cost(parsed.options)
    if not parsed.options.plan:
        find_heads(parsed)


def _print_plan(parsed: Parsed) -> None:
    """How many rows the budget needs, and what the rows at hand can prove."""
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
        "answers lost", f"rows needed for {what} of at most {budget:g}",
        f"smallest budget with {found.rows:,} rows",
        title=f"{found.confidence:.0%} confidence; {found.rows:,} rows to test on "
        f"({found.side.words})",
    )  # fmt: skip
    for losses, needed in found.needed.items():
        least = found.provable[losses]
        table.add_row(f"{losses}", f"{needed:,}", "none" if least is None else f"{least:.4f}")
    Console(width=max(Console().width, 100)).print(table)
    if found.losses is None:
        words = (
            f"{found.rows:,} rows are too few: at least {found.needed[0]:,} are needed even if no "
            "answer is lost. Add rows or raise the budget."
        )
    elif risk == "accuracy_drop":
        words = (
            f"With these {found.rows:,} rows, a policy passes if it gets at most {found.losses:,} "
            "answers wrong that the full model gets right (more if it also corrects some)."
        )
    else:
        words = (
            f"With these {found.rows:,} rows, a policy passes if at most {found.losses:,} of its "
            "answers differ from the full model's."
        )
    sys.stdout.write(f"{words}\n")


def _print_kinds(found: "Selection") -> None:
    """One row per kind of policy, by what it saves; the chosen one is marked."""
    from rich.console import Console

    from lspade_train.cli.printing import WIDTH, new_table

    result, policy = found.calibration, found.policy
    in_time = result.chosen.time_saved is not None
    table = new_table(
        "criterion -> answer", "checks", "acc.", "drop", "differs", "mean\nexit",
        *(["time\nsaved"] if in_time else []), "FLOPs\nsaved", "of\noracle", "p",
        title=f"over the {policy.scope}; {result.n:,} rows ({found.side.words}), "
        f"used for selection; an oracle saves {result.oracle_saving:.1%}"
        + (" of the time" if in_time else ""),
    )  # fmt: skip
    table.caption = (
        f"{MARK.strip()}: chosen; differs: fraction of answers that differ from the full model's; "
        "p: p-value of its test"
    )
    table.columns[0].no_wrap = True
    chosen = result.chosen
    others = [row for row in found.kinds if row.name != chosen.name]
    rows = [*others, chosen] if chosen.threshold is not None else others
    for row in [found.never, *sorted(rows, key=lambda row: row.saved)]:
        name, *cells = _cells(row)
        is_chosen = row is chosen or (row is found.never and chosen.threshold is None)
        mark = MARK if is_chosen else " " * len(MARK)
        table.add_row(mark + name, *cells, style="bold" if is_chosen else None)
    console = Console()
    Console(width=max(console.width, WIDTH + 8 * in_time)).print(table)


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
        *([] if row.time_saved is None else [number(row.time_saved, ".1%")]),
        number(row.compute_saved, ".1%"),
        number(row.efficiency, ".0%"),
        number(row.p_value, ".3f"),
    ]


def _verdict(found: "Selection") -> str:
    """The choice in words: what it saves and what is guaranteed."""
    from lspade_train.policies.promise import promise

    result = found.calibration
    chosen = result.chosen
    if chosen.threshold is None:
        return f"{result.reason}{_shape(found)}"
    layers = ", ".join(map(str, chosen.layers))
    saves = (
        f"{chosen.compute_saved:.1%} of the FLOPs saved "
        f"({1 / (1 - chosen.compute_saved):.2f}x fewer)"
    )
    if chosen.time_saved is not None:
        saves = (
            f"{chosen.time_saved:.1%} of the time saved ({1 / (1 - chosen.time_saved):.2f}x "
            f"faster), {chosen.compute_saved:.1%} of the FLOPs"
        )
    return (
        f"Chosen: {chosen.name}. {saves}, mean exit at layer "
        f"{chosen.mean_exit_layer:.2f}; checks at {layers}.{_shape(found)}\n"
        "These numbers are optimistic: the policy was selected on the same rows. Run evaluate for "
        "held-out results.\n"
        f"Guarantee: {promise(found.policy.calibration)}"
    )


def _shape(found: "Selection") -> str:
    """What the time is of, where it is the cost."""
    from lspade_train.policies.seconds import Seconds

    record = found.policy.calibration.get("seconds")
    if record is None:
        return ""
    seconds = Seconds.from_json(record)
    return (
        f"\nTime: predicted for {seconds.shape} on {seconds.where}; lspade-train profile times it."
    )
