"""Writes a cache's hidden states; resumable. The identity is written first, the manifest last.

Independent of recipes, URLs and how the processes that share the work were started.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lspade_train.cache.extract import extract, row_count
from lspade_train.cache.job import (
    Build,
    clear,
    exclusive,
    gather,
    on_first,
    require_space,
    write_shared,
)
from lspade_train.cache.manifest import (
    FILES,
    IDENTITY,
    MANIFEST,
    REBUILD,
    STARTS,
    Manifest,
    Shard,
    require_same,
    write_identity,
)
from lspade_train.cache.reader import VERIFIED, note_verified
from lspade_train.cache.shards import Estimate, Part, estimate
from lspade_train.cache.unfinished import SUFFIX, Unfinished
from lspade_train.errors import CacheError
from lspade_train.io.storage import file_digest, file_stamp, read_json
from lspade_train.io.tensors import file_tag, write_tensors
from lspade_train.probes.spade import collect_states
from lspade_train.tasks import Encoded, Example


def build(
    job: Build,
    encoded: Encoded,
    *,
    tokens_per_batch: int,
    shard_mb: float,
    provenance: dict[str, Any],
) -> Manifest:
    """Run the frozen model over all prompts and write their hidden states; resumable.

    The processes of a run divide the shards among themselves; rank 0 does the rest. With
    `overwrite` an old cache is deleted only when nothing but the model can still fail.

    Args:
        job: folder, model, identity.
        encoded: the tokenised prompts.
        tokens_per_batch: padded prompt tokens per forward.
        shard_mb: size of a shard with its targets.
        provenance: recorded in the manifest, for information only.

    Raises:
        CacheError: the folder holds another cache, or the disk is too small or not writable.
        NumericsError: a hidden state is NaN or Inf.
        StoppedError: another process of this run was killed.
    """
    plan = estimate(job.adapter, encoded.examples, job.what, shard_mb)

    def part(number: int) -> Part:
        first = number * plan.prompts_per_shard
        examples = encoded.examples[first : first + plan.prompts_per_shard]
        # Rows and rounding depend on more than the identity: a resumed run's settings may differ.
        tag = (
            f"{job.digest} prompts {first}:{first + len(examples)}, "
            f"{tokens_per_batch} tokens per batch, shared prefixes once{job.compiled}"
        )
        compute = partial(_states, job, examples, tokens_per_batch)
        path = job.folder / f"shard-{number:05d}.safetensors"
        return Part(path, row_count(examples), tag, compute)

    with ExitStack() as held:

        def begin() -> Manifest | None:
            held.enter_context(exclusive(job))
            return _prepare(job, plan)

        finished = on_first(begin)
        if finished is not None:
            return finished
        shards = write_shared(job, part, plan.shards)
        return on_first(lambda: _finish(job, encoded, plan, provenance, shards))


def _states(
    job: Build, examples: Sequence[Example], tokens_per_batch: int, unfinished: Unfinished
) -> dict[str, Tensor]:
    with job.adapter.steady(check=True):
        return extract(job.adapter, examples, job.what, tokens_per_batch, unfinished=unfinished)


def _prepare(job: Build, plan: Estimate) -> Manifest | None:
    """Prepare the folder for shards, or return the cache that is already in it."""
    folder, identity = job.folder, job.identity
    if (folder / MANIFEST).exists() and not job.overwrite:
        # Another run finished the cache while this one waited.
        manifest = Manifest.read(folder)
        require_same(manifest.identity, identity, folder)
        return manifest
    if not job.overwrite:
        job.store.fetch_files(folder / IDENTITY)
    if (folder / IDENTITY).exists() and not job.overwrite:
        require_same(read_json(folder / IDENTITY, CacheError, REBUILD), identity, folder)
    clear(folder, ".*.tmp")
    require_space(folder, plan.bytes, "shard-*.safetensors", "target-*.safetensors")
    if job.overwrite:
        discard(folder)
    if not (folder / IDENTITY).exists():
        write_identity(folder, identity)
    job.store.publish_file(folder / IDENTITY)
    return None


def _finish(
    job: Build,
    encoded: Encoded,
    plan: Estimate,
    provenance: dict[str, Any],
    shards: dict[Shard, list[int]],
) -> Manifest:
    """Write the start states and the manifest, and record which files have been hashed."""
    folder = job.folder
    gather(job, shards)
    clear(folder, "shard-*.safetensors", keep={shard.file for shard in shards})
    clear(folder, f"*{SUFFIX}")
    _write_starts(job, encoded.examples)
    starts = file_stamp(folder / STARTS)
    manifest = Manifest(
        identity=job.identity,
        rows=plan.rows,
        prompts=len(encoded.examples),
        skipped=encoded.skipped,
        answer_prefix=encoded.prefix,
        groups=job.what.groups,
        shards=tuple(shards),
        targets=(),
        starts_sha256=file_digest(folder / STARTS, CacheError),
        provenance=provenance | ({"labels_decided": encoded.labels} if encoded.labels else {}),
    )
    manifest.write(folder)
    # The files were hashed as they were written: do not read them again to verify them.
    note_verified(folder, {shard.file: stamp for shard, stamp in shards.items()} | {STARTS: starts})
    return manifest


def discard(folder: Path) -> None:
    """Delete a cache of one split: its own files only.

    Raises:
        CacheError: the folder cannot be written.
    """
    # The manifest first: without it, the other files are never read.
    clear(folder, *FILES, VERIFIED, ".*.tmp", f"*{SUFFIX}")


def _write_starts(job: Build, examples: Sequence[Example]) -> None:
    """The start tokens' states: constants of the model, stored once for all rows."""
    path, adapter, layers = job.folder / STARTS, job.adapter, job.what.layers
    if file_tag(path) == job.digest:
        return
    adapter.check()
    tokens = sorted({int(example.input_ids[0]) for example in examples})
    states: list[Tensor] = []
    for token in tokens:
        ids = torch.tensor([[token]], device=adapter.device)
        at = torch.zeros_like(ids)
        states.append(collect_states(adapter, ids, None, at, layers).hidden[0, 0].cpu())
    content = {"token_id": torch.tensor(tokens), "hidden": torch.stack(states)}
    write_tensors(path, content, job.digest, CacheError)
