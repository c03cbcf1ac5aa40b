"""`DiskCache`: one split's cache on disk or behind a URL: opened, built, or completed.

Independent of Lightning and of what the rows are used for.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lspade_train import cache
from lspade_train.cache import Extraction, Manifest, StateDataset
from lspade_train.cache.extract import beginnings
from lspade_train.cache.manifest import MANIFEST
from lspade_train.cache.shards import LocalStore
from lspade_train.io.parallel import first_alone, ranks, together
from lspade_train.io.remote import Mirror
from lspade_train.io.text import byte_size
from lspade_train.models import ModelAdapter, sharing_told
from lspade_train.recipe import DataConfig
from lspade_train.tasks import Encoded, Example

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DiskCache:
    """Where one split's cache is, and everything needed to build it.

    Attributes:
        split: the split's name, for messages.
        folder: folder of its files.
        identity: everything that determines their bytes.
        far: the remote cache, if the folder is a mirror of one.
        config: the recipe's data section.
        spade: whether SPADE's targets are needed.
        overwrite: rebuild what exists.
        adapter: returns the frozen model; called only if something has to be computed.
        encode: returns the tokenised prompts; called only then, too.
        extraction: returns the extraction for given examples.
    """

    split: str
    folder: Path
    identity: dict[str, Any]
    far: Mirror | None
    config: DataConfig
    spade: bool
    overwrite: bool
    adapter: Callable[[], ModelAdapter]
    encode: Callable[[], Encoded]
    extraction: Callable[[Sequence[Example]], Extraction]

    def open(self) -> tuple[Manifest, StateDataset, bool]:
        """The rows, and whether all of them were present; what is missing is computed first.

        Raises:
            LSpadeError: the model, the data or the cache cannot be used.
        """
        # Rank 0 decides for all: the cache may be finished between two processes' calls.
        rows, targets = together(self._present)[0]
        if not rows:
            self._build()
        if self.spade and not targets:
            if rows:
                log.info("%s: SPADE targets for the rows of %s", self.split, self.folder)
            cache.add_targets(self._job(self.extraction([]), "SPADE targets"))
        reused = rows and (targets or not self.spade)
        manifest, dataset = first_alone(lambda: self._opened(reused))
        if reused:
            what = f"{manifest.rows:,} rows, no model forward"
            log.info("%s: reusing %s (%s)", self.split, self.folder, what)
        return manifest, dataset, reused

    def _present(self) -> tuple[bool, bool]:
        """Whether a finished cache has the rows, and whether it has the targets."""
        if self.overwrite:
            return False, False
        if self.far:
            self.far.fetch()
        if not (self.folder / MANIFEST).exists():
            return False, False
        manifest = Manifest.read(self.folder)
        cache.require_same(manifest.identity, self.identity, self.folder)
        return True, bool(manifest.targets)

    def _opened(self, reused: bool) -> tuple[Manifest, StateDataset]:
        if self.far and ranks()[0]:
            self.far.fetch()  # what other machines have written
        found = cache.open_cache(self.folder, self.identity, spade=self.spade)
        if self.far and not ranks()[0] and not reused:
            self.far.publish()
            log.info("%s: complete in %s", self.split, self.far.url)
        return found

    def _build(self) -> None:
        encoded, adapter, world = self.encode(), self.adapter(), ranks()[1]
        what = self.extraction(encoded.examples)
        size = cache.estimate(adapter, encoded.examples, what, self.config.shard_mb)
        log.info(
            "%s: caching %s rows x %s = %s in %s", self.split, f"{size.rows:,}",
            byte_size(size.row_bytes), byte_size(size.bytes), self.folder,
        )  # fmt: skip
        if size.shards < world:
            log.warning(
                "%s: %d shards for %d processes; a smaller --data.shard_mb keeps all of them busy",
                self.split, size.shards, world,
            )  # fmt: skip
        cache.build(
            self._job(what, "caching"),
            encoded,
            tokens_per_batch=self.config.tokens_per_batch,
            shard_mb=self.config.shard_mb,
            provenance={
                "model_id": self.config.model_id,
                "dataset": self.config.dataset,
                "compiled": self.config.compile,
                "run once": sharing_told(adapter, *beginnings(encoded.examples)),
                "lspade_train": version("lspade-train"),
                "torch": torch.__version__,
                "transformers": version("transformers"),
            },
        )

    def _job(self, what: Extraction, name: str) -> cache.Build:
        return cache.Build(
            self.folder, self.adapter(), what, self.identity,
            store=self.far or LocalStore(), overwrite=self.overwrite,
            name=f"{self.split}: {name}", say=log.info,
        )  # fmt: skip
