"""`audit`: what an audit has seen of a policy in use."""

import argparse
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

AUDIT = """\
What an audit has seen of a policy in use: rows, exits by layer against calibration, disagreement
with the full model with a confidence sequence, alarm or not, and how many rows it would take to
notice a shift. predict --audit and ExitRuntime(..., audit=Audit(...)) write the state."""


def audit(arguments: list[str]) -> None:
    """Print an audit's state."""
    parser = argparse.ArgumentParser(prog="lspade-train audit", description=AUDIT)
    parser.add_argument("state", type=Path, help="JSON file, or a heads folder with audit.json")
    parser.add_argument(
        "--policy", type=Path, default=None,
        help="the policy.json that is audited, or its folder; default: the one beside the state",
    )  # fmt: skip
    parser.add_argument("--html", type=Path, default=None, help="write this page, too")
    options = parser.parse_args(arguments)

    from lspade_train.policies.audit import STATE, AuditState
    from lspade_train.reporting.audit import audit_tables, verdict, write_html

    path = options.state / STATE if options.state.is_dir() else options.state
    state = AuditState.load(path)
    record = _calibration(options.policy, path, state)
    _print(audit_tables(state, record), verdict(state, record))
    if options.html is not None:
        log.info("page: %s", write_html(state, record, options.html))


def _calibration(given: Path | None, path: Path, state: Any) -> dict[str, Any] | None:
    """How the audited policy was calibrated; None where it is not at hand."""
    from lspade_train.errors import AuditError
    from lspade_train.io.layout import POLICY
    from lspade_train.policies.audit import policy_digest
    from lspade_train.policies.policy import ExitPolicy

    place = path.parent if given is None else given
    if given is None and not (place / POLICY).exists():
        return None
    policy = ExitPolicy.load(place)
    if policy_digest(policy) == state.key.policy:
        return policy.calibration
    if given is None:
        return None
    raise AuditError(f"{path} audits another policy than {given}. Give that one with --policy.")


def _print(tables: list[Any], lines: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(Console().width, 100))
    for table in tables:
        if not table.rows:
            continue
        shown = Table(*table.columns, title=table.title, title_justify="left")
        for column in shown.columns[1:]:
            column.justify = "right"
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    for line in lines:
        console.print(line, highlight=False)
