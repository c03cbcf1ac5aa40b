"""`audit`: the results of an audit of a policy in production, and a stricter policy from them."""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from lspade_train.errors import AuditError

log = logging.getLogger(__name__)

AUDIT = """\
Report the results of an audit of a policy in production: rows, exit layers against calibration,
disagreement with the full model with a confidence sequence, alarm or not, and how many rows it
would take to notice a shift. predict --audit and ExitRuntime(..., audit=Audit(...)) write the
state. If the state file is next to policy.json, the audit period is recorded in policy.json and
the model card.

--recalibrate tests the policy, and stricter ones, on the audited rows, and replaces policy.json by
the one that saves the most compute within the budget; the old policy is kept as a backup."""


def audit(arguments: list[str]) -> None:
    """Print an audit's state, and choose a stricter policy if requested."""
    options = _options(arguments)
    if not options.state.exists():
        raise AuditError(
            f"{options.state} does not exist. predict --audit and "
            "ExitRuntime(..., audit=Audit(...)) write the state."
        )

    from lspade_train.io.tracking import wandb_is_on
    from lspade_train.policies.audit import STATE, AuditState
    from lspade_train.reporting.audit import audit_tables, verdict, write_html

    path = options.state / STATE if options.state.is_dir() else options.state
    state = AuditState.load(path)
    policy = _policy(options.policy, path, state)
    record = None if policy is None else policy.calibration
    _print(audit_tables(state, record), verdict(state, record))
    if options.html is not None:
        log.info("page: %s", write_html(state, record, options.html))
    if wandb_is_on():
        from lspade_train.integrations.wandb import log_audit

        log_audit(state, record, path.parent)
    _restate(path)
    if options.recalibrate:
        _recalibrate(options, path, state, policy)


def _options(arguments: list[str]) -> Any:
    parser = argparse.ArgumentParser(prog="lspade-train audit", description=AUDIT)
    add = parser.add_argument
    add("state", type=Path, help="JSON file, or a heads folder with audit.json")
    add(
        "--policy", type=Path, default=None,
        help="the policy.json that is audited, or its folder; default: the one beside the state",
    )  # fmt: skip
    add("--html", type=Path, default=None, help="write this page, too")
    add("--recalibrate", action="store_true", help="choose a stricter policy from the audited rows")
    add(
        "--max_disagreement", type=float, default=None,
        help="with --recalibrate, the budget; default: the audit's",
    )  # fmt: skip
    add(
        "--confidence", type=float, default=None,
        help="with --recalibrate, probability that the guarantee holds; default: 0.95",
    )  # fmt: skip
    add(
        "--since", default=None,
        help="with --recalibrate, leave out rows before this time, such as 2026-03-01 (UTC); "
        "choose it from what you know about the prompts, not by trying which gives the better "
        "policy",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    given = [
        n for n in ("max_disagreement", "confidence", "since") if getattr(options, n) is not None
    ]
    if given and not options.recalibrate:
        parser.error(f"--{given[0]} requires --recalibrate")
    return options


def _policy(given: Path | None, path: Path, state: Any) -> Any:
    """The audited policy; None if it is not available."""
    from lspade_train.io.layout import POLICY
    from lspade_train.policies.audit import policy_digest
    from lspade_train.policies.policy import ExitPolicy

    place = path.parent if given is None else given
    if given is None and not (place / POLICY).exists():
        return None
    policy = ExitPolicy.load(place)
    if policy_digest(policy) == state.key.policy:
        return policy
    if given is None:
        return None
    raise AuditError(
        f"{path} belongs to a different policy than {given}. Give the matching one with --policy."
    )


def _restate(path: Path) -> None:
    """Record the audit in the policy beside its state."""
    from lspade_train.artifacts.audited import restate
    from lspade_train.errors import LSpadeError
    from lspade_train.policies.audit import STATE

    if path.name != STATE:
        return
    try:
        if restate(path.parent):
            log.info("%s: recorded this audit in policy.json and the model card", path.parent)
    except LSpadeError as cause:  # such as a read-only folder
        log.warning("this audit was not recorded in policy.json: %s", cause)


def _recalibrate(options: Any, path: Path, state: Any, policy: Any) -> None:
    """Choose a policy from the audited rows, print its guarantee, and write it."""
    from lspade_train.artifacts.audited import adopt
    from lspade_train.policies.audit import LEVEL
    from lspade_train.policies.audited_rows import load, rows_file
    from lspade_train.policies.recalibration import limits_of, recalibrate, since

    if policy is None:
        raise AuditError(f"The policy that {path} belongs to is not beside it; give --policy.")
    place: Path = options.policy or path.parent
    folder = place if place.is_dir() else place.parent
    audited = since(load(rows_file(path)), state.key.policy, options.since)
    given = options.max_disagreement is not None
    budget = options.max_disagreement if given else state.key.budget
    confidence = LEVEL if options.confidence is None else options.confidence
    found = recalibrate(policy, audited, budget, confidence)
    chosen, result = found.policy, found.calibration
    say = sys.stdout.write
    say(
        f"\nRecalibrated on {found.rows:,} audited rows, for a disagreement of at most "
        f"{budget:.2%} ({'given' if given else 'the budget of the audit'}).\n"
    )
    if any(one["kind"] == "depth" for one in policy.calibration.get("conditions") or ()):
        say("The guarantee by depth was dropped: it cannot be renewed from audited rows.\n")
    if found.unchanged:
        say("The current policy passes the test; policy.json is unchanged.\n")
        say(f"On these rows: {chosen.calibration['promise']}\n")
        return
    if chosen.threshold is None:
        say(f"{result.reason}\n")
    else:
        limits = ", ".join(f"{x:.4g}" for x in limits_of(chosen))
        say(
            f"Chosen: checks at {', '.join(map(str, chosen.layers))}, thresholds {limits}; "
            f"{result.chosen.compute_saved:.1%} of the FLOPs saved on these rows.\n"
        )
    kept = adopt(chosen, folder, path)
    say(f"Guarantee: {chosen.calibration['promise']}\n")
    log.info("policy: %s; before: %s", folder / "policy.json", ", ".join(p.name for p in kept))
    log.info("Restart any services that still use the old policy.")


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
