"""A heads folder whose policy is audited: its guarantee restated, or a stricter policy adopted.

Knows nothing of models.
"""

from pathlib import Path

from lspade_train.artifacts.card import write_card
from lspade_train.errors import AuditError, PolicyError
from lspade_train.io.layout import CONFIG, POLICY
from lspade_train.io.storage import read_json, write_json, write_text
from lspade_train.policies.audit import audit_of, policy_digest
from lspade_train.policies.audited_rows import rows_file
from lspade_train.policies.policy import ExitPolicy
from lspade_train.policies.promise import promise


def restate(folder: Path) -> bool:
    """Have `policy.json` and the card say until when, and on how many rows, it was audited.

    Returns:
        Whether they say something else now.

    Raises:
        PolicyError: `policy.json` is damaged or cannot be written.
        ArtifactError: the card cannot be written.
    """
    state = audit_of(folder)
    values = read_json(folder / POLICY, PolicyError) if state is not None else {}
    record = values.get("calibration") or {}
    words = promise(record, state)
    if state is None or not record.get("confidence") or record.get("promise") == words:
        return False
    write_json(folder / POLICY, values | {"calibration": record | {"promise": words}}, PolicyError)
    if (folder / CONFIG).exists():
        write_card(folder)
    return True


def adopt(policy: ExitPolicy, folder: Path, state: Path) -> list[Path]:
    """Put a stricter policy in the place of the audited one; nothing that was there is lost.

    Args:
        policy: the stricter one.
        folder: of the audited one.
        state: the audit's, which is about the audited one and moves aside with its rows.

    Returns:
        Where the audited policy, the state and its rows are kept.

    Raises:
        AuditError: a file cannot be written or moved.
        PolicyError: `policy.json` cannot be written.
    """
    tag = policy_digest(ExitPolicy.load(folder))[:8]
    # The old policy is safe before the new one is written; the audit goes last, as a kill before
    # that leaves one which names the policy that it was about.
    kept = [_free(folder / f"policy-{tag}.json")]
    write_text(kept[0], (folder / POLICY).read_text(encoding="utf-8"), AuditError)
    policy.save(folder)
    for path in (state, rows_file(state)):
        place = _free(path.with_name(path.name.replace(".", f"-{tag}.", 1)))
        try:
            path.replace(place)
        except OSError as cause:
            raise AuditError(
                f"{path} cannot be moved to {place} ({cause}). It belongs to the old policy: move "
                "it away to start a new audit."
            ) from cause
        kept.append(place)
    if (folder / CONFIG).exists():
        write_card(folder)
    return kept


def _free(path: Path) -> Path:
    """This name, or the next one that is not taken."""
    number = 1
    found = path
    while found.exists():
        number += 1
        stem, dot, rest = path.name.partition(".")
        found = path.with_name(f"{stem}-{number}{dot}{rest}")
    return found
