"""`HiddenStateDataModule`: rows of hidden states and SPADE targets for Lightning.

Builds a missing cache, reuses a finished one, or computes rows on demand. Independent of heads.
"""

import logging
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from tempfile import gettempdir
from typing import Any, cast

import torch
from jaxtyping import Bool
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lspade_train import cache, tasks
from lspade_train.cache import Extraction, OnlineDataset, StateDataset, row_count
from lspade_train.cache.loader import RowLoader
from lspade_train.cache.manifest import FILES
from lspade_train.cache.unfinished import Unfinished
from lspade_train.errors import CacheError, TaskError
from lspade_train.io.parallel import together
from lspade_train.io.progress import Progress, track
from lspade_train.io.remote import Mirror, is_remote
from lspade_train.io.storage import default_cache_root, json_digest
from lspade_train.io.text import byte_size
from lspade_train.models import ModelAdapter, Unembedding
from lspade_train.models.frozen import FrozenModel
from lspade_train.recipe import DataConfig, check_layers
from lspade_train.tasks import Encoded, Example, Rows, Split
from lspade_train.tasks.held_out import held_out
from lspade_train.training.disk_cache import DiskCache
from lspade_train.training.reduction import reduce_dataset

CACHE_FORMAT = 2

EFFECTS = {
    *("rows", "rows_digest", "shots_digest", "rendered_prompts"),
    *("model_weights", "unembedding"),
}
"""Fields that change because another one does: a mismatch reports that one first."""

log = logging.getLogger(__name__)


class HiddenStateDataModule(LightningDataModule):
    """The frozen model's states on a task, split by split.

    Args:
        config: the recipe's data section.
        layers: `all` (1..L-1) or a list of layers, 0..L-1.
        seed: seed of the shuffling.
        name: names the default cache folder.
        overwrite: rebuild caches that exist.
        spade: also provide SPADE's targets; False if hidden states are enough, as for heads fitted
            to the model's own answer. A cache without targets gets them when they are needed.
        choices: require choices in every row, as for heads whose loss is over the choices.
    """

    def __init__(
        self,
        config: DataConfig,
        layers: str | list[int] = "all",
        *,
        seed: int = 0,
        name: str = "lspade",
        overwrite: bool = False,
        spade: bool = True,
        choices: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.asked_layers = layers
        self.seed = seed
        self.name = name
        self.overwrite = overwrite
        self.spade = spade
        self.choices = choices
        self.validation_rows: int | None = None  # that a fit reads; None means all
        self.frozen = FrozenModel(config, self._device)
        self._rows: dict[Split, Rows] = {}
        self._datasets: dict[Split, StateDataset | OnlineDataset] = {}
        self._stored: dict[tuple[Split, int | None], StateDataset] = {}  # of online data
        self._reduced: dict[Split, StateDataset] = {}
        self._prefixes: dict[Split, str] = {}
        self._held_out: dict[Split, Tensor] = {}
        self._identities: dict[Split, dict[str, Any]] = {}
        self._train: RowLoader | None = None
        self._stopped_at: dict[str, Any] = {}
        self.reused: dict[Split, bool] = {}

    # The frozen model ------------------------------------------------------------------------

    @property
    def adapter(self) -> ModelAdapter:
        """The frozen model with its blocks, loaded on first use."""
        return self.frozen.adapter

    @property
    def unembed(self) -> Unembedding:
        """The model's final norm and head; loaded alone if the caches hold all hidden states."""
        return self.frozen.unembed

    @property
    def hidden_size(self) -> int:
        """d, the width of the residual stream."""
        return self.frozen.facts.hidden_size

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
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
        """What an artifact records about the frozen model."""
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
            LSpadeError: the model, the data or the cache cannot be used.
        """
        if split not in self._datasets:
            self._datasets[split] = self._open(split)
        return self._datasets[split]

    def stored(self, split: Split, rows: int | None = None) -> StateDataset:
        """Rows of one split that can be read more than once; online data is computed once for it.

        Args:
            split: train, validation or test.
            rows: number of leading rows needed; None means all.
        """
        found = self.states(split)
        if isinstance(found, OnlineDataset):
            key = (split, None) if (split, None) in self._stored else (split, rows)
            if key not in self._stored:
                self._stored[key] = self._in_memory(split, found, rows)
            found = self._stored[key]
        return found if rows is None else found.first(rows)

    def held_out(self, split: Split) -> Bool[Tensor, " rows"]:
        """Rows of a split that no selection may use, by content (see `tasks/held_out.py`)."""
        if split not in self._held_out:
            side = held_out(self._load_rows(split).records)
            examples = self.encoded(split).examples
            rows = [side[example.row] for example in examples for _ in example.positions]
            self._held_out[split] = torch.tensor(rows)
        return self._held_out[split]

    def reduce_targets(self) -> None:
        """Reduce the stored SPADE targets of a fit's splits, which pays off over many epochs."""
        for split in ("train", "validation"):
            if isinstance(self.states(split), OnlineDataset):
                continue
            found = cast(StateDataset, self._to_fit(split))
            folder = self.folder(split) if self.config.mode == "disk" else Path(gettempdir())
            name = f"{split}: reducing targets"
            bar = partial(track, name=name, total=len(found.shards), unit="files")
            reduced = reduce_dataset(found, self.unembed, folder, bar)
            if reduced is not None:
                self._reduced[split] = reduced

    def _to_fit(self, split: Split) -> StateDataset | OnlineDataset:
        """The rows of a split that a fit reads."""
        if split in self._reduced:
            return self._reduced[split]
        found, most = self.states(split), self.validation_rows
        if split != "validation" or most is None:
            return found
        unit = "rows"
        if isinstance(found, OnlineDataset):  # of prompts, which may have several rows
            most, unit = max(most * len(found) // row_count(found.examples), 1), "prompts"
        if len(found) <= most:
            return found
        log.info("validation: %s of %s %s (model.validation_rows)", most, len(found), unit)
        spread = found.select(torch.arange(most) * len(found) // most)
        return spread if isinstance(spread, OnlineDataset) else spread.copied()

    def identity(self, split: Split) -> dict[str, Any]:
        """Everything that determines the bytes of a split's cache, as a flat dictionary.

        This includes targets that are not in the cache yet.
        """
        model = self.base_model
        decides = {k: v for k, v in model.items() if k != "model_id"}
        if model["revision"] is None:
            del decides["revision"]  # a folder is identified by its weights
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
        """Cached, because computing it renders every prompt."""
        if split not in self._identities:
            rows = self._load_rows(split)
            self._identities[split] = tasks.identity(self.config, rows, self.tokenizer)
        return self._identities[split]

    def folder(self, split: Split) -> Path:
        """Folder of a split's cache: in `data.cache_dir`, or in the user's cache."""
        far = self._remote_cache(split)
        if far is not None:
            return far.folder
        if self.config.cache_dir is not None:
            return Path(self.config.cache_dir) / split
        digest = json_digest(self.identity(split))
        return default_cache_root() / f"{self.name}-{digest[:12]}" / split

    def _remote_cache(self, split: Split) -> Mirror | None:
        """The split's remote cache, if `data.cache_dir` is a URL."""
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
        encoded = self.encoded(split)
        what = self.extraction(encoded.examples)
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
        log.info("%s: %s rows = %s in memory", split, f"{size.rows:,}", byte_size(size.bytes))
        starts = range(0, len(examples), size.prompts_per_shard)
        parts = (examples[first : first + size.prompts_per_shard] for first in starts)
        with Progress(f"{split}: states", size.rows) as progress:
            shards = [online.extract(part, Unfinished(progress=progress)) for part in parts]
        return StateDataset(shards, online.groups, online.layers)

    def answer_prefix(self, split: Split) -> str:
        """Text between the prompts and the answers of an opened split."""
        return self._prefixes[split]

    def _require_prefix(self, split: Split, prefix: str) -> None:
        """Refuse splits with different answer tokens: heads of one do not fit the other."""
        self._prefixes[split] = prefix
        for other, known in self._prefixes.items():
            if known != prefix:
                raise TaskError(
                    f"The answers follow {known!r} in the {other} split, but {prefix!r} in the "
                    f"{split} split; it must be the same text in both.\n"
                    "Set it with --data.prompt.answer_prefix, or use other labels "
                    "(--data.prompt.labels)."
                )

    def _open_disk(self, split: Split) -> StateDataset:
        def encode() -> Encoded:
            encoded = self.encoded(split)
            self._require_prefix(split, encoded.prefix)
            return encoded

        manifest, dataset, self.reused[split] = DiskCache(
            split, self.folder(split), self.identity(split), self._remote_cache(split), self.config,
            self.spade, self.overwrite, lambda: self.adapter, encode, self.extraction,
        ).open()  # fmt: skip
        self._require_prefix(split, manifest.answer_prefix)
        return dataset

    def encoded(self, split: Split) -> Encoded:
        """A split's prompts as tokens; not cached."""
        limit = self.frozen.facts.max_length or 2**31
        return tasks.encode(self.config, self._load_rows(split), self.tokenizer, limit)

    def extraction(self, examples: Sequence[Example]) -> Extraction:
        """The extraction of states for these examples."""
        return Extraction(
            layers=self.layers,
            positions=self.config.positions,
            targets=self.config.targets,
            topk=self.config.topk,
            max_choices=max((len(example.choice_ids) for example in examples), default=0),
            groups=tuple(sorted({example.group for example in examples})),
            spade=self.spade,
        )

    # Lightning's hooks -----------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Open the splits of a stage (fit, validate or test), and build what is missing.

        Not in `prepare_data`, which runs on one process per machine: a cache is built by all
        processes, and an error is reported by one.
        """
        together(lambda: self._setup(stage))

    def _setup(self, stage: str) -> None:
        last = tasks.evaluation_split(self.config) if stage == "test" else "validation"
        splits: tuple[Split, ...] = ("train", last) if stage == "fit" else (last,)
        for split in splits if self.choices else ():
            tasks.require_choices(self.config, self._load_rows(split))
        for split in splits:
            self.states(split)
        if stage == "fit":  # nothing of an earlier fit
            self._reduced, self._stopped_at = {}, {}
        if stage == "fit" and self.config.mode == "disk":
            self.frozen.release_blocks()

    def train_dataloader(self) -> RowLoader:
        """Shuffled rows, `batch_size` per process; a resumed run continues where it stopped."""
        self._train = loader = self._loader("train", shuffle=True)
        if self._stopped_at:
            together(lambda: loader.load_state_dict(self._stopped_at))
        return loader

    def val_dataloader(self) -> RowLoader:
        """Rows in order; in a fit, `validation_rows` of them."""
        return self._loader("validation", shuffle=False)

    def test_dataloader(self) -> RowLoader:
        """Rows of the test split in order, or of validation if test has no labels."""
        return self._loader(tasks.evaluation_split(self.config), shuffle=False)

    def state_dict(self) -> dict[str, Any]:
        """Position of the training loader."""
        return self._train.state_dict() if self._train else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember where training stopped, for the loader that is created later.

        Lightning does not restore a loader that was created before the checkpoint was read, and
        the learning-rate schedule, which needs the number of steps, creates it before.
        """
        self._stopped_at = state_dict

    def _loader(self, split: Split, *, shuffle: bool) -> RowLoader:
        trainer = self.trainer
        fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        return RowLoader(
            self._to_fit(split) if fitting else self.states(split),
            self.config.batch_size,
            seed=self.seed if shuffle else None,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
        )
