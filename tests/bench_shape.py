"""Benchmark sizes, and the random models and prompts they use.

On a GPU the shape of Llama-7B in bf16; on a CPU a small one in fp32; with BENCH_QUICK=1 a smaller
one still, whose ratios are rougher.
"""

import os

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lspade_train.models import ModelAdapter
from lspade_train.tasks import Example

QUICK = os.environ.get("BENCH_QUICK") == "1"
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
SMALL = (256, 8, 8_000) if QUICK else (512, 16, 32_000)
WIDTH, LAYERS, VOCAB = (4096, 32, 32_000) if GPU else SMALL
TOKENS_PER_BATCH = 32_768 if GPU else 8192
ROUNDS = 2 if QUICK else 3
MODEL_DTYPE = os.environ.get("BENCH_MODEL_DTYPE", "bfloat16")
"""Precision of a real model."""


def llama(width: int = WIDTH, layers: int = LAYERS, vocab: int = VOCAB) -> ModelAdapter:
    """A random Llama, driven block by block."""
    return ModelAdapter(untouched_llama(width, layers, vocab))


def untouched_llama(
    width: int = WIDTH, layers: int = LAYERS, vocab: int = VOCAB
) -> LlamaForCausalLM:
    """The same weights as a user's own model: the baseline for timings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=layers,
        intermediate_size=11_008 if width == 4096 else width * 43 // 16,
        num_attention_heads=max(width // 128, 4), max_position_embeddings=512,
    )  # fmt: skip
    with torch.device(DEVICE):
        return LlamaForCausalLM(config).to(DTYPE).eval()


def prompts(count: int, tokens: int, vocab: int = VOCAB, shared: int = 1) -> list[Example]:
    """Random prompts of one length with a shared prefix and four choices."""
    ids = np.random.default_rng(0).integers(3, vocab, (count, tokens), dtype=np.int32)
    ids[:, :shared] = ids[0, :shared]
    ids[:, 0] = 1
    last, answer = np.array([tokens - 1]), np.array([4])
    return [Example(prompt, last, answer, (4, 5, 6, 7), row) for row, prompt in enumerate(ids)]


def shape() -> str:
    """A description of the random model."""
    return f"d={WIDTH}, L={LAYERS}, V={VOCAB:,}, {str(DTYPE).removeprefix('torch.')}"
