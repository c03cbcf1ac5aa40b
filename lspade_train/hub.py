"""Heads folders to and from the Hugging Face Hub, through its own client, or a URL.

Knows nothing of heads. Only the files that a heads folder has by name are ever sent or fetched, so
that neither logs nor checkpoints leave the machine and nothing but safetensors, JSON, text and
pictures enters it.
Tokens are the client's matter: its login, or HF_TOKEN.
"""

import errno
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from lspade_train.errors import HubError
from lspade_train.remote import Mirror, is_remote

WEIGHTS, CONFIG = "heads.safetensors", "config.json"
CARD, RESULTS, POLICY = "README.md", "results.json", "policy.json"
FILES = (CONFIG, WEIGHTS, POLICY, RESULTS, "profile.json", CARD, "report.html")
PICTURES = (".png", ".svg")  # of figures/
PATTERNS = [*FILES, *(f"figures/*{suffix}" for suffix in PICTURES)]

LOGIN = "hf auth login"
NO_REVISION = (
    "{repo} has no revision {revision!r} on the Hub.\n"
    "Give a branch, a tag or a commit that is listed there, or leave it out for main."
)
GATED = "{repo} is gated.\nAsk for access on its page, and log in: {login}"
NO_REPOSITORY = (
    "The Hub has no repository {repo} that you may read.\n"
    "Check the name, and log in where it is private: {login}"
)
UNREACHABLE = (
    "The Hub at {endpoint} cannot be reached for {repo} ({said}).\n"
    "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, and run it again."
)
NO_REVISIONS = (
    "{path} is {what}, which has no revision {revision!r}.\n"
    "Leave revision out, or name a repository of the Hub (org/name)."
)
NO_XET = (
    "The Hub at {endpoint} did not take {repo}'s files over Xet ({said}).\n"
    "Run it again; if it has no Xet storage, set HF_HUB_DISABLE_XET=1 and send them over HTTP."
)
BROKEN_OFF = (
    "The exchange with {repo} broke off ({said}).\n"
    "Nothing is half done; run it again: what has arrived is not sent twice."
)
NOT_TAKEN = (
    "The Hub does not take this ({said}).\n"
    "Nothing was committed; correct what it names (a licence: --license) and run it again."
)
REFUSED = {
    401: "The Hub refuses the token ({said}).\nLog in again, with a valid one: {login}",
    403: "The token may not do that in {repo} ({said}).\n"
    "Log in with a write token ({login}), or propose the change with --create_pr.",
}
DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


def known_files(folder: Path) -> dict[str, Path]:
    """What of a heads folder goes to the Hub, by its path there."""
    found = [path for pattern in PATTERNS for path in sorted(folder.glob(pattern))]
    return {path.relative_to(folder).as_posix(): path for path in found if path.is_file()}


def check_name(repo: str) -> None:
    """Refuse what cannot be a repository or a URL, before anything is sent or asked.

    Raises:
        HubError: not `org/name`, or characters that the Hub does not allow.
    """
    if is_remote(repo):
        return
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        if "/" not in repo:
            raise HFValidationError("the owner is missing")
    except HFValidationError as cause:
        reason = str(cause).split(":")[0].rstrip(".")
        raise HubError(
            f"{repo!r} is no repository of the Hub ({reason}).\n"
            "Expected org/name, of letters, digits, - _ and . as in someone/arc-heads."
        ) from cause


def upload(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    branch: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
) -> str:
    """Make a revision of `repo` hold the known files of `folder`, in one commit or not at all.

    Known files that the repository has and the folder has not are deleted there: a policy of other
    heads must not stay behind. Other files of the repository are left alone.

    Args:
        folder: a heads folder.
        repo: `org/name`, made where it is missing, except for a pull request; or a URL, where
            config.json goes last.
        private: whether a new repository is private.
        branch: branch to commit to, made where it is missing; None: main.
        create_pr: propose the commit as a pull request instead.
        message: the commit's; None: "Upload L-SPADE heads".

    Returns:
        Address of the commit or of the pull request, or the URL.

    Raises:
        HubError: no login, no right, no such repository, no network, or a public repository where
            a private one was asked for.
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
        raise HubError(f"Nobody is logged in to the Hub.\nLog in with a write token: {LOGIN}")
    api, files = HfApi(library_name="lspade-train"), known_files(folder)
    with _named(repo, branch):
        if not create_pr:
            _open(api, repo, private, branch)
        there = api.list_repo_files(repo, revision=branch)
        gone = sorted(name for name in there if _is_known(name) and name not in files)
        # Not upload_folder: that may commit a folder in several parts.
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


def download(repo: str, revision: str | None = None) -> Path:
    """The known files of one commit, in the client's own cache; those behind a URL, in a mirror.

    Where the Hub cannot be reached, the latest copy in that cache is taken.

    Args:
        repo: `org/name`, or a URL.
        revision: branch, tag or commit; None: main. A URL has none.

    Raises:
        HubError: no such repository or revision, no right, no network, or no heads in it.
    """
    from huggingface_hub import snapshot_download

    check_name(repo)
    if is_remote(repo):
        return _mirrored(repo, revision)
    with _named(repo, revision):
        # No "..": a listing is the server's word, and its paths become files here.
        folder = Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=PATTERNS,
                ignore_patterns="*..*",
                library_name="lspade-train",
            )
        )
    if not (folder / WEIGHTS).is_file():
        raise HubError(
            f"{repo} holds no {WEIGHTS}: it is no repository of L-SPADE heads.\n"
            "Check the name; heads are put there with lspade-train push."
        )
    return folder


def local_folder(path: str | Path, revision: str | None = None) -> Path:
    """A local heads folder as it is; a URL's mirror; anything else is downloaded from the Hub.

    Raises:
        HubError: neither a folder nor a repository that can be read, a URL without heads, or a
            revision of what has none.
    """
    if is_remote(path):
        return _mirrored(str(path), revision)
    folder = Path(path)
    if not folder.is_dir():
        try:
            return download(str(path), revision)
        except HubError as cause:
            what, remedy = str(cause).split("\n")
            raise HubError(
                f"There is no folder {path}. {what}\n"
                f"Fit heads first (lspade-train fit --config RECIPE.yaml). From the Hub: {remedy}"
            ) from cause
    if revision is not None:
        raise HubError(NO_REVISIONS.format(path=path, what="a folder here", revision=revision))
    return folder


def _mirrored(url: str, revision: str | None) -> Path:
    if revision is not None:
        raise HubError(NO_REVISIONS.format(path=url, what="a URL", revision=revision))
    folder = Mirror(url, PATTERNS, HubError).fetch()
    if not ((folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()):
        raise HubError(
            f"{url} holds no {WEIGHTS} and {CONFIG}: there are no L-SPADE heads.\n"
            "Check the URL; heads are put there with lspade-train push --repo URL."
        )
    return folder


def _is_known(name: str) -> bool:
    """Whether a path in a repository is one that a heads folder may have."""
    path = PurePosixPath(name)
    return name in FILES or (str(path.parent) == "figures" and path.suffix in PICTURES)


def _open(api: Any, repo: str, private: bool, branch: str | None) -> None:
    """Make the repository and the branch where they are missing."""
    api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.model_info(repo).private:
        raise HubError(
            f"{repo} is there already and is public; --private makes new repositories private.\n"
            "Make it private in its settings on the Hub, or push to another name."
        )
    if branch is not None:
        api.create_branch(repo, branch=branch, exist_ok=True)


@contextmanager
def _named(repo: str, revision: str | None) -> Generator[None]:
    """Everything that the client raises, as one named error of two lines."""
    from huggingface_hub import constants

    try:
        yield
    except HubError:
        raise
    # The client raises its own errors, its HTTP library's and its transfer library's.
    except Exception as cause:
        if getattr(cause, "errno", None) in DISK_TROUBLE:
            raise
        raise HubError(
            _words(cause).format(
                repo=repo,
                revision=revision,
                said=_innermost(cause),
                endpoint=constants.ENDPOINT,
                login=LOGIN,
            )
        ) from cause


def _words(cause: Exception) -> str:
    """What happened and what to do next, by the kind of error or the server's status."""
    from huggingface_hub import errors

    for kind, words in (
        (errors.RevisionNotFoundError, NO_REVISION),
        (errors.GatedRepoError, GATED),
        (errors.RepositoryNotFoundError, NO_REPOSITORY),
    ):
        if isinstance(cause, kind):
            return words
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status in REFUSED:
        return REFUSED[status]
    if isinstance(cause, ValueError):
        return NOT_TAKEN
    if status is None and not isinstance(cause, RuntimeError):
        return NO_XET if "xet" in str(cause) else UNREACHABLE
    return BROKEN_OFF


def _innermost(cause: BaseException) -> str:
    """The error that started it all, in one line, as the server worded it where it did."""
    if isinstance(cause, ValueError):  # the client's own words, for what a check found
        return " ".join(str(cause).split())
    while cause.__cause__ is not None and getattr(cause, "response", None) is None:
        cause = cause.__cause__
    text = getattr(cause, "server_message", None) or str(cause) or type(cause).__name__
    return next(line for line in text.splitlines() if line.strip()).strip().rstrip(".")
