"""`compare`: results of several heads folders in one table and one figure."""

import argparse
import logging
from pathlib import Path

log = logging.getLogger(__name__)

COMPARE = """\
Results of several heads folders in one table and one figure. Each needs a results.json, which
lspade-train evaluate writes."""


def compare(arguments: list[str]) -> None:
    """Print and draw the `results.json` of several folders."""
    parser = argparse.ArgumentParser(prog="lspade-train compare", description=COMPARE)
    parser.add_argument("folders", nargs="+", help="heads folders or URLs that were evaluated")
    parser.add_argument(
        "--output", type=Path, default=Path("compare.png"), help="PNG of the figure"
    )
    options = parser.parse_args(arguments)

    from lspade_train.io.fetch import local_folder
    from lspade_train.io.layout import read_results
    from lspade_train.io.remote import is_remote

    places = {
        given: local_folder(given) if is_remote(given) else Path(given) for given in options.folders
    }
    found = {given: read_results(folder) for given, folder in places.items()}

    from lspade_train.cli.printing import print_comparison
    from lspade_train.evaluation.comparison import comparable
    from lspade_train.reporting.plots import compare_accuracy

    results = comparable(found)
    print_comparison(results)
    log.info("figure: %s", compare_accuracy(results, options.output))
