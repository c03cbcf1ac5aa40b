"""Files that are complete or absent: atomic writes, digests, checked JSON.

Does not import torch, so that commands reject wrong arguments without waiting for it.
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import stat
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn

from safetensors import SafetensorError

from lspade_train.errors import CacheError, LSpadeError

MAX_JSON_BYTES = 64 * 1024 * 1024
CHUNK = 2**20
"""Bytes written at once: ext4 takes up to 9 times as long for 2 MiB or more (Linux 6.18)."""
MAX_DIGITS = 300
"""Most digits of an integer in JSON: a longer one overflows when compared with floats."""


def default_cache_root() -> Path:
    """`$LSPADE_CACHE`, or a folder in the user's cache directory.

    Raises:
        CacheError: neither is known, as in a container without a home directory.
    """
    for name, below in (("LSPADE_CACHE", ""), ("XDG_CACHE_HOME", "lspade-train")):
        if os.environ.get(name):
            return Path(os.environ[name]) / below
    try:
        return Path.home() / ".cache/lspade-train"
    except RuntimeError as cause:
        raise CacheError(
            "There is no home directory to keep a cache in. Set LSPADE_CACHE to a folder that you "
            "can write to."
        ) from cause


@contextlib.contextmanager
def atomic_path(path: Path, error: type[LSpadeError] = LSpadeError) -> Generator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it into place.

    On any failure the temporary file is removed and `path` is unchanged.

    Raises:
        error: the disk is full, or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as cause:
        raise error(_write_failure(path, cause)) from cause
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp creates private files; restore the usual permissions.
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _fsync_folder(path.parent)
    except (OSError, SafetensorError) as cause:
        raise error(_write_failure(path, cause)) from cause
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: Path, error: type[LSpadeError] = LSpadeError) -> Generator[io.RawIOBase]:
    """Yield a file to write, complete or absent as with `atomic_path`; large ones are fast.

    Raises:
        error: the disk is full, or the folder cannot be written.
    """
    with atomic_path(path, error) as temporary, temporary.open("wb") as file:
        yield _ChunkedFile(file)


class _ChunkedFile(io.RawIOBase):
    """Writes to another file, `CHUNK` bytes at a time."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        for first in range(0, len(view), CHUNK):
            self._file.write(view[first : first + CHUNK])
        return len(view)


def require_writable(folder: Path, error: type[LSpadeError] = LSpadeError) -> None:
    """Refuse an existing or new folder that cannot be written; changes nothing.

    Called before hours of work; errors such as a full disk only show when writing.

    Raises:
        error: the folder cannot be written.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise error(f"{folder} cannot be made: {there} is a file. Choose another folder.")
    if not os.access(there, os.W_OK):
        raise error(f"{folder} cannot be written. Choose a folder that you can write to.")


def write_text(path: Path, text: str, error: type[LSpadeError] = LSpadeError) -> None:
    """Write `text` as UTF-8, atomically.

    Raises:
        error: the file cannot be written.
    """
    with atomic_path(path, error) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, error: type[LSpadeError] = LSpadeError) -> None:
    """Write `value` as indented JSON, atomically. NaN and Inf are refused, as in the JSON standard.

    Raises:
        error: the file cannot be written.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n", error)


def read_json(path: Path, error: type[LSpadeError], remedy: str = "") -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        error: type of error to raise.
        remedy: second line of the message: what the user should do next.

    Raises:
        error: the file is missing, unreadable, too large, or not a JSON object.
    """
    try:
        if regular_size(path) > MAX_JSON_BYTES:
            raise error(join_lines(f"{path} is over 64 MB, which no such file is.", remedy))
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, parse_int=_whole, parse_float=_real, parse_constant=_no_number)
    except OSError as cause:
        raise error(join_lines(read_failure(path, cause), remedy)) from cause
    except (ValueError, RecursionError) as cause:
        raise error(
            join_lines(f"{path} is not valid JSON ({first_line(cause)}).", remedy)
        ) from cause
    if not isinstance(value, dict):
        raise error(
            join_lines(f"{path} holds a JSON {type(value).__name__}, expected an object.", remedy)
        )
    return value


def read_versioned(
    path: Path, version: int, error: type[LSpadeError], remedy: str
) -> dict[str, Any]:
    """Read a JSON object of a given `format_version`, which is taken out of it.

    Raises:
        error: missing, malformed, or of another format.
    """
    if not path.exists():
        raise error(f"{path} does not exist. {remedy}")
    values = read_json(path, error)
    found = values.pop("format_version", None)
    if found != version:
        raise error(
            f"{path} has format_version {found!r}; this lspade-train reads {version}. {remedy}"
        )
    return values


def require_kinds(
    value: Mapping[str, Any],
    kinds: Mapping[str, type | UnionType],
    path: Path,
    error: type[LSpadeError],
    remedy: str = "",
) -> None:
    """Refuse a JSON object that lacks a key of `kinds`, or has a value of the wrong type.

    Raises:
        error: there is such a key.
    """
    for name, kind in kinds.items():
        found = value.get(name)
        # In Python a bool is an int; in JSON it is not.
        if name not in value or not isinstance(found, kind) or isinstance(found, bool):
            got = type(found).__name__ if name in value else "nothing"
            wanted = getattr(kind, "__name__", str(kind))
            raise error(
                join_lines(f"{path} holds {got} under {name!r}, expected {wanted}.", remedy)
            )


def file_digest(path: Path, error: type[LSpadeError] = LSpadeError) -> str:
    """SHA-256 of a file's bytes, as hex.

    Raises:
        error: the file cannot be read.
    """
    try:
        regular_size(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as cause:
        raise error(read_failure(path, cause)) from cause


def file_stamp(path: Path) -> list[int]:
    """Size and times of a file: as long as they are equal, it has not been written to.

    Includes the status change time, since a copy may keep an older file's modification time.
    """
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def json_digest(value: Any) -> str:
    """SHA-256 of `value` as canonical JSON, as hex; equal for equal content."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _write_failure(path: Path, cause: Exception) -> str:
    text = getattr(cause, "strerror", None) or first_line(cause)
    full = getattr(cause, "errno", None) == errno.ENOSPC or "No space left" in text
    if full:
        return (
            f"The disk under {path.parent} is full; {path.name} was not written.\n"
            "Free some space, or choose another folder, and run the command again."
        )
    return f"{path} cannot be written ({text}). Choose a folder that you can write to."


def read_failure(path: Path, cause: OSError) -> str:
    """Sentence on why a file could not be read."""
    if isinstance(cause, FileNotFoundError):
        return f"{path} does not exist."
    return f"{path} cannot be read ({cause.strerror or first_line(cause)})."


def regular_size(path: Path) -> int:
    """A regular file's size; raises for pipes and devices, which may never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not an ordinary file")
    return status.st_size


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits:.40} is too large a number")
    return value


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def join_lines(message: str, remedy: str) -> str:
    """A message, with its remedy on a second line if there is one."""
    return f"{message}\n{remedy}" if remedy else message


def first_line(cause: BaseException) -> str:
    """The first line of an exception's message, or its name."""
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
