"""Folders behind a URL that fsspec knows (s3://, gs://, hf://, memory://, ...), by a local mirror.

A folder is as complete as its index, the one file that goes up and comes down last. What the files
are is checked by whoever opens the mirror: index files hold the digests of the rest.
"""

import hashlib
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from lspade_train.errors import LSpadeError
from lspade_train.storage import atomic_path

SUFFIXES = (".safetensors", ".json", ".md", ".html")
"""What a cache or a heads folder may hold; nothing else is brought here."""


def is_remote(name: str | Path) -> bool:
    """Whether a name is a URL, rather than a path or a Hub id."""
    return "://" in str(name)


def mirror(url: str) -> Path:
    """The local folder that stands for a remote one, under `$LSPADE_CACHE` or the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lspade-train"
    key = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    return Path(os.environ.get("LSPADE_CACHE", home)) / "mirrors" / key


def fetch(url: str, index: str, error: type[LSpadeError] = LSpadeError) -> Path:
    """Make the mirror what the remote folder is; one that holds no finished folder changes nothing.

    Args:
        url: the remote folder.
        index: its last file.
        error: what to raise.

    Returns:
        The mirror.

    Raises:
        error: it cannot be reached or read, or a file cannot be written here.
    """
    folder = mirror(url)
    with _opened(url, folder, error) as (files, root):
        there = _content(files, root, index)
        bucket = root.split("/")[0]
        if there is None and bucket:
            files.info(bucket)  # said before the work that is to be stored there
        if there is None or there == _local(folder / index):
            return folder
        _clear(folder)
        found = {Path(entry["name"]).name for entry in files.ls(root, detail=True)}
        for name in sorted(found - {index}):
            if not name.endswith(SUFFIXES):
                continue
            with atomic_path(folder / name, error) as temporary:
                files.get_file(f"{root}/{name}", str(temporary))
        with atomic_path(folder / index, error) as temporary:
            temporary.write_bytes(there)
    return folder


def publish(url: str, index: str, error: type[LSpadeError] = LSpadeError) -> None:
    """Make the remote folder what its mirror is; equal ones are left alone.

    Raises:
        error: it cannot be reached or written.
    """
    folder = mirror(url)
    with _opened(url, folder, error) as (files, root):
        there = _content(files, root, index)
        if there == _local(folder / index):
            return
        if there is not None:
            files.rm_file(f"{root}/{index}")
        if "file" in files.protocol:  # the others need no folders, and a bucket is not ours to make
            files.makedirs(root, exist_ok=True)
        for path in _files(folder):
            if path.name != index:
                files.put_file(str(path), f"{root}/{path.name}")
        files.put_file(str(folder / index), f"{root}/{index}")


@contextmanager
def _opened(url: str, folder: Path, error: type[LSpadeError]) -> Generator[tuple[Any, str]]:
    """The file system and the path in it, held by one process of this machine at a time."""
    from fsspec.core import url_to_fs

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".mirror.lock"):
            files, root = url_to_fs(url)
            files.invalidate_cache()  # others write there too
            yield files, root.rstrip("/")
    except (LSpadeError, KeyboardInterrupt):
        raise
    except Exception as cause:  # each file system raises what its own library raises
        raise error(_explain(url, cause)) from cause


def _explain(url: str, cause: Exception) -> str:
    scheme = url.split("://")[0]
    first = (str(cause).splitlines() or [""])[0] or type(cause).__name__
    if isinstance(cause, ImportError):
        return (
            f"{scheme}:// needs a package that is not here ({first}).\nInstall it, and try again."
        )
    if isinstance(cause, ValueError) and "rotocol" in first:
        return f"{url} begins with {scheme}://, which no installed package reads.\nCheck the URL."
    return (
        f"{url} cannot be used ({type(cause).__name__}: {first:.200}).\n"
        "Check the URL, that the bucket exists, and your credentials for it."
    )


def _content(files: Any, root: str, index: str) -> bytes | None:
    try:
        return files.cat_file(f"{root}/{index}")
    except FileNotFoundError:
        return None


def _local(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]


def _clear(folder: Path) -> None:
    for path in _files(folder):
        path.unlink()
