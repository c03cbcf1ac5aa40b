"""The rows that an audit sampled, one line each, from which a stricter policy can be chosen.

Numbers only, never prompts or answers. The file's size is bounded: when it is full, the oldest half
is dropped. Independent of models.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lspade_train.errors import AuditError
from lspade_train.io.storage import write_text

FORMAT_VERSION = 1

MOST_BYTES = 4_000_000
"""Size limit of the file: some 30,000 rows of five checks."""

AGAIN = "Move it away, with the state beside it, to begin a new audit."


@dataclass(frozen=True, kw_only=True)
class AuditedRow:
    """One sampled row.

    Attributes:
        tokens: length of the prompt.
        choices: number of its choices; None without choices.
        shared: number of leading tokens that were run once for several prompts.
        group: its subgroup of the task; None if unknown.
        time: time of the row, UTC.
        values: the measure at each check layer, None for NaN; None for a row that did not exit.
        agrees: whether the answer at each check layer is the full model's; None for a row that did
            not exit.
    """

    tokens: int
    choices: int | None
    shared: int
    group: str | None
    time: str
    values: tuple[float | None, ...] | None = None
    agrees: tuple[bool, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class AuditedRows:
    """The file's content.

    Attributes:
        policy: `policy_digest` of the policy that was audited.
        flops: `FlopCounts` of the model and its heads, as JSON.
        rows: oldest first.
    """

    policy: str
    flops: Mapping[str, Any]
    rows: Sequence[AuditedRow]


def rows_file(state: Path) -> Path:
    """File of an audit's rows: `audit.rows.jsonl` beside `audit.json`."""
    return state.with_suffix(".rows.jsonl")


def utc_now() -> str:
    """The current time, in the format of rows and states."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def append(path: Path, policy: str, flops: Mapping[str, Any], rows: Sequence[AuditedRow]) -> None:
    """Append rows; the caller holds the state's lock.

    Raises:
        OSError: the file cannot be written.
        AuditError: its rows are of another policy, or it cannot be shortened.
    """
    lines = "".join(f"{json.dumps(asdict(row), allow_nan=False)}\n" for row in rows)
    if not path.exists():
        head = {"format_version": FORMAT_VERSION, "policy": policy, "flops": flops}
        write_text(path, f"{json.dumps(head)}\n{lines}", AuditError)
        return
    require_policy(path, policy)
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        if file.read(1) != b"\n":  # a kill left an incomplete line
            file.seek(0)
            size = file.read().rfind(b"\n") + 1
            file.truncate(size)
        file.seek(size)
        file.write(lines.encode())
    if size > MOST_BYTES:
        head, *kept = path.read_text(encoding="utf-8").splitlines()
        write_text(path, "\n".join([head, *kept[len(kept) // 2 :], ""]), AuditError)


def require_policy(path: Path, policy: str) -> None:
    """Refuse rows of another policy.

    Raises:
        AuditError: damaged, or of another policy.
    """
    with path.open("rb") as file:
        head = file.readline()
    try:
        found = json.loads(head)["policy"]
    except (TypeError, ValueError, KeyError) as cause:
        raise AuditError(f"{path} is not an audit's rows ({cause}).\n{AGAIN}") from cause
    if found != policy:
        raise AuditError(
            f"{path} holds rows of another policy ({found:.12}...; this one is {policy:.12}...).\n"
            f"{AGAIN}"
        )


def load(path: Path) -> AuditedRows:
    """Read the rows, ignoring an incomplete last line, as a kill may leave it.

    Raises:
        AuditError: missing, damaged, or of an unknown format.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as cause:
        raise AuditError(
            f"{path} cannot be read ({cause}). predict --audit and ExitRuntime(..., "
            "audit=Audit(...)) write it as they draw rows."
        ) from cause
    try:
        head, *lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
        version = head.pop("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version {version!r}, expected {FORMAT_VERSION}")
        return AuditedRows(**head, rows=[_row(line) for line in lines])
    except (TypeError, ValueError, AttributeError, KeyError) as cause:
        raise AuditError(f"{path} is not an audit's rows ({cause}).\n{AGAIN}") from cause


def _row(line: dict[str, Any]) -> AuditedRow:
    values, agrees = line.pop("values"), line.pop("agrees")
    if (values is None) != (agrees is None) or len(values or ()) != len(agrees or ()):
        raise ValueError("values and agrees do not fit together")
    return AuditedRow(
        **line,
        values=None if values is None else tuple(None if v is None else float(v) for v in values),
        agrees=None if agrees is None else tuple(map(bool, agrees)),
    )
