"""The heads folder as a whole: description, consistency check, push and pull.

`LSpadeHeads` reads and writes `heads.safetensors` and `config.json`; this module handles the other
files. Each file is complete or absent. Independent of training.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from lspade_train.artifacts import hub
from lspade_train.artifacts.card import ranges, write_card
from lspade_train.errors import ArtifactError
from lspade_train.io import fetch
from lspade_train.io.layout import CONFIG, POLICY, RESULTS, TUNED_LENS, known_files, read_results
from lspade_train.io.storage import read_json, require_kinds
from lspade_train.policies.audit import audit_of
from lspade_train.policies.policy import ExitPolicy
from lspade_train.policies.promise import promise
from lspade_train.probes.heads import AGAIN, KINDS, LSpadeHeads


def describe(folder: Path) -> dict[str, str]:
    """Describe a heads folder, from its files alone.

    Raises:
        ArtifactError: missing or damaged.
    """
    config = read_json(folder / CONFIG, ArtifactError)
    config: dict[str, Any] = {"base_model": {}, "training": {}, "layers": []} | config
    require_kinds(config, KINDS, folder / CONFIG, ArtifactError, AGAIN)
    try:
        base, training = config["base_model"], config["training"]
        recipe = training.get("recipe", {})
        rows = {
            "heads": f"{config.get('form')}, layers {ranges(config['layers'])}",
            "base model": f"{base.get('model_id')} @ {base.get('revision') or 'local files'}",
            "precision": str(base.get("dtype")),
            "task": str(recipe.get("data", {}).get("task")),
            "target": str(recipe.get("model", {}).get("target")),
            "steps": str(training.get("steps")),
            "made with": ", ".join(f"{k} {v}" for k, v in training.get("versions", {}).items()),
        }
    except (TypeError, ValueError, AttributeError) as cause:
        raise ArtifactError(
            f"{folder / CONFIG} is not a valid heads config ({cause}). {AGAIN}"
        ) from cause
    rows |= _promise(folder)
    files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return rows | {"files": ", ".join(files)}


def _promise(folder: Path) -> dict[str, str]:
    """The guarantee of the policy in the folder, if there is one."""
    if not (folder / POLICY).exists():
        return {}
    record = read_json(folder / POLICY, ArtifactError).get("calibration", {})
    try:
        return {"promise": promise(record, audit_of(folder))}
    except (LookupError, TypeError, ValueError, AttributeError) as cause:
        raise ArtifactError(
            f"The calibration in {folder / POLICY} is not as lspade-train writes it "
            f"({cause!r:.100}). Write it again with lspade-train calibrate."
        ) from cause


def check_folder(folder: Path) -> LSpadeHeads:
    """Load a heads folder, and raise if its parts do not belong together.

    Raises:
        LSpadeError: heads, policy or results are missing, damaged, of an unknown format, or belong
            to other heads.
    """
    if not folder.is_dir():  # otherwise it would be looked up on the Hub
        raise ArtifactError(
            f"{folder} does not exist.\nFit heads first: lspade-train fit --config RECIPE.yaml"
        )
    heads = LSpadeHeads.from_pretrained(folder)
    digest = heads.metadata["weights_sha256"]
    if (folder / POLICY).exists():
        tuned = heads.tuned_lens
        ExitPolicy.load(folder).check_heads(digest, None if tuned is None else tuned.digest)
    if (folder / RESULTS).exists():
        about = read_results(folder).get("heads")
        measured = about.get("weights_sha256") if isinstance(about, dict) else None
        if measured != digest:
            raise ArtifactError(
                f"{folder / RESULTS} was measured with heads {measured!s:.12}..., these are "
                f"{digest[:12]}...\nMeasure these with lspade-train evaluate."
            )
    return heads


def push(
    folder: Path,
    repo: str,
    *,
    license: str | None = None,
    private: bool = False,
    branch: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
) -> str:
    """Check a heads folder, rewrite its card, and upload its known files in one commit.

    Args:
        folder: a heads folder.
        repo: `org/name` on the Hub.
        license: the Hub's identifier of the heads' licence; None: the card's, or `unknown`.
        private: whether a new repository is private.
        branch: branch to commit to, created if missing; None: main.
        create_pr: propose the commit as a pull request instead.
        message: commit message.

    Returns:
        URL of the commit or of the pull request.

    Raises:
        LSpadeError: the folder is not valid, or the Hub rejects it.
    """
    fetch.check_name(repo)
    check_folder(folder)
    write_card(folder, repo=repo, license=license)
    return hub.upload(
        folder, repo, private=private, branch=branch, create_pr=create_pr, message=message
    )


def push_to_hub(
    heads: LSpadeHeads,
    repo: str,
    *,
    license: str | None = None,
    private: bool = False,
    branch: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
) -> str:
    """Upload heads with their config and a model card to the Hub, in one commit.

    Policy, results and figures are part of a folder, not of the heads: `push` uploads a folder.

    Args:
        heads: trained heads.
        repo: `org/name`.
        license: the Hub's identifier of the heads' licence; None: `unknown`.
        private: whether a new repository is private.
        branch: branch to commit to, created if missing; None: main.
        create_pr: propose the commit as a pull request instead.
        message: commit message.

    Returns:
        URL of the commit or of the pull request.

    Raises:
        HubError: no login, no permission, no such repository, or no network.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        heads.save_pretrained(folder)
        write_card(folder, repo=repo, license=license)
        return hub.upload(
            folder, repo, private=private, branch=branch, create_pr=create_pr, message=message
        )


def pull(repo: str, folder: Path, revision: str | None = None) -> None:
    """Download heads into a new folder, which is created only if they are complete and valid.

    Args:
        repo: `org/name` on the Hub.
        folder: must not exist.
        revision: branch, tag or commit; None: main.

    Raises:
        LSpadeError: the folder exists or cannot be written, or the Hub's heads are missing or
            damaged.
    """
    if folder.exists():
        raise ArtifactError(
            f"{folder} already exists, and pull overwrites nothing.\n"
            "Give another folder with --to, or remove it."
        )
    source = fetch.download(repo, revision)
    check_folder(source)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as cause:
        raise ArtifactError(
            f"{folder} cannot be created ({cause}). Give another with --to."
        ) from cause
    try:
        for name, path in known_files(source).items():
            (temporary / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, temporary / name)
        temporary.chmod(0o755)  # mkdtemp makes private folders
        temporary.rename(folder)
    except OSError as cause:
        raise ArtifactError(
            f"{folder} cannot be written ({cause}). Give another with --to."
        ) from cause
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def machine_paths(folder: Path) -> list[str]:
    """Absolute paths in a heads folder's JSON, as `file: path`, which a push would publish."""
    return [
        f"{path.relative_to(folder).as_posix()}: {text}"
        for path in (folder / CONFIG, folder / TUNED_LENS / CONFIG, folder / RESULTS)
        if path.exists()
        for text in sorted(set(_texts(read_json(path, ArtifactError))))
        if text.startswith(("/", "~")) and len(text) > 1
    ]


def _texts(value: Any) -> list[str]:
    """Every string in a JSON value."""
    if isinstance(value, dict | list):
        inner: Any = value.values() if isinstance(value, dict) else value
        return [text for item in inner for text in _texts(item)]
    return [value] if isinstance(value, str) else []
