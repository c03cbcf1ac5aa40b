"""A cache's manifest: the identity that determines its bytes, and the list of its shards.

Independent of models and tensors: `lspade-train info` describes a cache with this file alone.
"""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from lspade_train.errors import CacheError
from lspade_train.io.storage import json_digest, read_json, require_kinds, write_json

FORMAT_VERSION = 2
MANIFEST, IDENTITY, STARTS = "manifest.json", "identity.json", "starts.safetensors"
FILES = (MANIFEST, IDENTITY, STARTS, "shard-*.safetensors", "target-*.safetensors")

REBUILD = "Rebuild it: lspade-train cache --config RECIPE.yaml --overwrite"

FIELDS = {
    "identity": dict,
    "rows": int,
    "prompts": int,
    "skipped": int,
    "answer_prefix": str,
    "groups": list,
    "shards": list,
    "targets": list,
    "starts_sha256": str,
    "provenance": dict,
}
SHARD_FIELDS = {"file": str, "rows": int, "bytes": int, "sha256": str}
FILE_NAMES = {
    "shards": re.compile(r"shard-[\w-]+\.safetensors"),
    "targets": re.compile(r"target-[\w-]+\.safetensors"),
}

Identity = dict[str, Any]
"""Flat, JSON: model, tokenizer, data, template, layers, positions, targets, format version."""


@dataclass(frozen=True)
class Shard:
    """One complete file of rows."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A finished cache of one split.

    Attributes:
        identity: determines the bytes; caches of equal identity are interchangeable.
        rows: number of cached rows, one per answer position.
        prompts: number of prompts they came from.
        skipped: number of prompts skipped as too long (or too short for the text task).
        answer_prefix: text between prompt and answer that the choices were resolved with.
        groups: names of the subgroups.
        shards: files of hidden states and labels, in row order.
        targets: files of SPADE's targets for the same rows, one per shard; empty if no recipe has
            needed them yet.
        starts_sha256: checksum of the start-token states.
        provenance: where it came from; for information only.
    """

    identity: Identity
    rows: int
    prompts: int
    skipped: int
    answer_prefix: str
    groups: tuple[str, ...]
    shards: tuple[Shard, ...]
    targets: tuple[Shard, ...]
    starts_sha256: str
    provenance: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of the identity."""
        return json_digest(self.identity)

    @property
    def files(self) -> tuple[Shard, ...]:
        """All files of rows."""
        return self.shards + self.targets

    @property
    def bytes(self) -> int:
        """Size of all files of rows."""
        return sum(file.bytes for file in self.files)

    def without_targets(self) -> Self:
        """The same rows without SPADE's targets."""
        return replace(self, targets=())

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, the last file of a cache.

        Raises:
            CacheError: the folder cannot be written.
        """
        value = {"format_version": FORMAT_VERSION, "digest": self.digest, **asdict(self)}
        write_json(folder / MANIFEST, value, CacheError)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a finished cache's manifest.

        Raises:
            CacheError: missing, damaged, or of another format.
        """
        path = folder / MANIFEST
        value = read_json(path, CacheError, REBUILD)
        if value.pop("format_version", None) != FORMAT_VERSION:
            raise CacheError(f"{path} is not of cache format {FORMAT_VERSION}. {REBUILD}")
        digest = value.pop("digest", None)
        require_kinds(value, FIELDS, path, CacheError, REBUILD)
        try:
            files = {k: tuple(Shard(**file) for file in value.pop(k)) for k in FILE_NAMES}
            manifest = cls(**files, groups=tuple(value.pop("groups")), **value)
            same = manifest.digest == digest
        except (TypeError, ValueError) as cause:
            raise CacheError(f"{path} is not a manifest ({cause}). {REBUILD}") from cause
        if not same:
            raise CacheError(f"{path} was changed after it was written. {REBUILD}")
        _check_shards(manifest, path)
        return manifest


def _check_shards(manifest: Manifest, path: Path) -> None:
    for name, pattern in FILE_NAMES.items():
        for file in getattr(manifest, name):
            require_kinds(asdict(file), SHARD_FIELDS, path, CacheError, REBUILD)
            if not pattern.fullmatch(file.file):
                raise CacheError(f"{path} names a file outside its folder. {REBUILD}")
    rows = [shard.rows for shard in manifest.shards]
    targets = [file.rows for file in manifest.targets]
    if not rows or min(rows) < 1 or sum(rows) != manifest.rows:
        raise CacheError(f"{path} has {manifest.rows} rows and shards of {rows[:5]}. {REBUILD}")
    if targets and targets != rows:
        raise CacheError(f"{path} has shards of {rows[:5]}, targets of {targets[:5]}. {REBUILD}")


def require_same(found: Identity, wanted: Identity, folder: Path) -> None:
    """Raise if a cache was built for something else, naming the first field that differs.

    Raises:
        CacheError: the identities differ.
    """
    for field in (*wanted, *(name for name in found if name not in wanted)):
        if found.get(field) != wanted.get(field):
            raise CacheError(
                f"{folder} was built with other settings: {field} is {_short(found.get(field))} "
                f"there, and {_short(wanted.get(field))} in the recipe.\n"
                "Rebuild it with lspade-train cache --config RECIPE.yaml --overwrite, or choose "
                "another folder with --data.cache_dir."
            )


def write_identity(folder: Path, identity: Identity) -> None:
    """Write `identity.json`, a cache's first file, by which a resumed build recognises its own."""
    write_json(folder / IDENTITY, identity, CacheError)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 48 else f"{text[:16]}..."
