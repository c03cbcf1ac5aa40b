"""Write a cache: identity first, then the shards, the manifest last; resumable.

Knows nothing of recipes or URLs, nor of who started the processes that share the work.
"""

import shutil
from collections.abc import Callable, Generator, Iterable, Sequence, Set
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from lspade_train.cache.extract import Extraction
from lspade_train.cache.manifest import (
    FILES,
    IDENTITY,
    MANIFEST,
    REBUILD,
    STARTS,
    Identity,
    Manifest,
    Shard,
    require_same,
    write_identity,
)
from lspade_train.cache.reader import VERIFIED, note_verified
from lspade_train.cache.shards import Elsewhere, Estimate, Job, Nowhere, estimate, write_shards
from lspade_train.errors import CacheError
from lspade_train.io.parallel import ranks, together
from lspade_train.io.storage import file_digest, file_stamp, file_tag, read_json, write_tensors
from lspade_train.models import ModelAdapter
from lspade_train.probes.spade import collect_states
from lspade_train.tasks import Encoded, Example

Track = Callable[[Sequence[int]], Iterable[int]]
"""Wraps the shard numbers in a progress bar."""


def build(
    folder: Path,
    adapter: ModelAdapter,
    encoded: Encoded,
    what: Extraction,
    identity: Identity,
    *,
    tokens_per_batch: int,
    shard_mb: float,
    provenance: dict[str, Any],
    overwrite: bool = False,
    elsewhere: Elsewhere | None = None,
    track: Track = iter,
    say: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Run the frozen model over all prompts and write their states; resumes where it stopped.

    The processes of one run deal the shards out among themselves; the first one does the rest.
    With `overwrite` an old cache goes once nothing but the model can still fail. Shards, and before
    them the identity, also go `elsewhere`, and are had from there where they are not here.

    Raises:
        CacheError: the folder holds another cache, the disk is too small or cannot be written.
        NumericsError: a hidden state is NaN or Inf.
        StoppedError: another process of this run was killed.
    """
    plan = estimate(adapter, encoded.examples, what, shard_mb)
    job = Job(
        folder, adapter, encoded.examples, what, identity, tokens_per_batch, plan,
        elsewhere or Nowhere(), overwrite,
    )  # fmt: skip
    rank, world = ranks()
    with ExitStack() as held:

        def begin() -> Manifest | None:
            _make_folder(folder)
            held.enter_context(_exclusive(folder, say))
            return _prepare(job)

        finished = together(lambda: begin() if rank == 0 else None)[0]
        if finished is not None:
            return finished
        mine = range(rank, plan.shards, world)
        parts = together(lambda: write_shards(job, track(mine)))
        shards = dict(chain.from_iterable(part.items() for part in parts))
        done = together(lambda: _finish(job, encoded, provenance, shards) if rank == 0 else None)[0]
    assert done is not None
    return done


def _prepare(job: Job) -> Manifest | None:
    """Make the folder ready for shards, or give the cache that is already in it."""
    folder, identity = job.folder, job.identity
    if (folder / MANIFEST).exists() and not job.overwrite:
        # Another run finished it while this one waited.
        manifest = Manifest.read(folder)
        require_same(manifest.identity, identity, folder)
        return manifest
    if not job.overwrite:
        job.elsewhere.bring(folder / IDENTITY)
    if (folder / IDENTITY).exists() and not job.overwrite:
        require_same(read_json(folder / IDENTITY, CacheError, REBUILD), identity, folder)
    _clear(folder, ".*.tmp")
    _require_space(folder, job.plan)
    if job.overwrite:
        discard(folder)
    if not (folder / IDENTITY).exists():
        write_identity(folder, identity)
    job.elsewhere.send(folder / IDENTITY)
    return None


def _finish(
    job: Job, encoded: Encoded, provenance: dict[str, Any], shards: dict[Shard, list[int]]
) -> Manifest:
    """Write what stands around the shards and the manifest, and note what has been hashed."""
    folder = job.folder
    job.elsewhere.bring(*(folder / shard.file for shard in shards))
    absent = [shard.file for shard in shards if not (folder / shard.file).exists()]
    if absent:
        raise CacheError(
            f"{folder} does not hold {absent[0]}, which another machine has written.\n"
            "Set --data.cache_dir to a folder that all machines share, or to a URL such as s3://."
        )
    _clear(folder, "shard-*.safetensors", keep={shard.file for shard in shards})
    _write_starts(folder, job.adapter, job.examples, job.what, job.digest)
    starts = file_stamp(folder / STARTS)
    manifest = Manifest(
        identity=job.identity,
        rows=job.plan.rows,
        prompts=len(job.examples),
        skipped=encoded.skipped,
        answer_prefix=encoded.prefix,
        groups=job.what.groups,
        shards=tuple(sorted(shards, key=lambda shard: shard.file)),
        starts_sha256=file_digest(folder / STARTS, CacheError),
        provenance=provenance,
    )
    manifest.write(folder)
    # Nobody need read through again what was hashed as it was written.
    note_verified(folder, {shard.file: stamp for shard, stamp in shards.items()} | {STARTS: starts})
    return manifest


def discard(folder: Path) -> None:
    """Delete a cache of one split: its own files only.

    Raises:
        CacheError: the folder cannot be written.
    """
    # The manifest first: without it nothing reads the rest.
    _clear(folder, *FILES, VERIFIED, ".*.tmp")


def _clear(folder: Path, *patterns: str, keep: Set[str] = frozenset()) -> None:
    try:
        for pattern in patterns:
            for path in folder.glob(pattern):
                if path.name not in keep:
                    path.unlink()
    except OSError as cause:
        raise CacheError(
            f"{folder} cannot be cleared ({cause.strerror}). Choose another --data.cache_dir."
        ) from cause


def _write_starts(
    folder: Path,
    adapter: ModelAdapter,
    examples: Sequence[Example],
    what: Extraction,
    digest: str,
) -> None:
    """The start tokens' states: constants of the model, stored once for all rows."""
    if file_tag(folder / STARTS) == digest:
        return
    adapter.check()
    tokens = sorted({int(example.input_ids[0]) for example in examples})
    states: list[Tensor] = []
    for token in tokens:
        ids = torch.tensor([[token]], device=adapter.device)
        at = torch.zeros_like(ids)
        states.append(collect_states(adapter, ids, None, at, what.layers).hidden[0, 0].cpu())
    content = {"token_id": torch.tensor(tokens), "hidden": torch.stack(states)}
    write_tensors(folder / STARTS, content, digest, CacheError)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise CacheError(
            f"{folder} cannot be made ({cause.strerror}). Choose another --data.cache_dir."
        ) from cause


@contextmanager
def _exclusive(folder: Path, say: Callable[[str], None]) -> Generator[None]:
    """One builder at a time; a second one waits for the first and then finds its cache."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"Another process is building {folder}; waiting for it.")
        lock.acquire()
    except OSError as cause:
        raise CacheError(
            f"{folder} cannot be written ({cause.strerror}). Choose another --data.cache_dir."
        ) from cause
    try:
        yield
    finally:
        lock.release()


def _require_space(folder: Path, plan: Estimate) -> None:
    present = sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))
    needed, free = plan.bytes - present, shutil.disk_usage(folder).free
    if needed > free:
        raise CacheError(
            f"This cache takes {plan.bytes / 1e9:.3g} GB ({needed / 1e9:.3g} GB to go) and "
            f"{folder} has {free / 1e9:.3g} GB free.\n"
            "Choose another --data.cache_dir, fewer --model.layers, --data.limit, or "
            "--data.mode online."
        )
