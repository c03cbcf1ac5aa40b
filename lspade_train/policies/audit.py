"""The state of an audit of a policy in use: a small JSON file that several processes share.

Counts only, never prompts or answers. Independent of models and of how rows are sampled.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from filelock import FileLock
from scipy.stats import beta

from lspade_train.errors import AuditError, PolicyError
from lspade_train.io.storage import (
    json_digest,
    read_json,
    require_kinds,
    require_writable,
    write_json,
)
from lspade_train.policies.audited_rows import (
    AuditedRow,
    append,
    require_policy,
    rows_file,
    utc_now,
)
from lspade_train.policies.policy import ExitPolicy
from lspade_train.policies.sequential import (
    add_to_blocks,
    confidence_sequence,
    log_evidence,
    rows_until_alarm,
)

FORMAT_VERSION = 1
STATE = "audit.json"
"""File name of the state, beside a policy."""

LEVEL = 0.95
"""Confidence of the bound that is used if a policy guarantees nothing about disagreement."""

log = logging.getLogger(__name__)

ELSEWHERE = "Give another state file, or move this one away to begin a new audit."


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Counts of some rows.

    Attributes:
        rows: all rows.
        exited: rows that exited below L.
        exits: exit layer -> rows, including L.
        drawn: rows sampled for the audit, whether they exited or not.
        audited: sampled rows that had exited and were also run through the full model.
        failures: audited rows where the full model's answer differs.
        unaudited: rows answered by the full model after an alarm; not counted in `rows`.
        flops: operations of the full model on these rows, of the policy, and of the audit.
    """

    rows: int = 0
    exited: int = 0
    exits: Mapping[int, int] = field(default_factory=dict[int, int])
    drawn: int = 0
    audited: int = 0
    failures: int = 0
    unaudited: int = 0
    flops: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __add__(self, other: "Seen") -> "Seen":
        values = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in COUNTS}
        flops = tuple(a + b for a, b in zip(self.flops, other.flops, strict=True))
        exits = Counter(self.exits) + Counter(other.exits)
        return Seen(**values, exits=dict(sorted(exits.items())), flops=flops)  # type: ignore[arg-type]


COUNTS = [f for f in fields(Seen) if f.name not in {"exits", "flops"}]


@dataclass(frozen=True, kw_only=True)
class AuditKey:
    """Identifies an audit, so that counts of different policies or budgets are never mixed.

    Attributes:
        policy: `policy_digest` of the policy.
        heads: `weights_sha256` of the heads; None if unknown.
        budget: largest disagreement with the full model that does not call for an alarm.
        alpha: probability of ever raising a false alarm, over any number of looks.
    """

    policy: str
    heads: str | None
    budget: float
    alpha: float

    def __post_init__(self) -> None:
        for name in ("budget", "alpha"):
            if not 0 < getattr(self, name) < 1:
                raise AuditError(
                    f"The audit's {name} is {getattr(self, name)}; expected over 0 and under 1."
                )


@dataclass(frozen=True, kw_only=True)
class AuditState:
    """An audit so far.

    Attributes:
        key: identifies the audit.
        seen: counts over all rows.
        blocks: sampled rows and failures per block, for the sequential test.
        began: time of the first row, UTC.
        updated: time of the last update, UTC.
        alarm: time of the alarm and the counts at that time; None: no alarm. Never cleared.
    """

    key: AuditKey
    seen: Seen = field(default_factory=Seen)
    blocks: tuple[tuple[int, int], ...] = ()
    began: str | None = None
    updated: str | None = None
    alarm: Mapping[str, Any] | None = None

    @property
    def log_evidence(self) -> float:
        """Log evidence against "disagreement within the budget"; alarm at `log(1 / alpha)`."""
        return log_evidence(self.blocks, self.key.budget)

    @property
    def disagreement(self) -> float | None:
        """Fraction of sampled rows that the full model answers differently; None without rows."""
        return self.seen.failures / self.seen.drawn if self.seen.drawn else None

    @property
    def bounds(self) -> tuple[float, float]:
        """Confidence sequence for the disagreement at 1 - alpha, assuming it is constant."""
        return confidence_sequence(self.seen.failures, self.seen.drawn, self.key.alpha)

    def rows_until_alarm(self, disagreement: float, rate: float | None = None) -> float:
        """Further rows until an alarm at that disagreement; about half of all alarms come earlier.

        Args:
            disagreement: true rate from now on.
            rate: fraction of rows to sample; None: the fraction so far.
        """
        most = 10**6
        drawn = rows_until_alarm(
            disagreement, self.key.budget, self.key.alpha, self.blocks, most=most
        )
        share = self.seen.drawn / self.seen.rows if rate is None and self.seen.rows else rate
        return drawn / share if share and drawn < most else math.inf

    def plus(self, seen: Seen) -> Self:
        """The state after further rows; raises the alarm if the evidence now suffices."""
        now = utc_now()
        found = replace(
            self,
            seen=self.seen + seen,
            blocks=add_to_blocks(self.blocks, seen.drawn, seen.failures),
            began=self.began or now,
            updated=now,
        )
        if self.alarm is not None or found.log_evidence < math.log(1 / self.key.alpha):
            return found
        counts = {name: getattr(found.seen, name) for name in ("rows", "drawn", "failures")}
        return replace(found, alarm={"time": now, **counts})

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, lists and dictionaries."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a state.

        Raises:
            AuditError: missing, damaged, or of an unknown format.
        """
        value: Any = read_json(path, AuditError, ELSEWHERE if path.exists() else "")
        version = value.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise AuditError(
                f"{path} has format_version {version!r}; an audit's state has {FORMAT_VERSION}.\n"
                f"{ELSEWHERE}"
            )
        require_kinds(value, {"key": dict, "seen": dict, "blocks": list}, path, AuditError)
        try:
            seen = value["seen"]
            exits = {int(layer): _count(rows) for layer, rows in seen.pop("exits").items()}
            flops = tuple(map(float, seen.pop("flops")))
            counts = Seen(**{k: _count(v) for k, v in seen.items()}, exits=exits, flops=flops)  # type: ignore[arg-type]
            blocks = tuple((_count(n), _count(failures)) for n, failures in value["blocks"])
            value |= {"key": AuditKey(**value["key"]), "seen": counts, "blocks": blocks}
            state = cls(**value)
            _check_sums(state)
        except (TypeError, ValueError, AttributeError, KeyError, AuditError) as cause:
            raise AuditError(f"{path} is not an audit's state ({cause}).\n{ELSEWHERE}") from cause
        return state


class AuditFile:
    """An audit's state on disk. Updates are atomic and locked; a kill loses none of its counts.

    Args:
        path: the JSON file; created at the first update.
        key: identifies the audit.

    Raises:
        AuditError: the file is damaged, belongs to another audit, or cannot be written.
    """

    def __init__(self, path: str | Path, key: AuditKey) -> None:
        self.path, self.key = Path(path).expanduser(), key
        require_writable(self.path.parent, AuditError)
        self.state = self._read()
        self._failing = False
        if rows_file(self.path).exists():
            require_policy(rows_file(self.path), key.policy)

    def add(
        self, seen: Seen, rows: Sequence[AuditedRow] = (), flops: Mapping[str, Any] | None = None
    ) -> AuditState:
        """Add counts to those of all processes, and return the new state.

        Args:
            seen: further counts.
            rows: the sampled rows among them, kept in a file beside the state. If that cannot be
                written they are lost with a log message: the audit needs the counts only.
            flops: costs of the model's parts, as in `AuditedRows`; required with rows.

        Raises:
            AuditError: the file is damaged, belongs to another audit, or cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{self.path}.lock")
            lock.acquire()
        except OSError as cause:
            raise AuditError(f"{self.path} cannot be locked ({cause}).") from cause
        try:
            self.state = self._read().plus(seen)
            write_json(self.path, self.state.to_json(), AuditError)
            if rows:
                self._keep(rows, flops or {})
        finally:
            lock.release()
        return self.state

    def _keep(self, rows: Sequence[AuditedRow], flops: Mapping[str, Any]) -> None:
        try:
            append(rows_file(self.path), self.key.policy, flops, rows)
        except (OSError, AuditError) as cause:
            if not self._failing:
                log.warning("The audited rows are counted but not kept: %s", cause)
            self._failing = True

    def _read(self) -> AuditState:
        if not self.path.exists():
            return AuditState(key=self.key)
        state = AuditState.load(self.path)
        for name, asked in asdict(self.key).items():
            found = getattr(state.key, name)
            # The default budget is computed, and may differ in its last digit between machines.
            close = isinstance(asked, float) and math.isclose(found, asked, rel_tol=1e-9)
            if found != asked and not close:
                raise AuditError(
                    f"{self.path} belongs to another {name} ({_short(found)}; this one is "
                    f"{_short(asked)}).\n{ELSEWHERE}"
                )
        return state


def policy_digest(policy: ExitPolicy) -> str:
    """SHA-256 of what a policy does, excluding its calibration record."""
    values = {
        f.name: getattr(policy, f.name)
        for f in fields(policy)
        if f.name not in {"calibration", "gate"}
    }
    if policy.gate is not None and policy.gate_digest is None:  # not saved yet
        values["gate_digest"] = policy.gate.digest
    # Leave out unset fields, so that new settings do not change the digests of old policies.
    return json_digest({name: value for name, value in values.items() if value is not None})


def default_budget(policy: ExitPolicy) -> float:
    """The guaranteed disagreement, or an upper bound of the one measured at calibration.

    The bound is Clopper and Pearson's at 95%, on the calibration rows.

    Raises:
        AuditError: the policy has no calibration record.
    """
    record = policy.calibration
    try:
        if record["risk"] == "disagreement":
            return float(record["budget"])
        n, share = int(record["n"]), float(record["chosen"]["disagreement"])
    except (KeyError, TypeError, ValueError) as cause:
        raise AuditError(
            "The policy was not calibrated, so its expected disagreement with the full model is "
            "unknown.\nGive the audit a budget, such as 0.02, or choose a policy with "
            "lspade-train calibrate."
        ) from cause
    failures = round(share * n)
    return float(beta.ppf(LEVEL, failures + 1, n - failures)) if failures < n else 1 - 1e-9


def audit_of(folder: Path) -> AuditState | None:
    """The audit beside a policy, if there is one for exactly this policy."""
    try:
        state = AuditState.load(folder / STATE)
        same = state.key.policy == policy_digest(ExitPolicy.load(folder))
    except (AuditError, PolicyError):
        return None
    return state if same else None


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a number of rows")
    return value


def _check_sums(state: AuditState) -> None:
    """Raise if the counts are inconsistent."""
    seen = state.seen
    drawn, failures = (sum(block[i] for block in state.blocks) for i in (0, 1))
    fits = (
        (drawn, failures) == (seen.drawn, seen.failures)
        and sum(seen.exits.values()) == seen.rows
        and seen.exited <= seen.rows
        and seen.failures <= seen.audited <= seen.drawn <= seen.rows
        and len(seen.flops) == 3
    )
    alarm = state.alarm
    told = alarm is None or {"time", "rows", "drawn", "failures"} <= {*alarm}
    if not fits or not told:
        raise ValueError("its counts contradict each other")


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) else str(value)
