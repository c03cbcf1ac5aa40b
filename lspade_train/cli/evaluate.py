"""`evaluate`: runs all experiments on cached hidden states; prints, writes and plots results."""

import logging
import time
from typing import Any

from lspade_train.cli.again import another
from lspade_train.cli.options import find_heads, heads_given, heads_option
from lspade_train.cli.parsing import command_parser, parse

log = logging.getLogger(__name__)

EVALUATE = """\
The logit lens, the tuned lens (where one was fitted with --model.target final), L-SPADE and SPADE
against the full model, layer by layer: accuracy, agreement, KL and calibration, with intervals;
SPADE-EXIT over thresholds; accuracy at equal FLOPs. Reads cached states, builds the split's cache
if it is missing, and writes results.json, figures/ and report.html into the heads folder.

  lspade-train evaluate --config recipes/arc.yaml
  lspade-train evaluate --config recipes/arc.yaml --cross recipes/boolq.yaml,recipes/text.yaml
  lspade-train evaluate --config recipes/arc.yaml --baselines true
  lspade-train evaluate --config recipes/arc.yaml --ablations true"""


def evaluate(arguments: list[str]) -> None:
    """Measure and write `results.json`."""
    began = time.monotonic()
    parser = command_parser("evaluate", EVALUATE, with_trainer="--help" not in arguments)
    add = parser.add_argument
    heads_option(parser)
    add(
        "--split",
        type=str | None,
        default=None,
        help="split to measure; default: test, or validation if test has no labels",
    )
    add(
        "--cross",
        type=str | None,
        default=None,
        help="comma-separated recipes of other tasks with trained heads: evaluates the heads and "
        "threshold of each task on every other task",
    )
    add(
        "--baselines",
        type=bool,
        default=False,
        help="also evaluate other early-exit methods (a fixed layer, a linear probe, one entropy "
        "threshold, patience, an SVM over statistics); reads the training and validation rows",
    )
    add(
        "--examples",
        type=int,
        default=8,
        help="rows kept, with the end of their prompt, where the policy answers unlike the full "
        "model; 0 for data that results and report must not hold",
    )
    add(
        "--ablations",
        type=bool,
        default=False,
        help="also change SPADE's start token, the heads' form and target, and the number of "
        "training rows, one at a time; trains heads, resumes",
    )
    parsed = parse(parser, arguments, early=find_heads)

    from lspade_train.artifacts.card import write_card
    from lspade_train.cli.printing import (
        print_ablations,
        print_baselines,
        print_cross_task,
        print_results,
    )
    from lspade_train.evaluation.run import FittedRecipe, evaluate_recipe
    from lspade_train.integrations.wandb import log_results
    from lspade_train.io.layout import POLICY, write_results
    from lspade_train.reporting.page import write_report
    from lspade_train.reporting.plots import write_figures

    recipe, options = parsed.recipe, parsed.options
    folder = heads_given(parsed, written_by="evaluate")
    fitted = FittedRecipe(recipe, folder, options.split)
    others = _others(options.cross, fitted)
    results = evaluate_recipe(fitted, baselines=options.baselines, examples=options.examples)
    print_results(results)
    if results["baselines"]:
        print_baselines(results)
    if others:
        results["cross_task"] = _cross(fitted, others)
        print_cross_task(results["cross_task"])
    if options.ablations:
        results["ablations"] = _ablations(fitted)
        print_ablations(results["ablations"], results["layers"])
    results["provenance"]["seconds"] = round(time.monotonic() - began, 1)
    write_results(folder, results)
    images = write_figures(results, folder / "figures")
    write_card(folder)
    report = write_report(folder)
    log_results(results, folder, images)
    log.info("results: %s", folder / "results.json")
    log.info("figures: %s", folder / "figures")
    log.info("report:  %s", report)
    if not (folder / POLICY).exists():
        heads_kept = [option for option in parsed.own if option != "--heads"]
        log.info("next:    %s", another("calibrate", parsed.arguments, without=heads_kept))


def _others(names: str | None, fitted: Any) -> list[Any]:
    """The recipes in `--cross`, opened; a model that they share is loaded once."""
    from lspade_train.evaluation.cross_task import require_one_model
    from lspade_train.evaluation.run import FittedRecipe
    from lspade_train.recipe import heads_folder

    found: list[Any] = []
    for name in (names or "").split(","):
        if name.strip():
            parser = command_parser("evaluate", EVALUATE, with_trainer=True)
            recipe = parse(parser, ["--config", name.strip()]).recipe
            folder = heads_folder(recipe)
            found.append(FittedRecipe(recipe, folder, beside=[fitted, *found]))
    if found:
        require_one_model([fitted, *found])  # before hours of work
    return found


def _cross(fitted: Any, others: list[Any]) -> dict[str, Any]:
    from lspade_train.evaluation.cross_task import cross_task
    from lspade_train.io.progress import track

    def bar(items: Any) -> Any:
        return track(items, "heads on other tasks", len(items), "tasks")

    return cross_task([fitted, *others], bar)


def _ablations(fitted: Any) -> dict[str, Any]:
    from lspade_train.evaluation.ablations import run_ablations
    from lspade_train.io.progress import track

    def bar(items: Any) -> Any:
        return track(items, "ablations", len(items), "runs")

    return run_ablations(fitted, bar)
