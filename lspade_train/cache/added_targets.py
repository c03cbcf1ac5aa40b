"""Adds SPADE's targets to a finished cache: one more file per shard, without rewriting any."""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from torch import Tensor

from lspade_train.cache.extract import SWEEP_ROWS, spade_targets
from lspade_train.cache.job import (
    Build,
    clear,
    exclusive,
    gather,
    on_first,
    require_space,
    write_shared,
)
from lspade_train.cache.manifest import REBUILD, Manifest, Shard, require_same
from lspade_train.cache.reader import known_stamps, note_verified, verify
from lspade_train.cache.shards import Part, target_bytes
from lspade_train.cache.unfinished import SUFFIX, Unfinished
from lspade_train.errors import CacheError
from lspade_train.io.tensors import read_tensors


def add_targets(job: Build) -> Manifest:
    """Compute SPADE's targets for the rows of a finished cache; resumable, rewrites no shard.

    The bytes do not depend on whether the shards were written by this run or by an earlier one.

    Args:
        job: folder, model and kind of target; `overwrite` and the rest of `what` are ignored.

    Raises:
        CacheError: the cache is missing, damaged or a different one, or the disk is too small.
        NumericsError: a target is NaN or Inf.
        StoppedError: another process of this run was killed.
    """
    with ExitStack() as held:

        def begin() -> Manifest:
            held.enter_context(exclusive(job))
            return _prepare_targets(job)

        manifest = on_first(begin)
        if manifest.targets:
            return manifest

        def part(number: int) -> Part:
            shard = manifest.shards[number]
            tag = f"{job.digest} targets of {shard.sha256}, {SWEEP_ROWS} rows{job.compiled}"
            path = job.folder / shard.file.replace("shard-", "target-")
            return Part(path, shard.rows, tag, partial(_targets, job, shard))

        targets = write_shared(job, part, len(manifest.shards))
        return on_first(lambda: _finish_targets(job, manifest, targets))


def _targets(job: Build, shard: Shard, unfinished: Unfinished) -> dict[str, Tensor]:
    job.store.fetch_files(job.folder / shard.file)  # another machine may have written it
    states = read_tensors(job.folder / shard.file, CacheError, REBUILD)
    with job.adapter.steady(check=True):
        return spade_targets(job.adapter, states, job.what, unfinished=unfinished)


def _prepare_targets(job: Build) -> Manifest:
    """The manifest of the cache in the folder, which is prepared for targets if it has none."""
    folder = job.folder
    manifest = Manifest.read(folder)
    require_same(manifest.identity, job.identity, folder)
    if manifest.targets:
        return manifest
    verify(folder, manifest, trust_unchanged=True)  # targets of damaged states would look valid
    clear(folder, ".*.tmp")
    size = manifest.rows * target_bytes(job.adapter, job.what)
    require_space(folder, size, "target-*.safetensors")
    return manifest


def _finish_targets(job: Build, manifest: Manifest, targets: dict[Shard, list[int]]) -> Manifest:
    """Replace the manifest with one that also lists the targets."""
    folder = job.folder
    gather(job, targets)
    clear(folder, "target-*.safetensors", keep={target.file for target in targets})
    clear(folder, f"*{SUFFIX}")
    manifest = replace(manifest, targets=tuple(targets))
    manifest.write(folder)
    stamps = {target.file: stamp for target, stamp in targets.items()}
    note_verified(folder, known_stamps(folder) | stamps)
    return manifest
