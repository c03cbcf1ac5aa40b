"""One epoch of a tuned lens, beside the `tuned-lens` package where it is installed.

Theirs is that package's lens in its own loop: forward, each layer's logits, KL, backward. Ours
extracts the same positions and trains one epoch on them, with `model.target: final`.
"""

import logging
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_cache import build
from bench_shape import DEVICE, GPU, ROUNDS, TOKENS_PER_BATCH
from bench_subject import Subject, random_subject, real_subject
from bench_timing import Part, Row, interleaved, peak_memory, seconds, versus

from lspade_train import cache
from lspade_train.evaluation.refit import fit_heads
from lspade_train.recipe import DataConfig, HeadConfig, Recipe
from lspade_train.tasks import Example

TEXTS, TOKENS = (64, 256) if GPU else (6, 128)


class Setting:
    """The two ways to train a tuned lens, over the same positions.

    Args:
        folder: of a real model; empty for the random one.
    """

    def __init__(self, folder: str = "") -> None:
        from tuned_lens import TunedLens

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        self.subject: Subject = real_subject(Path(folder)) if folder else random_subject()
        self.ids = self.subject.tokens(TEXTS, TOKENS).to(DEVICE)
        self.lens: Any = TunedLens.from_model(self.subject.plain).to(DEVICE)
        self.lens.unembed.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(p for p in self.lens.parameters() if p.requires_grad)

    def theirs(self) -> None:
        """One pass over the texts, one step per text."""
        for text in self.ids[:, None]:
            with torch.no_grad():
                found: Any = self.subject.plain(text, output_hidden_states=True, use_cache=False)
            labels = found.logits.float().log_softmax(-1)
            for layer, hidden in enumerate(found.hidden_states[:-1]):
                logits = self.lens(hidden.to(self.lens[0].weight.dtype), idx=layer).float()
                (labels.exp() * (labels - logits.log_softmax(-1))).sum(-1).mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=False)

    def ours(self) -> None:
        """An extraction to disk, and an epoch with the same number of steps."""
        adapter, places = self.subject.adapter, np.arange(TOKENS)
        examples = [
            Example(np.array(row, dtype=np.int32), places, np.array(row), (), i)
            for i, row in enumerate(self.ids.tolist())
        ]
        data = DataConfig(model_id="bench", task="text", batch_size=TOKENS)
        recipe = Recipe(name="bench", data=data, trainer={"accelerator": "gpu" if GPU else "cpu"})
        with tempfile.TemporaryDirectory() as name:
            build(Path(name), adapter, examples, 1000, TOKENS_PER_BATCH, spade=False)
            layers = {"layers": list(range(1, adapter.num_layers))}
            rows = cache.open_cache(Path(name), layers, spade=False)[1]
            fit_heads(recipe, HeadConfig(target="final"), rows, adapter, TEXTS)


def lens(folder: str = "", rounds: int = ROUNDS) -> list[Row]:
    """Time and peak memory of an epoch."""
    setting = Setting(folder)
    cases: dict[str, Callable[[], None]] = {"ours": setting.ours, "theirs": setting.theirs}
    taken = interleaved(cases, rounds)
    ours, theirs = (
        peak_memory("bench_lens", f"Setting({folder!r})", f"it.{way}()") for way in cases
    )
    where = f"{TEXTS} x {TOKENS} positions, {setting.subject.name}"
    times = f"{seconds(taken, 'ours'):.1f} s / {seconds(taken, 'theirs'):.1f} s"
    return [
        (
            "tuned lens: extraction and an epoch / tuned-lens, time",
            versus(taken, "ours", "theirs"),
            f"at most 0.50 in fp32, 0.25 in bf16; {times}, {where}",
        ),
        (
            "tuned lens: the same, peak memory",
            f"{ours / theirs:.2f}",
            f"under 1.00; {ours:,.0f} MB / {theirs:,.0f} MB above the two models",
        ),
    ]


def parts(folder: Path | None) -> dict[str, Part]:
    """The benchmark, if the package is installed."""
    if find_spec("tuned_lens") is None:
        return {}
    return {"lens": Part(partial(lens, str(folder or "")), 120)}
