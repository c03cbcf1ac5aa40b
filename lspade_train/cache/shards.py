"""The shards of a cache: which prompts each holds, how they are computed and written.

A shard is a function of its prompts alone: batches are formed inside it, so neither a kill nor the
number of processes changes its bytes. Knows nothing of the other shards or of the manifest.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lspade_train.cache.extract import Extraction, extract, row_count
from lspade_train.cache.manifest import Identity, Shard
from lspade_train.errors import CacheError
from lspade_train.io.storage import file_digest, file_stamp, file_tag, json_digest, write_tensors
from lspade_train.models import ModelAdapter
from lspade_train.tasks import Example

LABEL_BYTES = 40
"""About what a row's labels and ids take beside its states."""


class Elsewhere(Protocol):
    """A place beyond the folder that finished files go to, and may be had from."""

    def bring(self, *paths: Path) -> None:
        """Make files what they are there, if they are there."""

    def send(self, path: Path) -> None:
        """Take a file that is complete."""


class Nowhere:
    """The folder is all there is."""

    def bring(self, *paths: Path) -> None:
        """Nothing to bring."""

    def send(self, path: Path) -> None:
        """Nobody to send to."""


@dataclass(frozen=True)
class Estimate:
    """What a cache will take, known before the model runs.

    Attributes:
        rows: cached rows.
        row_bytes: bytes per row, states and targets.
        prompts_per_shard: prompts in one shard.
        shards: number of shards.
    """

    rows: int
    row_bytes: int
    prompts_per_shard: int
    shards: int

    @property
    def bytes(self) -> int:
        """Size of the whole cache."""
        return self.rows * self.row_bytes


def estimate(
    adapter: ModelAdapter, examples: Sequence[Example], what: Extraction, shard_mb: float
) -> Estimate:
    """Size and shards of a cache, without running the model."""
    size = torch.empty(0, dtype=adapter.dtype).element_size()
    layers, d = len(what.layers), adapter.hidden_size
    target = {
        "hidden": d * size,
        "logits": adapter.vocab_size * 2,
        "topk": min(what.topk, adapter.vocab_size) * 6,
    }[what.targets]
    row_bytes = (layers + 1) * d * size + layers * target + LABEL_BYTES + 4 * what.max_choices
    rows = row_count(examples)
    per_prompt = row_bytes * rows / max(len(examples), 1)
    per_shard = max(int(shard_mb * 1_000_000 / per_prompt), 1)
    return Estimate(rows, row_bytes, per_shard, -(-len(examples) // per_shard))


def require_memory(size: Estimate) -> None:
    """Refuse states that this machine's memory cannot hold.

    Raises:
        CacheError: says what they take and what there is.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size.bytes > total:
        raise CacheError(
            f"These states take {size.bytes / 1e9:.3g} GB and this machine has {total / 1e9:.3g} "
            "GB of memory.\nUse --data.mode disk, fewer --model.layers, or --data.limit."
        )


@dataclass(frozen=True)
class Job:
    """All that decides the shards of one split.

    Attributes:
        folder: where they go.
        adapter: the frozen model.
        examples: the tokenised prompts.
        what: what is computed of each.
        identity: what decides their bytes, as the manifest tells it.
        tokens_per_batch: padded prompt tokens per forward.
        plan: how the prompts are dealt out.
        elsewhere: where else they go as soon as they are complete.
        overwrite: compute also what is there already.
    """

    folder: Path
    adapter: ModelAdapter
    examples: Sequence[Example]
    what: Extraction
    identity: Identity
    tokens_per_batch: int
    plan: Estimate
    elsewhere: Elsewhere
    overwrite: bool

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the identity."""
        return json_digest(self.identity)

    def part(self, number: int) -> "Part":
        """Shard `number`."""
        first = number * self.plan.prompts_per_shard
        examples = self.examples[first : first + self.plan.prompts_per_shard]
        # Rows and rounding depend on more than the identity: a resumed run may have other settings.
        tag = (
            f"{self.digest} prompts {first}:{first + len(examples)}, "
            f"{self.tokens_per_batch} tokens per batch{', compiled' * self.adapter.compiled}"
        )
        return Part(self.folder / f"shard-{number:05d}.safetensors", examples, tag)


@dataclass(frozen=True)
class Part:
    """One shard: its file, its prompts, and the tag that tells it from another shard."""

    path: Path
    examples: Sequence[Example]
    tag: str


def write_shards(job: Job, numbers: Iterable[int]) -> dict[Shard, list[int]]:
    """Compute and write the asked shards; those that are there already are only read through.

    While the model computes a shard, a thread writes, syncs, hashes and sends the one before: the
    device waits for no disk or network, and no more than two shards are in memory.

    Returns:
        The shards, each with its file's stamp from before it was hashed.

    Raises:
        CacheError: one cannot be written; those before it are complete.
        NumericsError: a hidden state is NaN or Inf; the shards before it are complete.
    """
    done: list[tuple[Shard, list[int]]] = []
    writing: Future[tuple[Shard, list[int]]] | None = None
    # Leaving the block, with an error or without, waits for the shard that is being written.
    with ThreadPoolExecutor(1, thread_name_prefix="shards") as disk:
        for number in numbers:
            part = job.part(number)
            tensors = None if _is_there(job, part) else _compute(job, part)
            if writing is not None:
                done.append(writing.result())
            writing = disk.submit(_store, job, part, tensors)
        if writing is not None:
            done.append(writing.result())
    return dict(done)


def _is_there(job: Job, part: Part) -> bool:
    if job.overwrite:
        return False
    job.elsewhere.bring(part.path)
    return file_tag(part.path) == part.tag


def _compute(job: Job, part: Part) -> dict[str, Tensor]:
    job.adapter.check()
    return extract(job.adapter, part.examples, job.what, job.tokens_per_batch)


def _store(job: Job, part: Part, tensors: dict[str, Tensor] | None) -> tuple[Shard, list[int]]:
    path = part.path
    if tensors is not None:
        write_tensors(path, tensors, part.tag, CacheError)
    stamp = file_stamp(path)
    digest = file_digest(path, CacheError)
    job.elsewhere.send(path)
    return Shard(path.name, row_count(part.examples), stamp[0], digest), stamp
