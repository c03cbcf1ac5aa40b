"""The frozen model of a recipe, loaded only as far as needed. Independent of caches.

Facts such as digests and sizes are recorded at the first load and then need no weights; a fit on
finished caches needs only the final norm and head; only running blocks needs the whole model.
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

NAMES_MODEL = (
    *("model_id", "gguf_file", "revision", "dtype", "device", "device_map"),
    *("quantization", "compile", "trust_remote_code"),
)
"""Keys of the data section that decide which model is loaded, and how."""

DECIDING = ("config.json", "adapter_config.json", "*.index.json", "*.safetensors", "*.bin")
"""Files of a model's folder that determine its facts."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFacts:
    """Properties of a model that are used without running it; see `ModelAdapter`."""

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
        device: returns the device to load to; called when something is loaded.
    """

    def __init__(self, config: DataConfig, device: Callable[[], str]) -> None:
        self.config = config
        self._device = device
        self._facts: ModelFacts | None = None
        self._adapter: ModelAdapter | None = None

    def serves(self, config: DataConfig) -> bool:
        """Whether another data section asks for the very same model."""
        return all(getattr(config, key) == getattr(self.config, key) for key in NAMES_MODEL)

    @property
    def facts(self) -> ModelFacts:
        """The model's facts, from an earlier load of the same files or from loading it now.

        Raises:
            UnsupportedModelError: no model can be loaded, or it cannot be run block by block.
        """
        if self._facts is None:
            self._facts = _recall(self._record())
        return self._facts or self._facts_of(self.adapter)

    @property
    def adapter(self) -> ModelAdapter:
        """The whole model; the load-time check is deferred to the first block.

        Raises:
            UnsupportedModelError: as for `facts`, the head is not linear, or the files changed
                since `facts` was read.
        """
        if self._adapter is None:
            self._adapter = self._load()
        return self._adapter

    @cached_property
    def unembed(self) -> Unembedding:
        """Final norm and head, bit for bit those of the whole model.

        Loaded alone if the facts are recorded and the family can be built without blocks.
        """
        facts = self.facts
        alone = self._unembedding_alone(facts) if self._adapter is None else None
        return alone or self.adapter.unembed

    def release_blocks(self) -> None:
        """Free the blocks if norm and head can be loaded without them; later uses reload them.

        A fit needs no blocks once its caches are built.
        """
        alone = self._unembedding_alone(self.facts) if self._adapter is not None else None
        if alone is not None:
            self.__dict__["unembed"] = alone
            self._adapter = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            UnsupportedModelError: there is none.
        """
        return open_tokenizer(self.config, self._revision)

    @cached_property
    def description(self) -> dict[str, Any]:
        """What an artifact records about the model."""
        return {
            "model_id": self.config.model_id,
            "revision": self.facts.revision,
            **self.facts.identity,
            "tokenizer": tokenizer_digest(self.tokenizer),
        }

    @cached_property
    def _revision(self) -> str | None:
        """On the Hub, a commit that is resolved once, so that all files are of the same commit."""
        return resolved_revision(self.config)

    def _load(self) -> ModelAdapter:
        config = self.config
        before = self._record()
        adapter = open_adapter(
            config, self._revision, device=self._device(), check=False, compile=config.compile
        )
        adapter.unembed.require_linear()  # now, rather than after hours of caching
        facts = self._facts_of(adapter)
        record = self._record()
        # A commit's files come with the load and never change; a folder's files may change.
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
        """The facts of a loaded model, and of the GGUF file it was read from."""
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
        """File that records the facts; None if they depend on more than the model's files.

        Times are only compared for equality: a touched file merely causes a reload.
        """
        config = self.config
        if config.trust_remote_code or config.quantization is not None:
            return None  # remote code, or scales that depend on library and device
        files = _deciding_files(config.model_id, self._revision, config.gguf_file)
        if files is None:
            return None
        versions = {name: version(name) for name in ("lspade-train", "transformers")}
        key = {"format": RECORD_FORMAT, **versions, "dtype": config.dtype, "files": files}
        return default_cache_root() / "models" / f"{json_digest(key)[:32]}.json"

    def _unembedding_alone(self, facts: ModelFacts) -> Unembedding | None:
        """Norm and head without the blocks; None if the whole model has to be loaded."""
        if self.config.gguf_file is not None:
            return None
        folder = model_folder(self.config.model_id, self._revision)
        try:
            found = load_unembedding(
                str(folder), dtype=facts.identity["dtype"], device=self._device()
            )
        except Exception as cause:  # a family's code may raise anything without blocks
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
    """Name, size and times of each file; None if unknown. On the Hub, names include the commit."""
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
    """The facts recorded in a file; None if it is missing or damaged."""
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
    except LSpadeError as cause:  # the record only saves time
        log.debug("the model's facts are not kept: %s", cause)
