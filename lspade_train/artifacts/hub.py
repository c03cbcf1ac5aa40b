"""Uploads heads to the Hugging Face Hub, through its own client, or to a URL.

Only the known files of a heads folder are ever uploaded, so neither logs nor checkpoints leave the
machine. Tokens are left to the client: its login, or HF_TOKEN.
"""

from pathlib import Path
from typing import Any

from lspade_train.errors import HubError
from lspade_train.io.fetch import LOGIN, check_name, hub_errors_named
from lspade_train.io.layout import PATTERNS, is_known, known_files
from lspade_train.io.remote import Mirror, is_remote


def upload(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    branch: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
) -> str:
    """Upload the known files of `folder` to a revision of `repo`, in one commit.

    Known files in the repository that are not in the folder are deleted: a policy of other heads
    must not stay behind. Other files of the repository are left alone.

    Args:
        folder: a heads folder.
        repo: `org/name`, created if missing, except for a pull request; or a URL, where config.json
            is uploaded last.
        private: whether a new repository is private.
        branch: branch to commit to, created if missing; None: main.
        create_pr: propose the commit as a pull request instead.
        message: commit message; None: "Upload L-SPADE heads".

    Returns:
        URL of the commit or of the pull request, or the given URL.

    Raises:
        HubError: no login, no permission, no such repository, no network, or a public repository
            although a private one was requested.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    check_name(repo)
    if is_remote(repo):
        if private or branch or create_pr or message:
            raise HubError(
                f"{repo} is a URL, which has no --private, --branch, --create_pr or --message.\n"
                "Leave them out, or name a repository of the Hub (org/name)."
            )
        Mirror(repo, PATTERNS, HubError, folder).publish()
        return repo
    if get_token() is None:
        raise HubError(f"Not logged in to the Hub.\nLog in with a write token: {LOGIN}")
    api, files = HfApi(library_name="lspade-train"), known_files(folder)
    with hub_errors_named(repo, branch):
        if not create_pr:
            _open(api, repo, private, branch)
        there = api.list_repo_files(repo, revision=branch)
        gone = sorted(name for name in there if is_known(name) and name not in files)
        # Not upload_folder, which may split a folder into several commits.
        commit = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(name, path) for name, path in files.items()),
                *(CommitOperationDelete(name) for name in gone),
            ],
            commit_message=message or "Upload L-SPADE heads",
            revision=branch,
            create_pr=create_pr,
        )
    return commit.pr_url or commit.commit_url


def _open(api: Any, repo: str, private: bool, branch: str | None) -> None:
    """Create the repository and the branch if they are missing."""
    api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.model_info(repo).private:
        raise HubError(
            f"{repo} already exists and is public; --private makes new repositories private.\n"
            "Make it private in its settings on the Hub, or push to another name."
        )
    if branch is not None:
        api.create_branch(repo, branch=branch, exist_ok=True)
