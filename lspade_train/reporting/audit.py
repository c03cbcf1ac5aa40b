"""An audit's state as tables, for the terminal and as one HTML file. Independent of models."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from lspade_train.errors import AuditError
from lspade_train.io.storage import write_text
from lspade_train.policies.audit import AuditState
from lspade_train.policies.promise import audited, promise
from lspade_train.policies.shift import calibrated_exits, shift_p_value
from lspade_train.reporting.tables import Table

RATES = (0.01, 0.02, 0.05)
"""Audit rates in the table of rows until an alarm."""


def audit_tables(state: AuditState, record: Mapping[str, Any] | None = None) -> list[Table]:
    """Counts, exit layers, and how long a shift would go unnoticed.

    Args:
        state: the audit's state.
        record: `calibration` of its policy; None if not available.
    """
    return [_seen(state), _exits(state, record or {}), _until(state)]


def verdict(state: AuditState, record: Mapping[str, Any] | None = None) -> list[str]:
    """The findings, as sentences."""
    lines = [audited(state) if record is None else promise(record, state)]
    p_value = shift_p_value(calibrated_exits(record or {}), state.seen.exits)
    if p_value is not None:
        lines.append(
            "Exit layers against calibration: chi-square p = "
            f"{p_value:.2g} (for one look; the alarm alone may be watched)."
        )
    return lines


def write_html(state: AuditState, record: Mapping[str, Any] | None, path: Path) -> Path:
    """Write one self-contained page.

    Raises:
        AuditError: the file cannot be written.
    """
    pages = Environment(loader=PackageLoader("lspade_train.reporting", ""), autoescape=True)
    page = pages.get_template("audit.html").render(
        state=state, lines=verdict(state, record), tables=audit_tables(state, record)
    )
    write_text(path, page, AuditError)
    return path


def _seen(state: AuditState) -> Table:
    seen, key = state.seen, state.key
    low, high = state.bounds
    model, policy, audit = seen.flops
    share = "-" if state.disagreement is None else f"{state.disagreement:.2%}"
    recent, failed = state.blocks[-1] if state.blocks else (0, 0)
    rows = [
        ("rows", f"{seen.rows:,}"),
        ("first of them (UTC)", state.began or "-"),
        ("last update (UTC)", state.updated or "-"),
        ("exited", f"{seen.exited:,}" + (f" ({seen.exited / seen.rows:.1%})" if seen.rows else "")),
        ("sampled", f"{seen.drawn:,}" + (f" ({seen.drawn / seen.rows:.2%})" if seen.rows else "")),
        ("early exits re-run on the full model", f"{seen.audited:,}"),
        ("disagreed with it", f"{seen.failures:,}"),
        ("disagreement", f"{share} [{low:.2%}, {high:.2%}] at {1 - key.alpha:.0%}, at any time"),
        ("in the last block of sampled rows", f"{failed:,} of {recent:,}"),
        ("budget", f"{key.budget:.2%}"),
        ("test statistic (e-value)", f"{_power(state.log_evidence)}; alarm at {1 / key.alpha:g}"),
        ("alarm", _alarm(state)),
    ]
    if seen.unaudited:
        rows.append(("answered by the full model since", f"{seen.unaudited:,}"))
    if model:
        rows += [
            ("FLOPs saved by exits", f"{1 - policy / model:.1%}"),
            ("FLOPs spent on the audit", f"{audit / model:.2%} of the full model's"),
        ]
    return Table("seen", "Seen", ("what", "value"), tuple(rows))


def _exits(state: AuditState, record: Mapping[str, Any]) -> Table:
    before, now = calibrated_exits(record), state.seen.exits
    total, base = sum(now.values()), sum(before.values())
    rows = tuple(
        (
            str(layer),
            f"{now.get(layer, 0):,}",
            f"{now.get(layer, 0) / total:.1%}" if total else "-",
            f"{before.get(layer, 0) / base:.1%}" if base else "-",
        )
        for layer in sorted({*before, *now})
    )
    columns = ("exit layer", "rows", "share", "share at calibration")
    return Table("exits", "Exits by layer", columns, rows)


def _until(state: AuditState) -> Table:
    budget = state.key.budget
    rates = sorted({rate for rate in (2 * budget, 5 * budget, 0.1, 0.3) if budget < rate < 1})
    rows = tuple(
        (f"{rate:.1%}", *(_count(state.rows_until_alarm(rate, audit)) for audit in RATES))
        for rate in rates
    )
    columns = ("disagreement from now on", *(f"audit {rate:.0%}" for rate in RATES))
    return Table("until", "Rows in use until an alarm, about", columns, rows)


def _alarm(state: AuditState) -> str:
    if state.alarm is None:
        return "no"
    alarm = state.alarm
    return (
        f"since {alarm['time']}: {alarm['failures']:,} of {alarm['drawn']:,} drawn rows, after "
        f"{alarm['rows']:,} rows"
    )


def _power(log_value: float) -> str:
    return f"{math.exp(log_value):.3g}" if log_value < 20 else f"10^{log_value / math.log(10):.0f}"


def _count(rows: float) -> str:
    return "never" if math.isinf(rows) else f"{round(rows, -1):,.0f}"
