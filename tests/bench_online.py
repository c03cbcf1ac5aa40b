"""One epoch of `data.mode: online` against the model's forward and a cached epoch."""

import logging
import tempfile
from pathlib import Path

import numpy as np
import torch
from bench_cache import build
from bench_shape import (
    DEVICE,
    GPU,
    LAYERS,
    ROUNDS,
    TOKENS_PER_BATCH,
    VOCAB,
    WIDTH,
    llama,
    prompts,
    untouched_llama,
)
from bench_timing import Part, Row, interleaved, peak_memory, seconds, versus

from lspade_train import cache
from lspade_train.cache import Extraction, Manifest, OnlineDataset
from lspade_train.evaluation.refit import fit_heads
from lspade_train.recipe import DataConfig, HeadConfig, Recipe

PROMPTS, TOKENS, BATCH = (512, 256, 64) if GPU else (32, 128, 16)


class Setting:
    """A random Llama, prompts, their cache, and a full one-epoch fit in either mode.

    Args:
        folder: where the cache goes.
    """

    def __init__(self, folder: Path) -> None:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        self.adapter, self.plain = llama(), untouched_llama()
        examples = prompts(PROMPTS, TOKENS)
        layers = tuple(range(1, LAYERS))
        what = Extraction(layers, "original", "hidden", 64, 4, ("",))
        self.online = OnlineDataset(
            self.adapter, examples, what, tokens=TOKENS_PER_BATCH, per_shard=PROMPTS
        )
        build(folder, self.adapter, examples, 256, TOKENS_PER_BATCH)
        self.cached = cache.open_cache(folder, {"layers": list(layers)})[1]
        self.ids = torch.from_numpy(np.stack([it.input_ids for it in examples])).long().to(DEVICE)
        data = DataConfig(model_id="random Llama", task="text", batch_size=BATCH)
        trainer = {"accelerator": "gpu" if GPU else "cpu"}
        self.recipe = Recipe(name="bench", data=data, trainer=trainer)

    @torch.no_grad()
    def forward(self) -> None:
        """An untouched model's forward on the same batches; unembeds the last position only."""
        for ids in self.ids.split(BATCH):
            mask = torch.ones_like(ids)
            self.plain(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)

    def online_epoch(self) -> None:
        """States and targets computed batch by batch, with a step on each."""
        fit_heads(self.recipe, HeadConfig(), self.online, self.adapter, PROMPTS // BATCH)

    def cached_epoch(self) -> None:
        """The same steps on states read from the cache."""
        fit_heads(self.recipe, HeadConfig(), self.cached, self.adapter, PROMPTS // BATCH)


def peak_of(epoch: str) -> float:
    """MB that one epoch adds to the loaded model, measured in a subprocess."""
    with tempfile.TemporaryDirectory() as folder:
        return peak_memory("bench_online", f"Setting(Path({folder!r}))", f"it.{epoch}()")


def online(rounds: int = ROUNDS) -> list[Row]:
    """Time, memory and disk space of an online epoch."""
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder))
        stored = Manifest.read(Path(folder)).bytes
        ways = (setting.online_epoch, setting.cached_epoch, setting.forward)
        taken = interleaved({way.__name__: way for way in ways}, rounds)
    epoch, read, forward = (seconds(taken, way.__name__) for way in ways)
    peaks = [peak_of(way.__name__) for way in ways[:2]]
    where = f"{PROMPTS} prompts, T={TOKENS}, d={WIDTH}, L={LAYERS}, V={VOCAB:,}, batches of {BATCH}"
    return [
        (
            "online epoch of fit / plain forward",
            versus(taken, "online_epoch", "forward"),
            f"{epoch:.2f} s / {forward:.2f} s, {where}; states, targets and steps on all layers",
        ),
        (
            "online epoch of fit / epoch from the cache",
            versus(taken, "online_epoch", "cached_epoch"),
            f"{epoch:.2f} s / {read:.2f} s; the cache takes an extraction once",
        ),
        (
            "online epoch / epoch from the cache, peak memory",
            f"{peaks[0] / peaks[1]:.2f}",
            f"{peaks[0]:,.0f} MB / {peaks[1]:,.0f} MB above the model, mapped pages counted; "
            f"stored: 0 MB / {stored / 1e6:,.1f} MB",
        ),
    ]


PARTS = {"online": Part(online, 150)}
