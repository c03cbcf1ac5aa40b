"""`evaluate` and `compare`: every experiment on cached states, printed, written and drawn."""

import logging
from pathlib import Path

from lspade_train.cli.parsing import command_parser, parse

log = logging.getLogger(__name__)

EVALUATE = """\
The logit lens, the tuned lens (where one was fitted with --model.target final), L-SPADE and SPADE
against the full model, layer by layer: accuracy, agreement, KL, calibration, each with its
interval; SPADE-EXIT over thresholds; accuracy at equal FLOPs.
Reads cached states, builds the split's cache where it is missing, and writes results.json and
figures/ into the heads folder.

  lspade-train evaluate --config recipes/arc.yaml
  lspade-train evaluate --config recipes/arc.yaml --cross recipes/boolq.yaml,recipes/text.yaml
  lspade-train evaluate --config recipes/arc.yaml --ablations true"""


def evaluate(arguments: list[str]) -> None:
    """Measure and write `results.json`."""
    parser = command_parser("evaluate", EVALUATE, with_trainer="--help" not in arguments)
    add = parser.add_argument
    add("--heads", type=str, default=None, help="heads folder; null: checkpoints/NAME")
    add(
        "--split",
        type=str,
        default=None,
        help="split to measure; null: test, or validation where test has no labels",
    )
    parsed = parse(parser, arguments)

    from lspade_train.artifact import heads_folder, write_results
    from lspade_train.card import write_card
    from lspade_train.cli.tables import print_results
    from lspade_train.evaluation.run import Subject, evaluate_recipe
    from lspade_train.plots import write_figures
    from lspade_train.report import write_report
    from lspade_train.tracking import log_results

    recipe, options = parsed.recipe, parsed.options
    folder = Path(options.heads) if options.heads else heads_folder(recipe)
    results = evaluate_recipe(Subject(recipe, folder, options.split))
    print_results(results)
    write_results(folder, results)
    figures = write_figures(results, folder / "figures")
    write_card(folder)
    report = write_report(folder)
    log_results(results, folder, figures)
    log.info("results: %s", folder / "results.json")
    log.info("figures: %s (%d files)", folder / "figures", len(figures))
    log.info("report:  %s", report)
