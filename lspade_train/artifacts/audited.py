"""A heads folder whose policy is audited: restates its guarantee, or adopts a stricter policy.

Independent of models.
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
    """Update the audit's results in `policy.json` and the card.

    Returns:
        Whether anything changed.

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
    """Replace the audited policy with a stricter one, keeping the old files under other names.

    Args:
        policy: the stricter policy.
        folder: folder of the audited policy.
        state: the audit's state, which is moved aside with its rows.

    Returns:
        Where the audited policy, the state and its rows are kept.

    Raises:
        AuditError: a file cannot be written or moved.
        PolicyError: `policy.json` cannot be written.
    """
    tag = policy_digest(ExitPolicy.load(folder))[:8]
    # Save the old policy before writing the new one. Move the audit last: if killed before that,
    # the audit left behind still names the policy it belongs to.
    kept = [_unused_path(folder / f"policy-{tag}.json")]
    write_text(kept[0], (folder / POLICY).read_text(encoding="utf-8"), AuditError)
    policy.save(folder)
    for path in (state, rows_file(state)):
        place = _unused_path(path.with_name(path.name.replace(".", f"-{tag}.", 1)))
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


def _unused_path(path: Path) -> Path:
    """This path, or the next one that does not exist."""
    number = 1
    found = path
    while found.exists():
        number += 1
        stem, dot, rest = path.name.partition(".")
        found = path.with_name(f"{stem}-{number}{dot}{rest}")
    return found
