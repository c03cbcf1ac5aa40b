"""The frozen model of a recipe, read no further than it is needed.

Its facts, such as digests and sizes, need no weights once a load has found them; a fit on finished
caches needs its final norm and head; only running blocks needs all of it. Knows nothing of caches.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from lspade_train.errors import LSpadeError, UnsupportedModelError
from lspade_train.io.storage import (
    default_cache_root,
    file_digest,
    json_digest,
    read_json,
    write_json,
)
from lspade_train.io.text import byte_size
from lspade_train.models import ModelAdapter, Unembedding, load_unembedding, model_folder
from lspade_train.models.gguf import find_gguf
from lspade_train.models.open import open_adapter, open_tokenizer, resolved_revision
from lspade_train.models.tokenizer import tokenizer_digest
from lspade_train.recipe import DataConfig

RECORD_FORMAT = 2

DECIDING = ("config.json", "adapter_config.json", "*.index.json", "*.safetensors", "*.bin")
"""Files of a model's folder that decide its facts."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFacts:
    """What a data module asks of a model without running it; `ModelAdapter` says what each is."""

    identity: dict[str, str]
    num_layers: int
    hidden_size: int
    max_length: int | None
    revision: str | None

    @classmethod
    def of(cls, adapter: ModelAdapter) -> Self:
        """The facts of a model that is loaded."""
        return cls(**{field.name: getattr(adapter, field.name) for field in fields(cls)})


class FrozenModel:
    """The frozen model of a recipe's data section.

    Args:
        config: names the model and how it is loaded.
        device: where it goes, asked when something is loaded.
    """

    def __init__(self, config: DataConfig, device: Callable[[], str]) -> None:
        self.config = config
        self._device = device
        self._facts: ModelFacts | None = None
        self._adapter: ModelAdapter | None = None

    @property
    def facts(self) -> ModelFacts:
        """Kept from an earlier load of the same files, or those of the model itself.

        Raises:
            UnsupportedModelError: no model can be loaded, or it cannot be run block by block.
        """
        if self._facts is None:
            self._facts = _recall(self._record())
        return self._facts or self._facts_of(self.adapter)

    @property
    def adapter(self) -> ModelAdapter:
        """All of it; the load-time check waits for the first block.

        Raises:
            UnsupportedModelError: as `facts`, its head is not linear, or its files changed since
                they were looked at.
        """
        if self._adapter is None:
            self._adapter = self._load()
        return self._adapter

    @cached_property
    def unembed(self) -> Unembedding:
        """Final norm and head, bit for bit those of the whole model.

        Read alone where the facts are kept and the family can be made without blocks.
        """
        facts = self.facts
        alone = self._unembedding_alone(facts) if self._adapter is None else None
        return alone or self.adapter.unembed

    def release_blocks(self) -> None:
        """Drop the blocks where norm and head can be had without them; later uses load them again.

        A fit needs no block once its caches are built.
        """
        alone = self._unembedding_alone(self.facts) if self._adapter is not None else None
        if alone is not None:
            self.__dict__["unembed"] = alone
            self._adapter = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the weights.

        Raises:
            UnsupportedModelError: there is none.
        """
        return open_tokenizer(self.config, self._revision)

    @cached_property
    def description(self) -> dict[str, Any]:
        """What an artifact records of the model."""
        return {
            "model_id": self.config.model_id,
            "revision": self.facts.revision,
            **self.facts.identity,
            "tokenizer": tokenizer_digest(self.tokenizer),
        }

    @cached_property
    def _revision(self) -> str | None:
        """On the Hub a commit, resolved once: all that is read is of one commit."""
        return resolved_revision(self.config)

    def _load(self) -> ModelAdapter:
        config = self.config
        before = self._record()
        adapter = open_adapter(
            config, self._revision, device=self._device(), check=False, compile=config.compile
        )
        adapter.unembed.require_linear()  # now, and not once hours of caching are done
        facts = self._facts_of(adapter)
        record = self._record()
        # A commit's files come with the load and stay what they are; a folder's may change.
        if record is not None and (record == before or adapter.revision):
            _keep(record, facts)
        if self._facts not in (None, facts):
            raise UnsupportedModelError(
                f"The files of {config.model_id} changed while this run was reading them.\n"
                "Run the same command again."
            )
        self._facts = facts
        return adapter

    def _facts_of(self, adapter: ModelAdapter) -> ModelFacts:
        """The facts of a model that is loaded, and of the GGUF file it was unpacked from."""
        facts = ModelFacts.of(adapter)
        return replace(facts, identity=facts.identity | self._gguf_source)

    @cached_property
    def _gguf_source(self) -> dict[str, str]:
        name = self.config.gguf_file
        if name is None:
            return {}
        path = find_gguf(self.config.model_id, name, self._revision)
        return {"gguf_file": name, "gguf_sha256": file_digest(path, UnsupportedModelError)}

    def _record(self) -> Path | None:
        """Where the facts are kept, by all that decides them; None where that is not only files.

        Times are only compared for equality: a touched file costs a load and nothing else.
        """
        config = self.config
        if config.trust_remote_code or config.quantization is not None:
            return None  # code from elsewhere, or scales that depend on library and device
        files = _deciding_files(config.model_id, self._revision, config.gguf_file)
        if files is None:
            return None
        versions = {name: version(name) for name in ("lspade-train", "transformers")}
        key = {"format": RECORD_FORMAT, **versions, "dtype": config.dtype, "files": files}
        return default_cache_root() / "models" / f"{json_digest(key)[:32]}.json"

    def _unembedding_alone(self, facts: ModelFacts) -> Unembedding | None:
        """Norm and head without the blocks; None where only a whole load can be trusted."""
        if self.config.gguf_file is not None:
            return None
        folder = model_folder(self.config.model_id, self._revision)
        try:
            found = load_unembedding(
                str(folder), dtype=facts.identity["dtype"], device=self._device()
            )
        except Exception as cause:  # whatever a family's code says to having no blocks
            log.debug("norm and head cannot be loaded alone: %r", cause)
            return None
        if found.digest != facts.identity["unembedding"]:
            log.debug("norm and head loaded alone are not those of the whole model")
            return None
        log.info("model: only final norm and LM head loaded (%s)", byte_size(found.bytes))
        return found


def _deciding_files(
    model_id: str, revision: str | None, gguf_file: str | None
) -> list[list[Any]] | None:
    """Name, size and times of each; None where they cannot be told. A commit is in their names."""
    folder = model_folder(model_id, revision, gguf_file=gguf_file)
    if folder is None:
        return None
    folder = folder.resolve()
    found = (
        (path for pattern in DECIDING for path in folder.glob(pattern))
        if gguf_file is None
        else [folder / gguf_file]
    )
    names = sorted(map(str, found))
    try:
        stats = [Path(name).stat() for name in names]
    except OSError:
        return None
    return [[n, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for n, s in zip(names, stats, strict=True)]


def _recall(record: Path | None) -> ModelFacts | None:
    """The facts kept in a file; None where there are none, or it is not as it was written."""
    try:
        found = read_json(record, LSpadeError) if record else {}
        whole = found["sha256"] == json_digest(found["facts"])
        return ModelFacts(**found["facts"]) if whole else None
    except (LSpadeError, KeyError, TypeError, ValueError, RecursionError):
        return None


def _keep(record: Path, facts: ModelFacts) -> None:
    if facts.identity["quantization"] != "none" or _recall(record) == facts:
        return
    known = asdict(facts)
    try:
        write_json(record, {"facts": known, "sha256": json_digest(known)}, LSpadeError)
    except LSpadeError as cause:  # it only saves time
        log.debug("the model's facts are not kept: %s", cause)
