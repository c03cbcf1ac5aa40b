"""The chunked distillation loss against materialised logits, and against its matrix products.

Lower bound: its products of rows x vocab x d (both sides' logits, the gradient, in full precision
the target's mean).
"""

from collections.abc import Callable
from functools import partial

import torch
from bench_shape import DEVICE, DTYPE, ROUNDS, VOCAB, WIDTH
from bench_timing import Part, Row, interleaved, peak_memory, seconds, versus
from torch import Tensor, nn

from lspade_train.models import Unembedding
from lspade_train.training.losses import distillation
from lspade_train.training.targets import HiddenTarget, is_reducible

ROWS = 8192
"""Of one step: prompts x layers."""


def setting() -> tuple[Tensor, Tensor, Unembedding]:
    """Random student and target states, and a frozen unembedding."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        head = nn.Linear(WIDTH, VOCAB, bias=False).to(DTYPE).requires_grad_(False)
        unembed = Unembedding(nn.RMSNorm(WIDTH).to(DTYPE).requires_grad_(False), head)
        student = torch.randn(ROWS, WIDTH).to(DTYPE).requires_grad_()
        return student, torch.randn(ROWS, WIDTH).to(DTYPE), unembed


def chunked(student: Tensor, goal: Tensor, unembed: Unembedding) -> None:
    """The loss and gradient as training computes them."""
    student.grad = None
    distillation(student, HiddenTarget(goal, unembed), unembed).loss.mean().backward()


def naive(student: Tensor, goal: Tensor, unembed: Unembedding) -> None:
    """All logits at once, gradient by autograd."""
    student.grad = None
    with torch.no_grad():
        target = unembed(goal).softmax(-1)
    nn.functional.cross_entropy(unembed(student), target).backward()


@torch.no_grad()
def products(student: Tensor, goal: Tensor, unembed: Unembedding) -> None:
    """The products alone: four in full precision, where the target is reduced, else three."""
    for rows in range(0, len(goal), chunk := 512 if DEVICE == "cpu" else 8192):
        logits: Tensor = unembed.head(student[rows : rows + chunk])
        unembed.head(goal[rows : rows + chunk])
        for _ in range(1 + is_reducible(unembed)):
            logits @ unembed.weight


def warmed(
    way: Callable[[Tensor, Tensor, Unembedding], None],
) -> tuple[Tensor, Tensor, Unembedding]:
    """A setting in a process that has already run a small step."""
    student, goal, unembed = setting()
    way(student[:64].detach().requires_grad_(), goal[:64], unembed)
    return student, goal, unembed


def loss(rounds: int = ROUNDS) -> list[Row]:
    """Time of one step, and its peak memory beyond its inputs."""
    inputs = setting()
    cases = {way.__name__: partial(way, *inputs) for way in (chunked, naive, products)}
    taken = interleaved(cases, rounds)
    time = {name: f"{seconds(taken, name):.2f} s" for name in cases}
    peaks = {
        way: peak_memory("bench_loss", f"warmed({way})", f"{way}(*it)")
        for way in ("chunked", "naive")
    }
    return [
        (
            "loss: time, chunked / naive",
            versus(taken, "chunked", "naive"),
            f"{time['chunked']} / {time['naive']}, {ROWS:,} rows, d={WIDTH}, V={VOCAB:,}, {DTYPE}",
        ),
        (
            "loss: time, chunked / its products",
            versus(taken, "chunked", "products"),
            f"{time['chunked']} / {time['products']}",
        ),
        (
            "loss: peak extra memory, chunked / naive",
            f"{peaks['chunked'] / peaks['naive']:.3f}",
            f"{peaks['chunked']:,.0f} MB / {peaks['naive']:,.0f} MB",
        ),
    ]


PARTS = {"loss": Part(loss, 150)}
