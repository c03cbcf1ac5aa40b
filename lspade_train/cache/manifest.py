"""What a cache is: the identity that decides its bytes, and the list of its shards.

Knows nothing of models or tensors; `lspade-train info` reads a cache with this alone.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from lspade_train.errors import CacheError
from lspade_train.io.storage import json_digest, read_json, require_kinds, write_json

FORMAT_VERSION = 1
MANIFEST, IDENTITY, STARTS = "manifest.json", "identity.json", "starts.safetensors"
FILES = (MANIFEST, IDENTITY, STARTS, "shard-*.safetensors")

REBUILD = "Rebuild it: lspade-train cache --config RECIPE.yaml --overwrite"

FIELDS = {
    "identity": dict,
    "rows": int,
    "prompts": int,
    "skipped": int,
    "answer_prefix": str,
    "groups": list,
    "shards": list,
    "starts_sha256": str,
    "provenance": dict,
}
SHARD_FIELDS = {"file": str, "rows": int, "bytes": int, "sha256": str}
SHARD_NAME = re.compile(r"shard-[\w-]+\.safetensors")

Identity = dict[str, Any]
"""Flat and JSON: model, tokenizer, data, template, layers, positions, targets, format version."""


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
        identity: what decides the bytes; equal identities are interchangeable.
        rows: cached rows, one per answer position.
        prompts: prompts they came from.
        skipped: prompts left out, for being too long (or too short for the text task).
        answer_prefix: text between prompt and answer that the choices were resolved with.
        groups: names of the subgroups.
        shards: files in row order.
        starts_sha256: checksum of the start-token states.
        provenance: where it came from; decides nothing.
    """

    identity: Identity
    rows: int
    prompts: int
    skipped: int
    answer_prefix: str
    groups: tuple[str, ...]
    shards: tuple[Shard, ...]
    starts_sha256: str
    provenance: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of the identity."""
        return json_digest(self.identity)

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.bytes for shard in self.shards)

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
            shards = tuple(Shard(**shard) for shard in value.pop("shards"))
            manifest = cls(shards=shards, groups=tuple(value.pop("groups")), **value)
            same = manifest.digest == digest
        except (TypeError, ValueError) as cause:
            raise CacheError(f"{path} is no manifest ({cause}). {REBUILD}") from cause
        if not same:
            raise CacheError(f"{path} was changed after it was written. {REBUILD}")
        _check_shards(manifest, path)
        return manifest


def _check_shards(manifest: Manifest, path: Path) -> None:
    for shard in manifest.shards:
        require_kinds(asdict(shard), SHARD_FIELDS, path, CacheError, REBUILD)
        if not SHARD_NAME.fullmatch(shard.file):
            raise CacheError(f"{path} names a file outside its folder. {REBUILD}")
    rows = [shard.rows for shard in manifest.shards]
    if not rows or min(rows) < 1 or sum(rows) != manifest.rows:
        raise CacheError(f"{path} has {manifest.rows} rows and shards of {rows[:5]}. {REBUILD}")


def require_same(found: Identity, wanted: Identity, folder: Path) -> None:
    """Refuse a cache that was built for something else, naming the first field that differs.

    Raises:
        CacheError: the identities differ.
    """
    for field in (*wanted, *(name for name in found if name not in wanted)):
        if found.get(field) != wanted.get(field):
            raise CacheError(
                f"{folder} was built for another {field}: it has {_short(found.get(field))}, "
                f"the recipe asks for {_short(wanted.get(field))}.\n"
                "Rebuild it with lspade-train cache --config RECIPE.yaml --overwrite, or choose "
                "another folder with --data.cache_dir."
            )


def write_identity(folder: Path, identity: Identity) -> None:
    """Write `identity.json`, the first file of a cache, so that a resumed build knows its own."""
    write_json(folder / IDENTITY, identity, CacheError)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 48 else f"{text[:16]}..."
