"""The typed recipe every command reads. Independent of torch, Lightning and parsing."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lspade_train.errors import ArtifactError, RecipeError

Mode = Literal["disk", "memory", "online"]
TargetKind = Literal["hidden", "logits", "topk"]
PositionIds = Literal["original", "compact"]
Quantization = Literal["int8", "int4"]
Form = Literal["full", "low_rank", "bias"]
HeadTarget = Literal["spade", "final", "both"]
LossScope = Literal["vocabulary", "choices"]

NO_END = (
    "trainer.max_epochs and max_steps are off, and the learning-rate schedule needs an end. "
    "Set one of them."
)


@dataclass(kw_only=True)
class PromptConfig:
    """How a data row becomes the text that the model reads.

    Args:
        template: Python format string over the task's fields, such as `{question}` and `{choices}`;
            null uses the task's own (see `lspade_train/tasks/`).
        labels: answer strings in the order of the choices, such as `[A, B, C, D]`; null uses the
            task's own. Labels of several tokens are decided at the first in which they differ.
        shots: solved examples put in front of every prompt, drawn from the training split.
        chat: wrap the prompt in a chat template, for instruction-tuned models.
        chat_template: Jinja chat template, only with `chat`; null uses the tokenizer's own. For
            models whose tokenizers have none, such as Vicuna.
        system: system message, only with `chat`.
        answer_prefix: text between the prompt and its answer; null tries a space, then nothing
            (nothing first where the prompt ends in white space), and uses the first that makes
            every label one token, else the first after which all labels differ in one token.
    """

    template: str | None = None
    labels: list[str] | None = None
    shots: int = 0
    chat: bool = False
    chat_template: str | None = None
    system: str | None = None
    answer_prefix: str | None = None

    def __post_init__(self) -> None:
        """Refuse labels that cannot be told apart."""
        labels = self.labels
        if labels is not None and (len({*labels} - {""}) < len(labels) or len(labels) < 2):
            raise RecipeError(
                f"data.prompt.labels is {labels}; expected two or more texts, each once and none "
                "empty.\nLeave it out for the task's own labels."
            )
        if self.shots < 0:
            raise RecipeError(f"data.prompt.shots is {self.shots}; expected 0 or more.")


@dataclass(kw_only=True)
class TextConfig:
    """Where the `text` task takes its positions from.

    Args:
        column: column (JSONL key) that holds the text.
        length: tokens per sequence, including BOS; longer texts are cut into consecutive pieces.
        first_position: earliest position used, 0-based, including BOS.
        positions_per_sequence: positions sampled per sequence; null uses all of them.
    """

    column: str = "text"
    length: int = 160
    first_position: int = 8
    positions_per_sequence: int | None = 16


@dataclass(kw_only=True)
class DataConfig:
    """The frozen model, the task, and what is cached.

    Args:
        model_id: Hub id or folder of a decoder-only causal language model.
        gguf_file: name of a GGUF file in that folder or repository: model and tokenizer are read
            from it, the weights dequantised to `dtype` (auto: float32 if they are quantised).
        revision: the model's commit; null resolves the Hub's current one once and records it.
        task: arc_easy, arc_challenge, boolq, headqa, jsonl or text.
        dataset: Hub id, a folder laid out like one, or a JSONL or CSV file (or folder of
            `train.jsonl`, `validation.jsonl`, `test.jsonl`); null uses the task's Hub id.
        dataset_revision: the data set's commit on the Hub; null resolves the current one.
        subset: the data set's configuration, such as `es` for headqa; null uses the task's own.
        columns: the data's own names for the task's columns, such as
            `{question: text, answer: label, group: topic}`; null if they are the task's names.
        validation_fraction: fraction of the training rows held out for validation if the data has
            no such split (tasks jsonl and text). A hash of each row's text decides its split, so
            that adding rows does not move others.
        test_fraction: the same for the test split, if the data has neither.
        prompt: template, labels, shots and chat format.
        text: settings of the `text` task.
        limit: rows used per split; null uses all.
        overlong: what to do with a prompt longer than the model's context: error, or skip the row.
        cache_dir: folder of the cache, or a URL such as s3://bucket/path, which is read and written
            through a local mirror; null derives a folder from the recipe in the user's cache.
        positions: position ids of SPADE's two tokens: the prompt's own, or 0 and 1.
        targets: how SPADE's answer is stored: hidden state (exact, small), logits or top-k.
        topk: tokens kept with `targets: topk`.
        mode: disk (cache once), memory (cache in RAM) or online (recompute every epoch).
        batch_size: rows per training step.
        tokens_per_batch: prompt tokens per extraction batch.
        shard_mb: size of one cache shard in MB.
        dtype: precision the frozen model runs and is cached in; auto uses the checkpoint's.
        device: where the frozen model runs; auto uses a GPU if there is one.
        device_map: accelerate's map for models too large for one device, such as `auto`.
        quantization: int8 (LLM.int8) or int4 (NF4) quantises the blocks while loading, with
            bitsandbytes; null loads the checkpoint as it is, quantised or not.
        compile: run the frozen blocks through `torch.compile`, in every command that builds or
            reads states. Takes up to minutes at the start (less if torch's own cache is warm), so
            it is meant for long runs; the last bits of the states may change. Needs a C++ compiler
            on a CPU, Triton on a GPU.
        trust_remote_code: run code from the model's repository. Leave off unless you have read it.
    """

    model_id: str
    task: str
    gguf_file: str | None = None
    revision: str | None = None
    dataset: str | None = None
    dataset_revision: str | None = None
    subset: str | None = None
    columns: dict[str, str] | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    prompt: PromptConfig = field(default_factory=PromptConfig)
    text: TextConfig = field(default_factory=TextConfig)
    limit: int | None = None
    overlong: Literal["error", "skip"] = "error"
    cache_dir: str | None = None
    positions: PositionIds = "original"
    targets: TargetKind = "hidden"
    topk: int = 64
    mode: Mode = "disk"
    batch_size: int = 64
    tokens_per_batch: int = 8192
    shard_mb: float = 256
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    device_map: str | None = None
    quantization: Quantization | None = None
    compile: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that no run can have."""
        for name in ("topk", "batch_size", "tokens_per_batch"):
            _require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "1 or more")
        _require(self.shard_mb > 0, "data.shard_mb", self.shard_mb, "more than 0")
        fractions = (self.validation_fraction, self.test_fraction)
        for name, value in zip(("validation_fraction", "test_fraction"), fractions, strict=True):
            _require(0 <= value < 1, f"data.{name}", value, "0 up to, but not including, 1")
        _require(
            sum(fractions) < 1, "data.validation_fraction + data.test_fraction", sum(fractions),
            "less than 1, so that rows are left for training",
        )  # fmt: skip
        self.model_id = _from_home("data.model_id", self.model_id)
        self.dataset = _from_home("data.dataset", self.dataset)
        self.cache_dir = _from_home("data.cache_dir", self.cache_dir)


@dataclass(kw_only=True)
class HeadConfig:
    """The heads and how they are trained. Every value is our default, not the paper's.

    Args:
        layers: `all` (1..L-1) or a list of layers, 0..L-1.
        form: full (d x d per layer), low_rank, or bias.
        rank: rank of `form: low_rank`.
        layer_groups: fit the layers in this many groups, one after another. Gives the same heads
            with the memory of one group; the cached rows are read once per group.
        target: distil SPADE's distribution (`spade`), the model's own (`final`, a tuned lens), or
            `both` in one fit: each as if trained alone, the tuned lens in `tuned_lens/`.
        scope: tokens the loss is over: the whole `vocabulary`, or the `choices` of each row. The
            latter is many times faster, for heads that only choose among given answers.
        validation_rows: with `scope: vocabulary`, validation rows read after each epoch, evenly
            spaced; null reads all. One costs about half as much as a training row. With
            `scope: choices` all are read.
        lr: peak learning rate of AdamW.
        weight_decay: decay of the residual maps to zero, that is, of the heads to the identity.
        warmup: fraction of all steps with a rising learning rate, before a cosine decay to zero.
    """

    layers: Literal["all"] | list[int] = "all"
    form: Form = "full"
    rank: int = 64
    layer_groups: int = 1
    target: HeadTarget = "spade"
    scope: LossScope = "vocabulary"
    validation_rows: int | None = 64
    lr: float = 1.0e-3
    weight_decay: float = 1.0e-2
    warmup: float = 0.05

    def __post_init__(self) -> None:
        """Refuse numbers that no run can have."""
        _require(self.rank >= 1, "model.rank", self.rank, "1 or more")
        _require(self.layer_groups >= 1, "model.layer_groups", self.layer_groups, "1 or more")
        rows = self.validation_rows
        if rows is not None:
            _require(rows >= 1, "model.validation_rows", rows, "1 or more, or null")
        _require(self.lr > 0, "model.lr", self.lr, "more than 0")
        _require(self.weight_decay >= 0, "model.weight_decay", self.weight_decay, "0 or more")
        _require(0 <= self.warmup <= 1, "model.warmup", self.warmup, "0 to 1")

    @property
    def targets(self) -> tuple[Literal["spade", "final"], ...]:
        """Targets to distil, one set of heads each; the first set makes the heads folder."""
        return ("spade", "final") if self.target == "both" else (self.target,)


@dataclass(kw_only=True)
class Recipe:
    """One YAML file: everything a command needs.

    Args:
        name: heads are written to `checkpoints/<name>/`.
        seed_everything: seed of the shuffling and of all other random numbers.
        data: the frozen model, the task and the cache.
        model: the heads.
        trainer: Lightning's Trainer arguments.
    """

    name: str
    data: DataConfig
    seed_everything: int = 0
    model: HeadConfig = field(default_factory=HeadConfig)
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse numbers that no run can have."""
        seed = self.seed_everything
        _require(0 <= seed < 2**32, "seed_everything", seed, "0 to 4294967295")
        model = self.model
        if model.scope == "choices" and "spade" in model.targets and self.data.targets == "topk":
            raise RecipeError(
                "model.scope is choices, and data.targets is topk, which may lack the choices; "
                "expected hidden or logits.\nSet --data.targets hidden or --model.scope vocabulary."
            )
        trainer = self.trainer
        epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps", -1)
        if steps == -1 and (epochs == -1 or (epochs is None and trainer.get("max_time"))):
            raise RecipeError(NO_END)
        for key, value in _numbers("", asdict(self)):
            _require(math.isfinite(value), key, value, "a finite number")


def _numbers(place: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every floating-point number of a recipe, with its dotted key."""
    if isinstance(value, float):
        yield place, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(f"{place}.{key}" if place else str(key), inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(place, inner)


def _from_home(key: str, path: Any) -> Any:
    """A path with the home directory in place of `~`."""
    if path is None or not path.startswith("~"):
        return path
    found = os.path.expanduser(path)  # noqa: PTH111 (Path's raises where there is no home)
    if found.startswith("~"):
        raise RecipeError(f"{key} is {path}, and no such home directory is known. Set --{key}.")
    return found


def _require(right: bool, key: str, value: float, expected: str) -> None:
    if not right:
        raise RecipeError(f"{key} is {value}; expected {expected}. Set --{key}.")


def check_layers(layers: Sequence[int], num_layers: int, *, last: int | None = None) -> list[int]:
    """The requested layers as a list.

    Args:
        layers: layers, 0 (embedding output) to `last`.
        num_layers: L.
        last: highest layer allowed; None allows L.

    Raises:
        RecipeError: a layer out of range, or none at all.
    """
    top = num_layers if last is None else last
    wrong = [layer for layer in layers if not 0 <= layer <= top]
    if wrong or not layers:
        raise RecipeError(
            f"Layer {wrong[0] if wrong else '(none)'} is out of range: this model has "
            f"{num_layers} blocks, so layers go from 0 to {top}. Set model.layers."
        )
    return list(layers)


def heads_folder(recipe: Recipe, root: Path | None = None) -> Path:
    """Where a recipe's heads are written: `checkpoints/<name>/` in the working directory.

    Raises:
        ArtifactError: the name is not a plain folder name.
    """
    name = recipe.name
    if not name or Path(name).name != name or name.startswith("."):
        raise ArtifactError(
            f"name is {name!r}; expected a plain folder name such as arc. Set name in the recipe."
        )
    return (root or Path("checkpoints")) / name
