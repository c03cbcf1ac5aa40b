"""Downloads heads folders from the Hugging Face Hub, through its own client, or from a URL.

Only the known files of a heads folder are ever fetched, so that nothing but safetensors, JSON, text
and pictures is downloaded. Tokens are left to the client: its login, or HF_TOKEN. Independent of
heads.
"""

import errno
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from lspade_train.errors import HubError
from lspade_train.io.layout import CONFIG, PATTERNS, WEIGHTS
from lspade_train.io.remote import Mirror, is_remote

LOGIN = "hf auth login"
NO_REVISION = (
    "{repo} has no revision {revision!r} on the Hub.\n"
    "Give a branch, a tag or a commit that is listed there, or leave it out for main."
)
GATED = "{repo} is gated.\nAsk for access on its page, and log in: {login}"
NO_REPOSITORY = (
    "The Hub has no repository {repo} that you can read.\n"
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
    "The transfer with {repo} was interrupted ({said}).\n"
    "Nothing was committed; run it again: completed files are not sent twice."
)
NOT_TAKEN = (
    "The Hub rejected the upload ({said}).\n"
    "Nothing was committed; correct what it reports (a licence: --license) and run it again."
)
REFUSED = {
    401: "The Hub refuses the token ({said}).\nLog in again, with a valid one: {login}",
    403: "The token has no permission to do that in {repo} ({said}).\n"
    "Log in with a write token ({login}), or propose the change with --create_pr.",
}
DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


def check_name(repo: str) -> None:
    """Refuse names that cannot be a repository or a URL, before any request is made.

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
            f"{repo!r} is not the name of a Hub repository ({reason}).\n"
            "Expected org/name, of letters, digits, - _ and . as in someone/arc-heads."
        ) from cause


def download(repo: str, revision: str | None = None) -> Path:
    """Download the known files of one commit to the client's cache, or of a URL to a mirror.

    If the Hub cannot be reached, the latest copy in the cache is used.

    Args:
        repo: `org/name`, or a URL.
        revision: branch, tag or commit; None: main. A URL has none.

    Raises:
        HubError: no such repository or revision, no permission, no network, or no heads in it.
    """
    from huggingface_hub import snapshot_download

    check_name(repo)
    if is_remote(repo):
        return _mirrored(repo, revision)
    with hub_errors_named(repo, revision):
        # Reject "..", since paths in the server's listing become local files.
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
            f"{repo} holds no {WEIGHTS}: it is not a repository of L-SPADE heads.\n"
            "Check the name; heads are uploaded with lspade-train push."
        )
    return folder


def local_folder(path: str | Path, revision: str | None = None) -> Path:
    """A local heads folder as it is; a URL's mirror; anything else is downloaded from the Hub.

    Raises:
        HubError: neither a folder nor a readable repository, a URL without heads, or a revision
            given for a folder or URL.
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
            f"{url} holds no {WEIGHTS} and {CONFIG}: it is not a folder of L-SPADE heads.\n"
            "Check the URL; heads are uploaded with lspade-train push --repo URL."
        )
    return folder


@contextmanager
def hub_errors_named(repo: str, revision: str | None) -> Generator[None]:
    """Turn every exception of the client into a named error of two lines."""
    from huggingface_hub import constants

    try:
        yield
    except HubError:
        raise
    # The client raises its own errors and those of its HTTP and transfer libraries.
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
    """Message and remedy, by the type of the error or the server's status code."""
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
    """The original error in one line, using the server's message if there is one."""
    if isinstance(cause, ValueError):  # the client's own message for a failed check
        return " ".join(str(cause).split())
    while cause.__cause__ is not None and getattr(cause, "response", None) is None:
        cause = cause.__cause__
    text = getattr(cause, "server_message", None) or str(cause) or type(cause).__name__
    return next(line for line in text.splitlines() if line.strip()).strip().rstrip(".")
