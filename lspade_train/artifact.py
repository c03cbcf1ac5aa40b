"""The heads folder as a whole: export, results, what it is, push and pull.

`heads.safetensors` and `config.json` are `LSpadeHeads`' own; this module adds what stands around
them. Each file is complete or absent. Knows nothing of training.
"""

import platform
import shutil
import subprocess
import tempfile
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lspade_train import hub
from lspade_train.card import ranges, write_card
from lspade_train.errors import ArtifactError
from lspade_train.heads import AGAIN, CONFIG, KINDS, LSpadeHeads
from lspade_train.hub import POLICY, RESULTS
from lspade_train.policy import ExitPolicy
from lspade_train.recipe import Recipe
from lspade_train.storage import read_json, require_kinds, write_json

PACKAGES = ("lspade-train", "torch", "transformers", "lightning", "datasets", "safetensors")


def heads_folder(recipe: Recipe, root: Path | None = None) -> Path:
    """Where a recipe's heads land: `checkpoints/<name>/` of the working directory.

    Raises:
        ArtifactError: the name is no plain folder name.
    """
    name = recipe.name
    if not name or Path(name).name != name or name.startswith("."):
        raise ArtifactError(
            f"name is {name!r}; expected a plain folder name such as arc. Set name in the recipe."
        )
    return (root or Path("checkpoints")) / name


def export(
    folder: Path,
    heads: LSpadeHeads,
    *,
    base_model: dict[str, Any],
    recipe: Recipe,
    data: dict[str, Any],
    cache_digests: dict[str, str],
    steps: int,
    metrics: dict[str, float],
) -> None:
    """Write a complete heads folder.

    Args:
        folder: made if missing.
        heads: the trained heads.
        base_model: id, revision and digests of the frozen model.
        recipe: the whole recipe, as run.
        data: the training rows' Hub data set, revision and subset (None for local files), number.
        cache_digests: identity digest of each split's cache.
        steps: optimiser steps taken.
        metrics: last logged metrics by name.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    heads.metadata = {
        "base_model": base_model,
        "training": {
            "recipe": asdict(recipe),
            "data": data,
            "caches": cache_digests,
            "steps": steps,
            "metrics": metrics,
            "versions": versions(),
            "source": source_state(),
        },
    }
    heads.save_pretrained(folder)
    write_card(folder)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def source_state() -> dict[str, Any] | None:
    """Commit of this package's own checkout and whether it was changed; None outside a clone."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):
            return None  # installed inside somebody else's repository
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def read_results(folder: Path) -> dict[str, Any]:
    """`results.json` as written by evaluate.

    Raises:
        ArtifactError: missing or damaged.
    """
    return read_json(
        folder / RESULTS, ArtifactError, "Write it: lspade-train evaluate --config RECIPE"
    )


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write `results.json`.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    write_json(folder / RESULTS, results, ArtifactError)


def describe(folder: Path) -> dict[str, str]:
    """What a heads folder is, from its files alone.

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
        raise ArtifactError(f"{folder / CONFIG} is no heads' config ({cause}). {AGAIN}") from cause
    files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return rows | {"files": ", ".join(files)}


def check_folder(folder: Path) -> LSpadeHeads:
    """Load a heads folder, and refuse one whose parts do not belong together.

    Raises:
        LSpadeError: heads, policy or results are missing, damaged, of an unknown format, or of
            other heads than the ones beside them.
    """
    if not folder.is_dir():  # or it would be looked for on the Hub
        raise ArtifactError(
            f"{folder} does not exist.\nFit heads first: lspade-train fit --config RECIPE.yaml"
        )
    heads = LSpadeHeads.from_pretrained(folder)
    digest = heads.metadata["weights_sha256"]
    if (folder / POLICY).exists():
        ExitPolicy.load(folder).check_heads(digest)
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
    """Check a heads folder, write its card anew, and send its known files in one commit.

    Args:
        folder: a heads folder.
        repo: `org/name` on the Hub.
        license: the Hub's identifier of the heads' licence; None: the card's, or `unknown`.
        private: whether a new repository is private.
        branch: branch to commit to, made where it is missing; None: main.
        create_pr: propose the commit as a pull request instead.
        message: the commit's.

    Returns:
        Address of the commit or of the pull request.

    Raises:
        LSpadeError: the folder is not in order, or the Hub does not take it.
    """
    hub.check_name(repo)
    check_folder(folder)
    write_card(folder, repo=repo, license=license)
    return hub.upload(
        folder, repo, private=private, branch=branch, create_pr=create_pr, message=message
    )


def pull(repo: str, folder: Path, revision: str | None = None) -> None:
    """Download heads into a new folder: checked and complete, or there is no folder.

    Args:
        repo: `org/name` on the Hub.
        folder: must not exist.
        revision: branch, tag or commit; None: main.

    Raises:
        LSpadeError: the folder exists or cannot be written, the Hub has no such heads, or what it
            has is damaged.
    """
    if folder.exists():
        raise ArtifactError(
            f"{folder} is there already, and pull overwrites nothing.\n"
            "Give another folder with --to, or remove it."
        )
    source = hub.download(repo, revision)
    check_folder(source)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as cause:
        raise ArtifactError(
            f"{folder} cannot be made ({cause}). Give another with --to."
        ) from cause
    try:
        for name, path in hub.known_files(source).items():
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
    """Absolute paths in a heads folder's JSON, as `file: path`: whoever pulls it reads them."""
    return [
        f"{path.name}: {text}"
        for path in (folder / CONFIG, folder / RESULTS)
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
