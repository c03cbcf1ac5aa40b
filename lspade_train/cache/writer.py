"""Write a cache: shard by shard, resumable, the manifest last. Knows nothing of recipes.

A shard is a function of its prompts alone: batches are formed inside it, so a killed run that is
resumed ends with the bytes of an undisturbed one.
"""

import shutil
from collections.abc import Callable, Generator, Iterable, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from lspade_train.adapters import ModelAdapter
from lspade_train.cache.extract import Extraction, extract, row_count
from lspade_train.cache.manifest import (
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
from lspade_train.errors import CacheError
from lspade_train.spade import collect_states
from lspade_train.storage import file_digest, file_tag, json_digest, read_json, write_tensors
from lspade_train.tasks import Encoded, Example

Track = Callable[[Iterable[int]], Iterable[int]]
"""Wraps the shard numbers in a progress bar."""

LABEL_BYTES = 40
"""About what a row's labels and ids take beside its states."""


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
    track: Track = iter,
    say: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Run the frozen model over all prompts and write their states; resumes where it stopped.

    With `overwrite` an old cache goes once nothing but the model can still fail.

    Raises:
        CacheError: the folder holds another cache, the disk is too small or cannot be written.
        NumericsError: a hidden state is NaN or Inf.
    """
    plan = estimate(adapter, encoded.examples, what, shard_mb)
    _make_folder(folder)
    with _exclusive(folder, say):
        if (folder / MANIFEST).exists() and not overwrite:
            # Another process finished it while this one waited.
            manifest = Manifest.read(folder)
            require_same(manifest.identity, identity, folder)
            return manifest
        if (folder / IDENTITY).exists() and not overwrite:
            require_same(read_json(folder / IDENTITY, CacheError, REBUILD), identity, folder)
        _clear(folder, ".*.tmp")
        _require_space(folder, plan)
        if overwrite:
            discard(folder)
        write_identity(folder, identity)
        digest = json_digest(identity)
        shards = [
            _shard(folder, number, adapter, encoded.examples, what, plan, digest, tokens_per_batch)
            for number in track(range(plan.shards))
        ]
        _clear(folder, "shard-*.safetensors", keep={shard.file for shard in shards})
        _write_starts(folder, adapter, encoded.examples, what, digest)
        manifest = Manifest(
            identity=identity,
            rows=plan.rows,
            prompts=len(encoded.examples),
            skipped=encoded.skipped,
            answer_prefix=encoded.prefix,
            groups=what.groups,
            shards=tuple(shards),
            starts_sha256=file_digest(folder / STARTS, CacheError),
            provenance=provenance,
        )
        manifest.write(folder)
    return manifest


def discard(folder: Path) -> None:
    """Delete a cache of one split: its own files only.

    Raises:
        CacheError: the folder cannot be written.
    """
    # The manifest first: without it nothing reads the rest.
    _clear(folder, MANIFEST, "shard-*.safetensors", STARTS, IDENTITY, ".verified.json", ".*.tmp")


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


def _shard(
    folder: Path,
    number: int,
    adapter: ModelAdapter,
    examples: Sequence[Example],
    what: Extraction,
    plan: Estimate,
    digest: str,
    tokens_per_batch: int,
) -> Shard:
    first = number * plan.prompts_per_shard
    mine = examples[first : first + plan.prompts_per_shard]
    path = folder / f"shard-{number:05d}.safetensors"
    # Rows and rounding depend on more than the identity: a resumed run may have other settings.
    tag = f"{digest} prompts {first}:{first + len(mine)}, {tokens_per_batch} tokens per batch"
    if file_tag(path) != tag:
        adapter.check()
        tensors = extract(adapter, mine, what, tokens_per_batch)
        write_tensors(path, tensors, tag, CacheError)
    return Shard(path.name, row_count(mine), path.stat().st_size, file_digest(path, CacheError))


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
