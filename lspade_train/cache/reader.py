"""Opens and verifies a cache: checksums once, then memory-mapped shards. Independent of models."""

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_type_hints

from jaxtyping import jaxtyped
from torch import Tensor

from lspade_train.cache.dataset import StateDataset
from lspade_train.cache.manifest import (
    MANIFEST,
    REBUILD,
    STARTS,
    Identity,
    Manifest,
    Shard,
    require_same,
)
from lspade_train.cache.states import REDUCED, TARGETS, StateBatch
from lspade_train.errors import CacheError
from lspade_train.io.storage import file_digest, file_stamp, read_json, write_json
from lspade_train.io.tensors import read_tensors

VERIFIED = ".verified.json"

Track = Callable[[Iterable[Shard]], Iterable[Shard]]


def open_cache(
    folder: Path, identity: Identity | None = None, *, spade: bool = True, track: Track = iter
) -> tuple[Manifest, StateDataset]:
    """Open a finished cache of one split.

    Every file's checksum is compared the first time it is opened after a change.

    Args:
        folder: folder with `manifest.json`.
        identity: identity that the cache must have; None accepts any.
        spade: also read SPADE's targets; False ignores them.
        track: wraps the files in a progress bar.

    Raises:
        CacheError: missing, damaged, built for something else, or without the needed targets.
    """
    manifest = Manifest.read(folder)
    if identity is not None:
        require_same(manifest.identity, identity, folder)
    if spade and not manifest.targets:
        raise CacheError(
            f"{folder} holds hidden states without SPADE targets: it was built for model.target "
            "final.\nAdd them: lspade-train cache --config RECIPE.yaml --model.target spade"
        )
    manifest = manifest if spade else manifest.without_targets()
    verify(folder, manifest, track=track, trust_unchanged=True)
    return manifest, read_shards(folder, manifest)


def read_shards(folder: Path, manifest: Manifest) -> StateDataset:
    """Map the files that a manifest lists, unverified.

    Raises:
        CacheError: one of them is damaged or does not contain the rows it should.
    """
    layers = _layers(manifest, folder)
    shards: list[dict[str, Tensor]] = []
    for number, shard in enumerate(manifest.shards):
        tensors = read_tensors(folder / shard.file, CacheError, REBUILD)
        for target in manifest.targets[number : number + 1]:
            tensors |= _targets(folder / target.file)
        shards.append(tensors)
        right = _is_batch(tensors, shard.rows, len(layers)) and _shapes(tensors) == _shapes(
            shards[0]
        )
        if not right:
            raise CacheError(_damaged(folder / shard.file, "does not contain the rows of a cache"))
    return StateDataset(shards, manifest.groups, layers)


def _targets(path: Path) -> dict[str, Tensor]:
    tensors = read_tensors(path, CacheError, REBUILD)
    if not tensors or not tensors.keys() <= TARGETS:
        raise CacheError(_damaged(path, "does not contain the targets of a cache"))
    return tensors


def _layers(manifest: Manifest, folder: Path) -> list[int]:
    layers = manifest.identity.get("layers")
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise CacheError(_damaged(folder / MANIFEST, "names no layers"))
    return layers


def _is_batch(tensors: dict[str, Tensor], rows: int, layers: int) -> bool:
    """Whether tensors have the names, dtypes and shapes of `StateBatch`."""
    hints = get_type_hints(StateBatch)
    if not tensors.keys() <= hints.keys() - REDUCED:
        return False
    with jaxtyped("context"):  # the same `rows` and `d` for all tensors
        right = all(isinstance(tensors.get(name), hint) for name, hint in hints.items())
    return right and tensors["hidden"].shape[:2] == (rows, layers)


def _shapes(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (value.dtype, value.shape[1:]) for name, value in tensors.items()}


def verify(
    folder: Path, manifest: Manifest, *, track: Track = iter, trust_unchanged: bool = False
) -> None:
    """Compare every file with its checksum in the manifest.

    Args:
        folder: folder of the files.
        manifest: lists the files and their checksums.
        track: wraps the shards in a progress bar.
        trust_unchanged: skip files whose size and times equal those of the last check. Times are
            only compared for equality, so that clock changes are harmless.

    Raises:
        CacheError: a file is missing, truncated or changed.
    """
    known = known_stamps(folder) if trust_unchanged else {}
    starts = Shard(STARTS, 0, -1, manifest.starts_sha256)
    seen: dict[str, list[int]] = {}
    for shard in track([*manifest.files, starts]):
        path = folder / shard.file
        if not path.is_file() or path.is_symlink():
            raise CacheError(_damaged(path, "is missing"))
        size, *_ = seen[shard.file] = file_stamp(path)
        if known.get(shard.file) == seen[shard.file]:
            continue
        if shard.bytes not in (-1, size):
            raise CacheError(_damaged(path, f"has {size} bytes, not {shard.bytes}"))
        if file_digest(path, CacheError) != shard.sha256:
            raise CacheError(_damaged(path, "does not have its checksum"))
    if not seen.items() <= known.items():
        note_verified(folder, known | seen)


def known_stamps(folder: Path) -> dict[str, list[int]]:
    """The stamps that `note_verified` recorded; empty if the record is missing or damaged."""
    with contextlib.suppress(CacheError):
        return read_json(folder / VERIFIED, CacheError)
    return {}


def note_verified(folder: Path, seen: dict[str, list[int]]) -> None:
    """Record the stamps that files had when they were last hashed, for `verify` to trust.

    In a read-only folder nothing can be recorded, so such a cache is hashed every time.
    """
    with contextlib.suppress(CacheError):
        write_json(folder / VERIFIED, seen, CacheError)


def split_folders(folder: Path) -> list[Path]:
    """The split caches in a folder: itself, or its direct children.

    Raises:
        CacheError: the folder has none.
    """
    found = [p.parent for p in sorted([*folder.glob(MANIFEST), *folder.glob(f"*/{MANIFEST}")])]
    if not found:
        raise CacheError(
            f"No finished cache in {folder} (no {MANIFEST}). "
            "Build one: lspade-train cache --config RECIPE.yaml"
        )
    return found


def _damaged(path: Path, what: str) -> str:
    return f"{path} {what}: this cache is damaged.\n{REBUILD}"
