"""A complete project in a folder: a tiny saved model with its tokenizer, and JSONL data."""

import json
import random
from pathlib import Path

import torch
from tiny_models import VOCAB, tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lspade_train.recipe import DataConfig
from lspade_train.training.datamodule import HiddenStateDataModule

WORDS = [f"w{i}" for i in range(VOCAB - 8)]
POISON = WORDS[-1]
"""The word whose embedding `poisoned` models make NaN; the load-time probe does not use it."""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; `<s>` is prepended."""
    vocabulary = ["<unk>", "<s>", "</s>", "A", "B", "C", "?", ":", *WORDS]
    assert len(vocabulary) == VOCAB
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_model(folder: Path, family="llama", *, seed=0, poisoned=False, dtype=None) -> Path:
    """Save a random model of `family` (4 blocks, d=32, V=64) to a folder."""
    model = tiny(family)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if seed:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
        if poisoned:
            model.get_input_embeddings().weight[VOCAB - 1] = float("nan")
    model.to(dtype or torch.float32).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def questions(count: int, *, seed=0, longest=24) -> list[dict]:
    """Prompts of mixed lengths with two or three one-token choices."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = draw.choices(WORDS[:-1], k=draw.randint(2, longest))
        choices = ["A", "B", "C"][: draw.choice([2, 3])]
        prompt = " ".join([*words, "?", ":"])
        rows.append({"prompt": prompt, "choices": choices, "answer": draw.choice(choices)})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_data(folder: Path, *, train=48, validation=20, test=12) -> Path:
    """Write three splits of questions."""
    for seed, (split, count) in enumerate(
        {"train": train, "validation": validation, "test": test}.items()
    ):
        write_jsonl(folder / f"{split}.jsonl", questions(count, seed=seed))
    return folder


def write_texts(folder: Path) -> Path:
    """Write running text of mixed lengths for the `text` task."""
    draw = random.Random(5)
    for split, count in (("train", 12), ("validation", 6)):
        rows = [
            {"text": " ".join(draw.choices(WORDS[:-1], k=draw.randint(6, 40)))}
            for _ in range(count)
        ]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


class Project:
    """A model, its data and an empty folder for caches and heads.

    Args:
        root: holds `model`, `data` and `texts`, which are read-only.
        home: a per-test folder.
    """

    def __init__(self, root: Path, home: Path) -> None:
        self.model, self.data, self.texts = root / "model", root / "data", root / "texts"
        self.home = home
        self.cache = home / "cache"

    def config(self, **settings) -> DataConfig:
        """The data section of a recipe over the JSONL questions."""
        known = {
            "model_id": str(self.model),
            "task": "jsonl",
            "dataset": str(self.data),
            "cache_dir": str(self.cache),
            "batch_size": 8,
            "device": "cpu",
        }
        return DataConfig(**known | settings)

    def module(self, layers="all", *, overwrite=False, seed=0, **settings) -> HiddenStateDataModule:
        """A data module of that section."""
        return HiddenStateDataModule(
            self.config(**settings), layers, seed=seed, name="toy", overwrite=overwrite
        )

    def recipe(self, **changes) -> Path:
        """Write a recipe file; `changes` are dotted keys with `__` for the dot."""
        values = {
            "name": "toy",
            "data.model_id": str(self.model),
            "data.task": "jsonl",
            "data.dataset": str(self.data),
            "data.cache_dir": str(self.cache),
            "data.batch_size": 16,
            "trainer.max_epochs": 2,
            "trainer.accelerator": "cpu",
            "trainer.enable_progress_bar": False,
        } | {key.replace("__", "."): value for key, value in changes.items()}
        nested: dict = {}
        for key, value in values.items():
            *parents, last = key.split(".")
            place = nested
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
        path = self.home / "recipe.yaml"
        path.write_text(json.dumps(nested), encoding="utf-8")  # JSON is valid YAML
        return path
