"""A policy's guarantee in words, for policy.json, model card, report and commands.

Made from the record of its calibration alone, without heavy imports.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lspade_train.policies.audit import AuditState

NONE = "No guarantee: this policy has not been calibrated. Run lspade-train calibrate."


def promise(record: Mapping[str, Any], audit: "AuditState | None" = None) -> str:
    """What is guaranteed, for which prompts, with which confidence; and the audit's results.

    Args:
        record: `calibration` of a policy.
        audit: audit of the same policy.
    """
    if not record.get("confidence"):
        return NONE
    words = f"{_what(record)} {_where(record)}{_within(record)}"
    return f"{words} {audited(audit)}" if audit is not None else words


def audited(audit: "AuditState") -> str:
    """The audit's results, in a sentence or two."""
    seen = audit.seen
    if audit.disagreement is None:
        return f"Audit running: none of {seen.rows:,} rows sampled yet."
    high = audit.bounds[1]
    words = (
        f"Audited {_days(audit.began, audit.updated)}: {seen.drawn:,} of {seen.rows:,} production "
        f"rows were sampled, {seen.failures:,} disagreed with the full model "
        f"({audit.disagreement:.2%}; at most "
        f"{high:.2%} with {1 - audit.key.alpha:.0%} confidence; budget {audit.key.budget:.2%})."
    )
    if audit.alarm is None:
        return f"{words} No alarm."
    alarm = audit.alarm["time"][:10]
    return f"{words} ALARM on {alarm}: the guarantee no longer holds for these prompts."


def _days(first: str | None, last: str | None) -> str:
    """Format two times, such as `from 2026-03-01 to 2026-03-05`."""
    begin, end = (first or last or "")[:10], (last or "")[:10]
    return f"on {end}" if begin == end else f"from {begin} to {end}"


def _what(record: Mapping[str, Any]) -> str:
    surely = f"with {record['confidence']:.0%} confidence"
    if _never_exits(record):
        return "The policy never exits: every answer is the full model's."
    if record["risk"] == "disagreement":
        return (
            f"At most {record['budget'] * 100:g}% of the answers differ from the full model's, "
            f"{surely}"
        )
    return f"The accuracy is at most {_points(record['budget'])} below the full model's, {surely}"


def _points(share: float) -> str:
    """Format a fraction, such as `1 percentage point`."""
    value = f"{share * 100:g}"
    return f"{value} percentage point{'' if value == '1' else 's'}"


def _where(record: Mapping[str, Any]) -> str:
    if record.get("audited"):
        days = _days(record["audited"]["first"], record["audited"]["last"])
        if _never_exits(record):
            return f"Chosen on {record['n']:,} production rows sampled by the audit {days}."
        return (
            f"for prompts from the same distribution as the {record['n']:,} production rows on "
            f"which it was tested (sampled by the audit {days}). Other prompts are not covered."
        )
    rows = record.get("rows") or {}
    split = rows.get("split", "validation")
    half = "" if rows.get("part", "all") == "all" else f", {rows['part'].replace('_', '-')} half"
    task = f" of {rows['task']}" if rows.get("task") else ""
    if _never_exits(record):
        return f"Chosen on {record['n']:,} rows ({split} split{half}{task})."
    return (
        f"for prompts from the same distribution as the {record['n']:,} rows on which it was "
        f"tested ({split} split{half}{task}). Other prompts are not covered."
    )


def _within(record: Mapping[str, Any]) -> str:
    """For which groups and depths the guarantee holds, and for which it does not."""
    found: Sequence[Mapping[str, Any]] = record.get("conditions") or ()
    words = ""
    for kind, what in (("group", "within the group"), ("depth", "for exits up to layer")):
        held = [f"{c['name']} ({c['n']:,} rows)" for c in found if c["kind"] == kind and c["held"]]
        out = [
            f"{c['name']} ({c['n']:,} rows)" for c in found if c["kind"] == kind and not c["held"]
        ]
        plural = "s" if kind == "group" else ""
        if out and kind == "group" and record.get("small_groups") == "never_exit":
            words += (
                f" Rows of other groups ({', '.join(out)}) never exit: too few rows to prove it "
                "for them."
            )
            out = []
        if held:
            words += f" The same holds {what}{plural if len(held) > 1 else ''} {', '.join(held)}."
        if out:
            words += (
                f" It is NOT guaranteed {what}{plural if len(out) > 1 else ''} {', '.join(out)}: "
                "too few rows to prove it."
            )
    return words


def _never_exits(record: Mapping[str, Any]) -> bool:
    return record.get("chosen", {}).get("threshold", 0.0) is None
