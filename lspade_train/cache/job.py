"""`Build`: one split's cache while it is written, and helpers that all its steps share.

The folder's lock, a check of disk space, and the division of files among a run's processes.
Independent of the files' content.
"""

import shutil
from collections.abc import Callable, Generator, Iterable, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from lspade_train.cache.extract import Extraction
from lspade_train.cache.manifest import Identity, Shard
from lspade_train.cache.shards import LocalStore, Part, RemoteStore, write_parts
from lspade_train.errors import CacheError
from lspade_train.io.parallel import ranks, together
from lspade_train.io.progress import Progress
from lspade_train.io.storage import json_digest
from lspade_train.io.text import byte_size
from lspade_train.models import ModelAdapter

Result = TypeVar("Result")


@dataclass(frozen=True)
class Build:
    """One split's cache while it is written.

    Attributes:
        folder: folder of the cache.
        adapter: the frozen model.
        what: what to compute for each prompt.
        identity: everything that determines the bytes.
        store: remote store that each file is copied to as soon as it is complete.
        overwrite: recompute files that already exist.
        name: name of the work, for its progress bar.
        say: shows the user a line.
    """

    folder: Path
    adapter: ModelAdapter
    what: Extraction
    identity: Identity
    store: RemoteStore = LocalStore()  # noqa: RUF009  (stateless)
    overwrite: bool = False
    name: str | None = None
    say: Callable[[str], None] = lambda _: None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the identity."""
        return json_digest(self.identity)

    @property
    def compiled(self) -> str:
        """Suffix of the tag of files computed with compiled blocks, which round differently."""
        return ", compiled" * self.adapter.compiled


def on_first(work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0, and return its result on all ranks."""
    return together(lambda: work() if ranks()[0] == 0 else None)[0]  # type: ignore[return-value]


def write_shared(job: Build, part: Callable[[int], Part], count: int) -> dict[Shard, list[int]]:
    """Write this process's share of the files; returns those of all processes, with their stamps.

    Rank 0 shows the progress of its own share.
    """
    rank, world = ranks()
    mine = [part(number) for number in range(rank, count, world)]
    progress = Progress(None if rank else job.name, sum(one.rows for one in mine))
    with progress:
        parts = together(lambda: write_parts(mine, job.store, progress, overwrite=job.overwrite))
    found = dict(chain.from_iterable(part.items() for part in parts))
    return dict(sorted(found.items(), key=lambda item: item[0].file))


def gather(job: Build, files: Iterable[Shard]) -> None:
    """Fetch the files that other machines have written."""
    paths = [job.folder / file.file for file in files]
    job.store.fetch_files(*paths)
    absent = [path for path in paths if not path.exists()]
    if absent:
        raise CacheError(
            f"{job.folder} does not contain {absent[0].name}, which another machine wrote.\n"
            "Set --data.cache_dir to a folder that all machines share, or to a URL such as s3://."
        )


def clear(folder: Path, *patterns: str, keep: Set[str] = frozenset()) -> None:
    """Delete a folder's files that match these patterns, except those in `keep`.

    Raises:
        CacheError: the folder cannot be written.
    """
    try:
        for pattern in patterns:
            for path in folder.glob(pattern):
                if path.name not in keep:
                    path.unlink()
    except OSError as cause:
        raise CacheError(
            f"{folder} cannot be cleared ({cause.strerror}). Choose another --data.cache_dir."
        ) from cause


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise CacheError(
            f"{folder} cannot be created ({cause.strerror}). Choose another --data.cache_dir."
        ) from cause


@contextmanager
def exclusive(job: Build) -> Generator[None]:
    """Allow one writer at a time; a second one waits for the first and then uses its cache."""
    folder = job.folder
    _make_folder(folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        job.say(f"Another process is building {folder}; waiting for it.")
        lock.acquire()
    except OSError as cause:
        raise CacheError(
            f"{folder} cannot be written ({cause.strerror}). Choose another --data.cache_dir."
        ) from cause
    try:
        yield
    finally:
        lock.release()


def require_space(folder: Path, size: int, *patterns: str) -> None:
    """Raise if the disk has no room for the part of `size` bytes that is still to be written."""
    present = sum(path.stat().st_size for pattern in patterns for path in folder.glob(pattern))
    needed, free = size - present, shutil.disk_usage(folder).free
    if needed > free:
        raise CacheError(
            f"This cache takes {byte_size(size)} ({byte_size(needed)} of it still to be written) "
            f"and {folder} has {byte_size(free)} free.\n"
            "Choose another --data.cache_dir, fewer --model.layers, --data.limit, or "
            "--data.mode online."
        )
