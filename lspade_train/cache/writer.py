"""Write a cache: identity first, then its shards, the manifest last; resumable.

`build` writes hidden states, `add_targets` adds SPADE's targets for the rows of a finished cache.
Knows nothing of recipes or URLs, nor of who started the processes that share the work.
"""

import shutil
from collections.abc import Callable, Generator, Iterable, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from lspade_train.cache.extract import SWEEP_ROWS, Extraction, extract, row_count, spade_targets
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
from lspade_train.cache.reader import VERIFIED, known_stamps, note_verified, verify
from lspade_train.cache.shards import (
    Estimate,
    LocalStore,
    Part,
    RemoteStore,
    estimate,
    target_bytes,
    write_parts,
)
from lspade_train.errors import CacheError
from lspade_train.io.parallel import ranks, together
from lspade_train.io.storage import (
    file_digest,
    file_stamp,
    file_tag,
    json_digest,
    read_json,
    read_tensors,
    write_tensors,
)
from lspade_train.models import ModelAdapter
from lspade_train.probes.spade import collect_states
from lspade_train.tasks import Encoded, Example

Result = TypeVar("Result")

Track = Callable[[Sequence[int]], Iterable[int]]
"""Wraps the shard numbers in a progress bar."""


@dataclass(frozen=True)
class Build:
    """One split's cache while it is written.

    Attributes:
        folder: where it goes.
        adapter: the frozen model.
        what: what is computed of each prompt.
        identity: what decides the bytes.
        store: where else each file goes as soon as it is complete.
        overwrite: compute what exists already, too.
        track: wraps the shard numbers in a progress bar.
        say: shows the user a line.
    """

    folder: Path
    adapter: ModelAdapter
    what: Extraction
    identity: Identity
    store: RemoteStore = LocalStore()  # noqa: RUF009  (it has no state)
    overwrite: bool = False
    track: Track = iter
    say: Callable[[str], None] = lambda _: None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the identity."""
        return json_digest(self.identity)

    @property
    def compiled(self) -> str:
        """Ends the tag of what compiled blocks have computed: they round in another way."""
        return ", compiled" * self.adapter.compiled


def build(
    job: Build,
    encoded: Encoded,
    *,
    tokens_per_batch: int,
    shard_mb: float,
    provenance: dict[str, Any],
) -> Manifest:
    """Run the frozen model over all prompts and write their hidden states; resumes.

    The processes of one run share the shards out among themselves; the first one does the rest.
    With `overwrite` an old cache is deleted once nothing but the model can still fail.

    Args:
        job: folder, model, identity.
        encoded: the tokenised prompts.
        tokens_per_batch: padded prompt tokens per forward.
        shard_mb: size of a shard with its targets.
        provenance: recorded in the manifest; decides nothing.

    Raises:
        CacheError: the folder holds another cache, the disk is too small or cannot be written.
        NumericsError: a hidden state is NaN or Inf.
        StoppedError: another process of this run was killed.
    """
    plan = estimate(job.adapter, encoded.examples, job.what, shard_mb)

    def part(number: int) -> Part:
        first = number * plan.prompts_per_shard
        examples = encoded.examples[first : first + plan.prompts_per_shard]
        # Rows and rounding depend on more than the identity: a resumed run may have other settings.
        tag = (
            f"{job.digest} prompts {first}:{first + len(examples)}, "
            f"{tokens_per_batch} tokens per batch{job.compiled}"
        )
        compute = partial(_states, job, examples, tokens_per_batch)
        path = job.folder / f"shard-{number:05d}.safetensors"
        return Part(path, row_count(examples), tag, compute)

    with ExitStack() as held:

        def begin() -> Manifest | None:
            held.enter_context(_exclusive(job))
            return _prepare(job, plan)

        finished = _first(begin)
        if finished is not None:
            return finished
        shards = _write_shared(job, part, plan.shards)
        return _first(lambda: _finish(job, encoded, plan, provenance, shards))


def add_targets(job: Build) -> Manifest:
    """Compute SPADE's targets for the rows of a finished cache; resumes, rewrites no shard.

    The same bytes whether the shards were written by this run or by an earlier one.

    Args:
        job: folder, model and kind of target; `overwrite` and the rest of `what` are not read.

    Raises:
        CacheError: the cache is missing, damaged or another one, or the disk is too small.
        NumericsError: a target is NaN or Inf.
        StoppedError: another process of this run was killed.
    """
    with ExitStack() as held:

        def begin() -> Manifest:
            held.enter_context(_exclusive(job))
            return _prepare_targets(job)

        manifest = _first(begin)
        if manifest.targets:
            return manifest

        def part(number: int) -> Part:
            shard = manifest.shards[number]
            tag = f"{job.digest} targets of {shard.sha256}, {SWEEP_ROWS} rows{job.compiled}"
            path = job.folder / shard.file.replace("shard-", "target-")
            return Part(path, shard.rows, tag, partial(_targets, job, shard))

        targets = _write_shared(job, part, len(manifest.shards))
        return _first(lambda: _finish_targets(job, manifest, targets))


def _first(work: Callable[[], Result]) -> Result:
    """What `work` gives on the first process, for all of them."""
    return together(lambda: work() if ranks()[0] == 0 else None)[0]  # type: ignore[return-value]


def _write_shared(job: Build, part: Callable[[int], Part], count: int) -> dict[Shard, list[int]]:
    """Write this process's share of the files; all files of all processes, with their stamps."""
    rank, world = ranks()
    numbers = range(rank, count, world)
    parts = together(
        lambda: write_parts(map(part, job.track(numbers)), job.store, overwrite=job.overwrite)
    )
    found = dict(chain.from_iterable(part.items() for part in parts))
    return dict(sorted(found.items(), key=lambda item: item[0].file))


def _states(job: Build, examples: Sequence[Example], tokens_per_batch: int) -> dict[str, Tensor]:
    job.adapter.check()
    return extract(job.adapter, examples, job.what, tokens_per_batch)


def _targets(job: Build, shard: Shard) -> dict[str, Tensor]:
    job.adapter.check()
    job.store.fetch_files(job.folder / shard.file)  # another machine may have written it
    states = read_tensors(job.folder / shard.file, CacheError, REBUILD)
    return spade_targets(job.adapter, states, job.what)


def _prepare(job: Build, plan: Estimate) -> Manifest | None:
    """Make the folder ready for shards, or give the cache that is already in it."""
    folder, identity = job.folder, job.identity
    if (folder / MANIFEST).exists() and not job.overwrite:
        # Another run finished it while this one waited.
        manifest = Manifest.read(folder)
        require_same(manifest.identity, identity, folder)
        return manifest
    if not job.overwrite:
        job.store.fetch_files(folder / IDENTITY)
    if (folder / IDENTITY).exists() and not job.overwrite:
        require_same(read_json(folder / IDENTITY, CacheError, REBUILD), identity, folder)
    _clear(folder, ".*.tmp")
    _require_space(folder, plan.bytes, "shard-*.safetensors", "target-*.safetensors")
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
    """Write what belongs to all shards, and the manifest, and note what has been hashed."""
    folder = job.folder
    _gather(job, shards)
    _clear(folder, "shard-*.safetensors", keep={shard.file for shard in shards})
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
        provenance=provenance,
    )
    manifest.write(folder)
    # What was hashed as it was written need not be read through again.
    note_verified(folder, {shard.file: stamp for shard, stamp in shards.items()} | {STARTS: starts})
    return manifest


def _prepare_targets(job: Build) -> Manifest:
    """The manifest of the cache in the folder; makes that ready for targets where it lists none."""
    folder = job.folder
    manifest = Manifest.read(folder)
    require_same(manifest.identity, job.identity, folder)
    if manifest.targets:
        return manifest
    verify(folder, manifest, trust_unchanged=True)  # targets of damaged states would look sound
    _clear(folder, ".*.tmp")
    size = manifest.rows * target_bytes(job.adapter, job.what)
    _require_space(folder, size, "target-*.safetensors")
    return manifest


def _finish_targets(job: Build, manifest: Manifest, targets: dict[Shard, list[int]]) -> Manifest:
    """Replace the manifest by one that lists the targets, too."""
    folder = job.folder
    _gather(job, targets)
    _clear(folder, "target-*.safetensors", keep={target.file for target in targets})
    manifest = replace(manifest, targets=tuple(targets))
    manifest.write(folder)
    stamps = {target.file: stamp for target, stamp in targets.items()}
    note_verified(folder, known_stamps(folder) | stamps)
    return manifest


def _gather(job: Build, files: Iterable[Shard]) -> None:
    """Fetch the files that other machines have written."""
    paths = [job.folder / file.file for file in files]
    job.store.fetch_files(*paths)
    absent = [path for path in paths if not path.exists()]
    if absent:
        raise CacheError(
            f"{job.folder} does not hold {absent[0].name}, which another machine has written.\n"
            "Set --data.cache_dir to a folder that all machines share, or to a URL such as s3://."
        )


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


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise CacheError(
            f"{folder} cannot be made ({cause.strerror}). Choose another --data.cache_dir."
        ) from cause


@contextmanager
def _exclusive(job: Build) -> Generator[None]:
    """One writer at a time; a second one waits for the first and then finds its cache."""
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


def _require_space(folder: Path, size: int, *patterns: str) -> None:
    """Refuse a disk that has no room for what is still to be written of so many bytes."""
    present = sum(path.stat().st_size for pattern in patterns for path in folder.glob(pattern))
    needed, free = size - present, shutil.disk_usage(folder).free
    if needed > free:
        raise CacheError(
            f"This cache takes {size / 1e9:.3g} GB ({needed / 1e9:.3g} GB of it still to be "
            f"written) and {folder} has {free / 1e9:.3g} GB free.\n"
            "Choose another --data.cache_dir, fewer --model.layers, --data.limit, or "
            "--data.mode online."
        )
