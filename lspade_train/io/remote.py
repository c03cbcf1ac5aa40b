"""Local mirrors of folders at URLs that fsspec supports (s3://, gs://, hf://, memory://, ...).

A folder is complete if it has its index, the file that is transferred last, and removed first when
another file changes. A mirror records the version of each file on both sides at its last transfer,
so that only missing or changed files are transferred again. These records only save work: readers
of the mirror compare its files with the digests in the index.
"""

import errno
import hashlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from filelock import FileLock

from lspade_train.errors import LSpadeError
from lspade_train.io.storage import (
    atomic_path,
    default_cache_root,
    first_line,
    read_json,
    write_json,
)

NOTES = ".transfers.json"
BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "az"}
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


def is_remote(name: str | Path) -> bool:
    """Whether a name is a URL, rather than a path or a Hub id."""
    return "://" in str(name)


class Mirror:
    """A remote folder and its local mirror.

    Several processes and machines may have mirrors of the same folder. Each file is published by
    one of them; all may fetch.

    Args:
        url: the remote folder.
        patterns: names of its files, or globs, the index first; at most one folder deep. No other
            files are fetched, published or removed.
        error: type of error to raise.
        folder: the local folder; None: one in `default_cache_root()`.

    Raises:
        error: from every method: the remote folder cannot be reached, read or written, or the local
            disk is full.
    """

    def __init__(
        self,
        url: str,
        patterns: Sequence[str],
        error: type[LSpadeError] = LSpadeError,
        folder: Path | None = None,
    ) -> None:
        self.url, self.patterns, self.error = url.rstrip("/"), patterns, error
        self.index = patterns[0]
        key = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.folder = folder or default_cache_root() / "mirrors" / key
        self._lock = FileLock(self.folder / ".mirror.lock")

    def fetch(self) -> Path:
        """Make the mirror equal to the remote folder; if that is incomplete, only remove the index.

        Returns:
            The mirror.
        """
        with self._reached() as (files, root), self._lock:
            there = self._listing(files, root)
            if self.index not in there:
                _require_bucket(files, root)  # fail before the work whose results go there
                (self.folder / self.index).unlink(missing_ok=True)
                return self.folder
            changed = there.keys() - self._unchanged(there)
            gone = self._here() - there.keys()
            if changed or gone:
                changed.add(self.index)
            for name in changed & {self.index} | gone:
                (self.folder / name).unlink(missing_ok=True)
            for name in self._in_order(changed):
                self._get(files, root, name, there[name])
        return self.folder

    def publish(self) -> None:
        """Make the remote folder equal to the mirror."""
        with self._reached() as (files, root), self._lock:
            there, here = self._listing(files, root), self._here()
            settled = self._unchanged(there)
            if here == settled == there.keys():
                return
            gone = there.keys() - here | {self.index}
            for name in reversed(self._in_order(gone & there.keys())):
                _remove(files, f"{root}/{name}")
            for name in self._in_order((here - settled) | {self.index}):
                self._put(files, root, name)

    def fetch_files(self, *paths: Path) -> None:
        """Make local files equal to the remote ones, if those exist; the index is not needed."""
        with self._reached() as (files, root):
            there = self._listing(files, root)
            wanted = {path.name for path in paths} & there.keys()
            for name in sorted(wanted - self._unchanged(there)):
                self._get(files, root, name, there[name])

    def publish_file(self, path: Path) -> None:
        """Upload one file of the mirror; the remote folder is then incomplete."""
        with self._reached() as (files, root):
            there = self._listing(files, root)
            if path.name in self._unchanged(there):
                return
            if self.index in there:
                _remove(files, f"{root}/{self.index}")
            self._put(files, root, path.name)

    @contextmanager
    def _reached(self) -> Generator[tuple[Any, str]]:
        """Yield the file system and the path in it, and translate its errors."""
        from fsspec.core import url_to_fs

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            files, root = url_to_fs(self.url)
            yield files, root.rstrip("/")
        except LSpadeError:
            raise
        except Exception as cause:  # each file system raises its own library's errors
            raise self.error(self._explain(cause)) from cause

    def _get(self, files: Any, root: str, name: str, stamp: str) -> None:
        with atomic_path(self.folder / name, self.error) as temporary:
            try:
                files.get_file(f"{root}/{name}", str(temporary))
            except Exception as cause:
                if getattr(cause, "errno", None) in DISK_FULL:
                    raise  # atomic_path names it
                raise self.error(self._explain(cause)) from cause
        self._note(name, stamp, self._stat(name))

    def _put(self, files: Any, root: str, name: str) -> None:
        stat = self._stat(name)  # before the upload: a change during it invalidates the record
        if "file" in files.protocol:  # others need no folders, and buckets are not created here
            files.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        files.put_file(str(self.folder / name), f"{root}/{name}")
        self._note(name, self._listing(files, root).get(name), stat)

    def _note(self, name: str, stamp: str | None, stat: list[int]) -> None:
        with self._lock:  # processes of this machine share the mirror
            notes = self._notes() | {name: [stamp, *stat]}
            write_json(self.folder / NOTES, notes, self.error)

    def _notes(self) -> dict[str, Any]:
        with suppress(LSpadeError):  # missing or damaged: everything is transferred again
            return read_json(self.folder / NOTES, LSpadeError)
        return {}

    def _unchanged(self, there: Mapping[str, str]) -> set[str]:
        """Files that have not changed on either side since their last transfer."""
        notes = self._notes()
        return {n for n, stamp in there.items() if notes.get(n) == [stamp, *self._stat(n)]}

    def _stat(self, name: str) -> list[int]:
        path = self.folder / name
        if not path.is_file():
            return []
        stat = path.stat()
        # Include the inode: files are replaced, never modified, and clocks are coarse.
        return [stat.st_size, stat.st_mtime_ns, stat.st_ino]

    def _here(self) -> set[str]:
        found = [path for pattern in self.patterns for path in self.folder.glob(pattern)]
        return {path.relative_to(self.folder).as_posix() for path in found if path.is_file()}

    def _listing(self, files: Any, root: str) -> dict[str, str]:
        """A digest of the current version of each remote file, by name."""
        files.invalidate_cache()  # others may write there, too
        entries = _entries(files, root)
        for folder in {pattern.split("/")[0] for pattern in self.patterns if "/" in pattern}:
            if folder in entries:
                inside = _entries(files, f"{root}/{folder}")
                entries |= {f"{folder}/{name}": entry for name, entry in inside.items()}
        return {
            name: hashlib.sha256(str(entry).encode()).hexdigest()
            for name, entry in entries.items()
            if entry["type"] == "file" and any(fnmatchcase(name, p) for p in self.patterns)
        }

    def _in_order(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: (name == self.index, name))

    def _explain(self, cause: Exception) -> str:
        scheme = self.url.split("://")[0]
        first = first_line(cause)
        if isinstance(cause, ImportError):
            what = f"{scheme}:// needs a package that is not installed ({first})."
            return f"{what}\nInstall it and run the command again."
        if isinstance(cause, ValueError) and "rotocol" in first:
            what = f"{self.url} begins with {scheme}://, which no installed package reads."
            return f"{what}\nCheck the URL."
        if str(self.folder) in str(getattr(cause, "filename", "")):
            what = f"The mirror of {self.url} cannot be written ({first:.200})."
            return f"{what}\nSet LSPADE_CACHE to a folder that you can write to."
        return (
            f"{self.url} cannot be used ({type(cause).__name__}: {first:.200}).\n"
            "Check the URL, that the bucket exists, and your credentials for it."
        )


def _entries(files: Any, folder: str) -> dict[str, Any]:
    """A remote folder's entries, by the last component of their paths."""
    try:
        return {entry["name"].rpartition("/")[2]: entry for entry in files.ls(folder, detail=True)}
    except FileNotFoundError:
        return {}


def _require_bucket(files: Any, root: str) -> None:
    kinds = {files.protocol} if isinstance(files.protocol, str) else set(files.protocol)
    if kinds & BUCKETS:
        files.info(root.split("/")[0])


def _remove(files: Any, path: str) -> None:
    with suppress(FileNotFoundError):  # another process was first
        files.rm_file(path)
