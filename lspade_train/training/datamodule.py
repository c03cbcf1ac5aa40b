"""`HiddenStateDataModule`: rows of hidden states and SPADE targets for Lightning.

Builds a missing cache, reuses a finished one, or computes rows as they are asked for. Knows
nothing of heads or losses.
"""

import logging
from functools import cached_property
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from lightning.pytorch import LightningDataModule
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lspade_train import cache, tasks
from lspade_train.cache import Extraction, Manifest, OnlineDataset, StateDataset
from lspade_train.cache.loader import RowLoader
from lspade_train.cache.manifest import FILES, MANIFEST
from lspade_train.errors import CacheError, TaskError
from lspade_train.io.parallel import first_alone, ranks, together
from lspade_train.io.progress import track
from lspade_train.io.remote import Mirror, is_remote
from lspade_train.io.storage import default_cache_root, json_digest
from lspade_train.models import ModelAdapter, Unembedding
from lspade_train.models.frozen import FrozenModel
from lspade_train.probes.spade import check_layers
from lspade_train.recipe import DataConfig
from lspade_train.tasks import Encoded, Example, Rows, Split
from lspade_train.tasks.held_out import held_out

CACHE_FORMAT = 1

EFFECTS = {
    *("rows", "rows_digest", "shots_digest", "rendered_prompts"),
    *("model_weights", "unembedding"),
}
"""Fields that differ because another one does: a mismatch names that one first."""

log = logging.getLogger(__name__)


class HiddenStateDataModule(LightningDataModule):
    """The frozen model's states on a task, split by split.

    Args:
        config: the recipe's data section.
        layers: `all` (1..L-1) or a list of layers, 0..L-1.
        seed: seed of the shuffling.
        name: names the default cache folder.
        overwrite: rebuild caches that exist.
    """

    def __init__(
        self,
        config: DataConfig,
        layers: str | list[int] = "all",
        *,
        seed: int = 0,
        name: str = "lspade",
        overwrite: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.asked_layers = layers
        self.seed = seed
        self.name = name
        self.overwrite = overwrite
        self.frozen = FrozenModel(config, self._device)
        self._rows: dict[Split, Rows] = {}
        self._datasets: dict[Split, StateDataset | OnlineDataset] = {}
        self._prefixes: dict[Split, str] = {}
        self._held_out: dict[Split, Tensor] = {}
        self._identities: dict[Split, dict[str, Any]] = {}
        self._train: RowLoader | None = None
        self._stopped_at: dict[str, int] = {}
        self.reused: dict[Split, bool] = {}

    # The frozen model ------------------------------------------------------------------------

    @property
    def adapter(self) -> ModelAdapter:
        """The frozen model with its blocks, loaded on first use."""
        return self.frozen.adapter

    @property
    def unembed(self) -> Unembedding:
        """Its final norm and head; loaded alone where the caches hold all that its blocks say."""
        return self.frozen.unembed

    @property
    def hidden_size(self) -> int:
        """d, the width of its residual stream."""
        return self.frozen.facts.hidden_size

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self.frozen.tokenizer

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Layers with a cached state, ascending.

        Raises:
            RecipeError: a layer out of range.
        """
        top = self.frozen.facts.num_layers - 1
        asked = range(1, top + 1) if self.asked_layers == "all" else self.asked_layers
        return tuple(sorted(set(check_layers(list(asked), top + 1, last=top))))  # type: ignore[arg-type]

    @property
    def base_model(self) -> dict[str, Any]:
        """What an artifact records of the frozen model."""
        return self.frozen.description

    def _device(self) -> str:
        trainer = self.trainer
        if self.config.device != "auto" or trainer is None:
            return self.config.device
        return str(trainer.strategy.root_device)

    # Splits ----------------------------------------------------------------------------------

    def states(self, split: Split) -> StateDataset | OnlineDataset:
        """Rows of one split; builds what is missing.

        Raises:
            LSpadeError: the model, the data or the cache cannot be used; says which and why.
        """
        if split not in self._datasets:
            self._datasets[split] = self._open(split)
        return self._datasets[split]

    def stored(self, split: Split, rows: int | None = None) -> StateDataset:
        """Rows of one split that can be read more than once; online data is computed for it.

        Args:
            split: train, validation or test.
            rows: leading rows that are enough; None: all.
        """
        found = self.states(split)
        if isinstance(found, OnlineDataset):
            found = self._in_memory(split, found, rows)
        return found if rows is None else found.first(rows)

    def held_out(self, split: Split) -> Bool[Tensor, " rows"]:
        """Which rows of a split no choice looks at, by their content (`tasks/held_out.py`)."""
        if split not in self._held_out:
            side = held_out(self._load_rows(split).records)
            examples = self._encode(split).examples
            rows = [side[example.row] for example in examples for _ in example.positions]
            self._held_out[split] = torch.tensor(rows)
        return self._held_out[split]

    def identity(self, split: Split) -> dict[str, Any]:
        """Everything that decides the bytes of a split's cache, flat and nameable."""
        model = self.base_model
        decides = {k: v for k, v in model.items() if k != "model_id"}
        if model["revision"] is None:
            del decides["revision"]  # a folder is its weights, not its path
        found = {
            "cache_format": CACHE_FORMAT,
            "dtype": decides.pop("dtype"),
            **decides,
            **self._task_identity(split),
            "layers": list(self.layers),
            "positions": self.config.positions,
            "targets": self.config.targets,
            "topk": self.config.topk if self.config.targets == "topk" else None,
        }
        return {k: v for k, v in found.items() if k not in EFFECTS} | {
            k: v for k, v in found.items() if k in EFFECTS
        }

    def _task_identity(self, split: Split) -> dict[str, Any]:
        """Kept: it renders every prompt."""
        if split not in self._identities:
            rows = self._load_rows(split)
            self._identities[split] = tasks.identity(self.config, rows, self.tokenizer)
        return self._identities[split]

    def folder(self, split: Split) -> Path:
        """Where a split's cache lies: `data.cache_dir`, or a folder of the user's own cache."""
        far = self._far(split)
        if far is not None:
            return far.folder
        if self.config.cache_dir is not None:
            return Path(self.config.cache_dir) / split
        digest = json_digest(self.identity(split))
        return default_cache_root() / f"{self.name}-{digest[:12]}" / split

    def _far(self, split: Split) -> Mirror | None:
        """Where the cache lies, if that is not on this machine."""
        place = self.config.cache_dir
        if place is None or not is_remote(place):
            return None
        return Mirror(f"{place.rstrip('/')}/{split}", FILES, CacheError)

    def _load_rows(self, split: Split) -> Rows:
        if split not in self._rows:
            self._rows[split] = tasks.load_rows(self.config, split)
        return self._rows[split]

    def _open(self, split: Split) -> StateDataset | OnlineDataset:
        if self.config.mode == "disk":
            return self._open_disk(split)
        encoded = self._encode(split)
        what = self._extraction(encoded.examples)
        self.adapter.check()
        self.reused[split] = False
        self._require_prefix(split, encoded.prefix)
        size = cache.estimate(self.adapter, encoded.examples, what, self.config.shard_mb)
        online = OnlineDataset(
            self.adapter,
            encoded.examples,
            what,
            tokens=self.config.tokens_per_batch,
            per_shard=size.prompts_per_shard,
        )
        return online if self.config.mode == "online" else self._in_memory(split, online)

    def _in_memory(
        self, split: Split, online: OnlineDataset, rows: int | None = None
    ) -> StateDataset:
        before = accumulate((len(e.positions) for e in online.examples), initial=0)
        pairs = zip(online.examples, before, strict=False)
        examples = [example for example, rank in pairs if rows is None or rank < rows]
        size = cache.estimate(self.adapter, examples, online.what, self.config.shard_mb)
        cache.require_memory(size)
        log.info("%s: %s rows = %.3g GB in memory", split, f"{size.rows:,}", size.bytes / 1e9)
        starts = range(0, len(examples), size.prompts_per_shard)
        parts = track(starts, f"{split}: states", len(starts))
        shards = [online.extract(examples[i : i + size.prompts_per_shard]) for i in parts]
        return StateDataset(shards, online.groups, online.layers)

    def answer_prefix(self, split: Split) -> str:
        """Text between the prompts and the answers of a split that is open."""
        return self._prefixes[split]

    def _require_prefix(self, split: Split, prefix: str) -> None:
        """Refuse splits whose answers are other tokens: heads of one would not fit the other."""
        self._prefixes[split] = prefix
        for other, known in self._prefixes.items():
            if known != prefix:
                raise TaskError(
                    f"Answers are single tokens behind {known!r} in the {other} split and behind "
                    f"{prefix!r} in the {split} split; one text must serve both.\n"
                    "Set it with --data.prompt.answer_prefix, or use other labels "
                    "(--data.prompt.labels)."
                )

    def _open_disk(self, split: Split) -> StateDataset:
        folder, identity, far = self.folder(split), self.identity(split), self._far(split)

        def finished() -> bool:
            if far and not self.overwrite:
                far.fetch()
            return (folder / MANIFEST).exists() and not self.overwrite

        def opened() -> tuple[Manifest, StateDataset]:
            if far and ranks()[0]:
                far.fetch()  # what other machines have written
            found = cache.open_cache(folder, identity)
            if far and not ranks()[0] and not self.reused[split]:
                far.publish()
                log.info("%s: complete in %s", split, far.url)
            return found

        # The first process decides for all: a cache may be finished between two looks.
        self.reused[split] = together(finished)[0]
        if not self.reused[split]:
            self._build(split, folder, identity)
        manifest, dataset = first_alone(opened)
        self._require_prefix(split, manifest.answer_prefix)
        if self.reused[split]:
            log.info(
                "%s: reusing %s (%s rows, no model forward)", split, folder, f"{manifest.rows:,}"
            )
        return dataset

    def _build(self, split: Split, folder: Path, identity: dict[str, Any]) -> None:
        encoded = self._encode(split)
        self._require_prefix(split, encoded.prefix)
        what = self._extraction(encoded.examples)
        size = cache.estimate(self.adapter, encoded.examples, what, self.config.shard_mb)
        log.info(
            "%s: caching %s rows x %d bytes = %.3g GB in %s",
            split, f"{size.rows:,}", size.row_bytes, size.bytes / 1e9, folder,
        )  # fmt: skip
        rank, world = ranks()
        if size.shards < world:
            log.warning(
                "%s: %d shards for %d processes; a smaller --data.shard_mb keeps all of them busy",
                split, size.shards, world,
            )  # fmt: skip
        cache.build(
            folder,
            self.adapter,
            encoded,
            what,
            identity,
            tokens_per_batch=self.config.tokens_per_batch,
            shard_mb=self.config.shard_mb,
            provenance={
                "model_id": self.config.model_id,
                "dataset": self.config.dataset,
                "compiled": self.config.compile,
                "lspade_train": version("lspade-train"),
                "torch": torch.__version__,
                "transformers": version("transformers"),
            },
            overwrite=self.overwrite,
            elsewhere=self._far(split),
            track=lambda mine: mine if rank else track(mine, f"{split}: caching", len(mine)),
            say=log.info,
        )

    def _encode(self, split: Split) -> Encoded:
        limit = self.frozen.facts.max_length or 2**31
        return tasks.encode(self.config, self._load_rows(split), self.tokenizer, limit)

    def _extraction(self, examples: list[Example]) -> Extraction:
        return Extraction(
            layers=self.layers,
            positions=self.config.positions,
            targets=self.config.targets,
            topk=self.config.topk,
            max_choices=max(len(example.choice_ids) for example in examples),
            groups=tuple(sorted({example.group for example in examples})),
        )

    # Lightning's hooks -----------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Open the splits of a stage: fit, validate or test; builds what is missing.

        Here and not in `prepare_data`, which runs on one process of each machine: a cache is built
        by all of them, and what is wrong is said by one.
        """
        together(lambda: self._setup(stage))

    def _setup(self, stage: str) -> None:
        if stage == "fit":
            self.states("train")
        self.states(tasks.evaluation_split(self.config) if stage == "test" else "validation")

    def train_dataloader(self) -> RowLoader:
        """Shuffled rows, `batch_size` per process; after a resume, from where it was stopped."""
        self._train = self._loader("train", shuffle=True)
        if self._stopped_at:
            self._train.load_state_dict(self._stopped_at)
        return self._train

    def val_dataloader(self) -> RowLoader:
        """Rows in order."""
        return self._loader("validation", shuffle=False)

    def test_dataloader(self) -> RowLoader:
        """Rows in order of the test split, or of validation where test has no labels."""
        return self._loader(tasks.evaluation_split(self.config), shuffle=False)

    def state_dict(self) -> dict[str, int]:
        """Where the training loader is."""
        return self._train.state_dict() if self._train else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Keep where training was stopped for the loader that is still to come.

        Lightning restores loaders by itself only where they were not made before the checkpoint
        was read; asking for the number of steps, as a schedule must, makes them.
        """
        self._stopped_at = state_dict

    def _loader(self, split: Split, *, shuffle: bool) -> RowLoader:
        trainer = self.trainer
        return RowLoader(
            self.states(split),
            self.config.batch_size,
            seed=self.seed if shuffle else None,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
        )
