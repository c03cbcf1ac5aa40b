"""The models the runtime is timed on: the random one, or a real one loaded twice.

The baseline is never the adapter's own model, which may be slower because of its hooks.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from bench_shape import DEVICE, MODEL_DTYPE, llama, shape, untouched_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lspade_train.models import ModelAdapter
from lspade_train.policies.policy import ExitPolicy
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.runtime import ExitRuntime


@dataclass(frozen=True)
class Subject:
    """Two copies of a model.

    Attributes:
        name: for display.
        adapter: the copy driven by the package.
        plain: the copy as transformers loads it, untouched.
    """

    name: str
    adapter: ModelAdapter
    plain: PreTrainedModel

    def runtime(self, policy: ExitPolicy) -> ExitRuntime:
        """The package's own runtime; untrained heads cost the same as fitted ones."""
        return ExitRuntime(self.adapter, self._heads(), policy=policy)

    def _heads(self) -> LSpadeHeads:
        top, width = self.adapter.num_layers, self.adapter.hidden_size
        with torch.device(self.adapter.device):
            return LSpadeHeads(range(1, top), width).to(self.adapter.dtype).requires_grad_(False)

    def tokens(self, rows: int, tokens: int) -> Tensor:
        """Random prompts."""
        seeded = torch.Generator().manual_seed(0)
        return torch.randint(3, self.adapter.vocab_size, (rows, tokens), generator=seeded)

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        """The untouched model on full prompts: strictest, as it unembeds the last position only.

        Returns:
            Its one-token answers, on the host.
        """
        mask = torch.ones_like(ids)
        found: Any = self.plain(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        return found.logits[:, -1].argmax(-1).cpu()


@cache
def random_subject() -> Subject:
    """Two copies of the benchmarks' random model."""
    return Subject(shape(), llama(), untouched_llama())


@cache
def real_subject(folder: Path) -> Subject:
    """Two copies of the model in a transformers folder."""

    def load() -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, MODEL_DTYPE))
        return model.to(DEVICE).eval()

    return Subject(f"{folder.name}, {MODEL_DTYPE}", ModelAdapter(load()), load())
