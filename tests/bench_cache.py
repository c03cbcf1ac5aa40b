"""The cache: extraction against a plain forward, size on disk, read speed, peak memory."""

import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from bench_shape import (
    DEVICE,
    DTYPE,
    GPU,
    LAYERS,
    QUICK,
    ROUNDS,
    TOKENS_PER_BATCH,
    VOCAB,
    WIDTH,
    llama,
    prompts,
    shape,
    untouched_llama,
)
from bench_timing import Part, Row, interleaved, peak_memory, seconds, versus

from lspade_train import cache
from lspade_train.cache import Extraction, Manifest, StateDataset
from lspade_train.cache.loader import RowLoader
from lspade_train.errors import CacheError
from lspade_train.io.tensors import read_tensors, write_tensors
from lspade_train.models import ModelAdapter
from lspade_train.tasks import Encoded, Example

PROMPTS = 256 if GPU else 16 if QUICK else 64


def build(
    folder: Path,
    adapter: ModelAdapter,
    examples: list[Example],
    shard_mb: float,
    tokens: int,
    *,
    spade: bool = True,
) -> Manifest:
    """Build a complete cache of all layers, with or without SPADE targets, as the command does."""
    layers = tuple(range(1, adapter.num_layers))
    what = Extraction(layers, "original", "hidden", 64, 4, ("",), spade)
    job = cache.Build(folder, adapter, what, {"layers": list(layers)}, overwrite=True)
    manifest = cache.build(
        job, Encoded(examples, 0, ""), tokens_per_batch=tokens, shard_mb=shard_mb, provenance={}
    )
    return cache.add_targets(job) if spade else manifest


def row_bytes() -> int:
    """2 x layers x d x bytes: the expected size of a row."""
    return 2 * LAYERS * WIDTH * torch.empty(0, dtype=DTYPE).element_size()


def extraction(rounds: int = ROUNDS) -> list[Row]:
    """Extraction including writes against an untouched model's forward over the same batches."""
    adapter, plain, rows = llama(), untouched_llama(), []
    with tempfile.TemporaryDirectory() as folder:
        for tokens, most in ((256, 1.15),) if GPU else ((256, 1.20), (128, 1.35)):
            examples = prompts(PROMPTS, tokens)
            ids = torch.from_numpy(np.stack([e.input_ids for e in examples])).long().to(DEVICE)
            batches = ids.split(TOKENS_PER_BATCH // tokens)

            @torch.no_grad()
            def forward(batches: Any = batches) -> None:
                # The strictest baseline: it unembeds the last position only.
                for ids in batches:
                    mask = torch.ones_like(ids)
                    plain(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)

            def extract(examples: Any = examples) -> Manifest:
                # Two shards: the second is computed while the first is written.
                half = row_bytes() * PROMPTS / 2e6
                return build(Path(folder), adapter, examples, half, TOKENS_PER_BATCH)

            taken = interleaved({"forward": forward, "extraction": extract}, rounds)
            times = [seconds(taken, name) for name in ("extraction", "forward")]
            rows.append(
                (
                    f"extraction and writing / plain forward, T={tokens}",
                    versus(taken, "extraction", "forward"),
                    f"at most {most:.2f}; {times[0]:.2f} s / {times[1]:.2f} s, {PROMPTS} prompts "
                    f"({PROMPTS / times[0]:.1f}/s), {shape()}; "
                    "the forward unembeds the last position only",
                )
            )
        size = Manifest.read(Path(folder)).bytes / PROMPTS
    return [
        *rows,
        (
            "bytes per prompt / (2 x layers x d x bytes)",
            f"{size / row_bytes():.3f}",
            f"within 5%; {size / 1e3:.1f} kB / {row_bytes() / 1e3:.1f} kB",
        ),
        (
            "bytes per prompt / fp16 logits of all layers",
            f"{size / (2 * LAYERS * VOCAB):.3f}",
            f"{size / 1e3:.1f} kB / {2 * LAYERS * VOCAB / 1e3:,.0f} kB",
        ),
    ]


def every_position(rounds: int = ROUNDS, count: int = 48, tokens: int = 128) -> list[Row]:
    """Extraction at all positions of running text, final target, against the forward."""
    adapter, plain = llama(), untouched_llama()
    places = np.arange(tokens)
    examples = [
        Example(e.input_ids, places, e.input_ids.astype(np.int64), (), e.row)
        for e in prompts(count, tokens)
    ]
    ids = torch.from_numpy(np.stack([e.input_ids for e in examples])).long().to(DEVICE)
    # Shards of four texts, each written while the next is computed. A batch ends with
    # its shard, so the forward runs on the same batches: smaller products take longer per token.
    batches = ids.split(4)
    shard_mb = row_bytes() * len(batches[0]) * tokens / 1e6  # counts SPADE's targets, never written

    @torch.no_grad()
    def forward() -> None:
        for part in batches:
            mask = torch.ones_like(part)
            plain(part, attention_mask=mask, use_cache=False, logits_to_keep=1)

    with tempfile.TemporaryDirectory() as folder:

        def extract() -> None:
            new = Path(tempfile.mkdtemp(dir=folder))  # deleting an old cache takes time, too
            build(new, adapter, examples, shard_mb, TOKENS_PER_BATCH, spade=False)

        taken = interleaved({"forward": forward, "extraction": extract}, rounds)
    times = [seconds(taken, name) for name in ("extraction", "forward")]
    return [
        (
            "every position of running text, target final / plain forward",
            versus(taken, "extraction", "forward"),
            f"at most 1.20; {times[0]:.2f} s / {times[1]:.2f} s, {count} x {tokens} tokens in "
            f"{len(batches)} shards, the forward over the same batches",
        )
    ]


def compiled(rounds: int = ROUNDS, tokens: int = 256) -> list[Row]:
    """Extraction including writes with compiled blocks against uncompiled ones."""
    examples = prompts(TOKENS_PER_BATCH // tokens, tokens)
    with tempfile.TemporaryDirectory() as name, patch.dict(os.environ):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{name}/inductor"  # drop earlier compilations
        eager = llama()
        fast = ModelAdapter(eager.model, check=False, compile=True)

        def extract(adapter: ModelAdapter) -> None:
            build(Path(name) / "cache", adapter, examples, 256, TOKENS_PER_BATCH)

        start = time.perf_counter()
        extract(fast)  # runs the adapter's check, and compiles
        first = time.perf_counter() - start
        cases = {"compiled": partial(extract, fast), "eager": partial(extract, eager)}
        taken = interleaved(cases, rounds)
    times = [seconds(taken, case) for case in cases]
    return [
        (
            f"extraction, compiled / eager, T={tokens}",
            versus(taken, "compiled", "eager"),
            f"{times[0]:.2f} s / {times[1]:.2f} s, {len(examples)} prompts; compiling takes "
            f"{first - times[0]:.0f} s once, with torch's own cache empty",
        )
    ]


def reading(
    rounds: int = ROUNDS, rows: int = 1024 if QUICK else 4096, shards: int = 4
) -> list[Row]:
    """A shuffled epoch from memory-mapped shards against copying the same bytes."""
    per_shard = rows // shards
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [folder / f"{number}.safetensors" for number in range(shards)]
        for file in files:
            _write_rows(file, per_shard)
        maps = [read_tensors(file, CacheError) for file in files]
        dataset = StateDataset(maps, ("",), range(1, LAYERS))
        loader = RowLoader(dataset, 64, seed=0)
        source = [value for shard in maps for value in shard.values()]
        size = sum(value.nbytes for value in source)
        there = [torch.empty_like(value) for value in source]
        pieces = [piece for value in source for piece in value.split(64)]

        def epoch() -> None:
            for _ in loader:
                pass

        def copy() -> None:
            for to, value in zip(there, source, strict=True):
                to.copy_(value)

        def copy_in_pieces() -> None:
            for value in pieces:
                value.clone()

        cases = {"shuffled": epoch, "copy": copy, "pieces": copy_in_pieces}
        taken = interleaved(cases, rounds)
    where = f"warm pages, {rows:,} rows, {shards} shards, batches of 64"
    rate = {name: size / seconds(taken, name) / 1e9 for name in cases}
    return [
        (
            "shuffled cache reading / memory copy, rate",
            versus(taken, "copy", "shuffled"),
            f"at least 0.70; {rate['shuffled']:.2f} GB/s / {rate['copy']:.2f} GB/s, {where}",
        ),
        (
            "shuffled cache reading / copy in batches, rate",
            versus(taken, "pieces", "shuffled"),
            f"{rate['shuffled']:.2f} GB/s / {rate['pieces']:.2f} GB/s; the copies stay in the "
            "processor's cache",
        ),
    ]


def _write_rows(file: Path, rows: int) -> None:
    states = torch.randn(rows, LAYERS - 1, WIDTH).to(DTYPE)
    number = torch.arange(rows, dtype=torch.int32)
    ids = ("start_id", "position_id", "answer_id", "choice_count", "group")
    labels = {name: number.clone() for name in ids}
    labels |= {"labelled": number > 0, "choice_ids": number[:, None].repeat(1, 4)}
    content = {"hidden": states, "target": states.clone(), "final": states[:, 0].clone()}
    write_tensors(file, content | labels)


def build_tiny(count: int) -> None:
    """A cache of `count` prompts of a tiny model, in small shards."""
    adapter = llama(64, 4, 128)
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), adapter, prompts(count, 32, 128), 0.25, 2048)


def memory() -> list[Row]:
    """Peak memory of building a cache of 1,000 and of 10,000 prompts."""
    few, many = (
        peak_memory("bench_cache", "None", f"build_tiny({count})", whole=True)
        for count in (1000, 10_000)
    )
    return [
        (
            "peak memory of cache, 10,000 / 1,000 prompts",
            f"{many / few:.3f}",
            f"{many:,.0f} MB / {few:,.0f} MB, whole process, shards of 0.25 MB",
        )
    ]


PARTS = {
    "extraction": Part(extraction, 100, quick=15),
    "positions": Part(every_position, 30),
    "compile": Part(compiled, 120),
    "reading": Part(reading, 20, quick=5),
    "memory": Part(memory, 60),
}
