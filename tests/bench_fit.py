"""A training step for all layers, against its matrix products and against a loop over layers.

The step is from a fit long enough to reduce its targets first, which takes two products over the
vocabulary. In half precision (on a GPU) targets are not reduced, and a step takes three.
"""

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import torch
from bench_shape import DEVICE, DTYPE, LAYERS, QUICK, ROUNDS, VOCAB, WIDTH
from bench_timing import Part, Row, interleaved, peak_memory, seconds, versus
from torch import Tensor, nn

from lspade_train.cache import StateBatch
from lspade_train.models import Unembedding
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.recipe import HeadConfig, LossScope
from lspade_train.training.module import LSpadeModule
from lspade_train.training.targets import is_reducible, reduce_target, target_logits

ROWS = 128 if QUICK else 1024
LARGE = 16_000 if QUICK else 151_936
"""A vocabulary of today's models, for the loss over the choices of each row."""


class Setting:
    """Random states and targets, a frozen unembedding, and the heads that both approaches train."""

    def __init__(
        self,
        rows: int = ROWS,
        vocab: int = VOCAB,
        scope: LossScope = "vocabulary",
        *,
        layers: int = LAYERS,
        width: int = WIDTH,
    ) -> None:
        torch.manual_seed(0)
        count, self.rows = layers - 1, rows
        with torch.device(DEVICE):
            head = nn.Linear(width, vocab, bias=False).to(DTYPE).requires_grad_(False)
            norm = nn.RMSNorm(width).to(DTYPE).requires_grad_(False)
            self.unembed = Unembedding(norm, head)
            self.hidden = torch.randn(rows, count, width).to(DTYPE)
            self.target = torch.randn(rows, count, width).to(DTYPE)
            number = torch.zeros(rows, dtype=torch.int32)
            self.unreduced = StateBatch(
                self.hidden, self.hidden[:, 0], number, number, number, number > 0,
                number[:, None] + torch.arange(4).int(), number + 4, number, self.target,
            )  # fmt: skip
            self.module = LSpadeModule(
                HeadConfig(scope=scope), LSpadeHeads(range(1, layers), width)
            )
            self.loop = [nn.Linear(width, width) for _ in range(count)]
        self.module._unembed = self.unembed
        self.reducible = is_reducible(self.unembed) and scope == "vocabulary"
        self.batch = self.reduced() if self.reducible else self.unreduced
        self.optimizer = torch.optim.AdamW(self.module.parameters())
        self.loop_optimizer = torch.optim.AdamW([p for m in self.loop for p in m.parameters()])

    def reduced(self) -> StateBatch:
        """The batch as a fit holds it after reducing its targets."""
        target = target_logits(self.unreduced, "spade", self.unembed)
        shape = self.hidden.shape[:2]
        found = reduce_target(target, self.rows * shape[1], self.unembed)
        return replace(
            self.unreduced,
            target=None,
            target_mean=found.mean.unflatten(0, shape),
            target_offset=found.offset.unflatten(0, shape),
            target_entropy=found.entropy.unflatten(0, shape),
            target_best=found.best.unflatten(0, shape),
        )

    def step(self) -> None:
        """A step for all layers at once, as `fit` trains them."""
        self._step(self.batch)

    def unreduced_step(self) -> None:
        """The same over chunks of whole rows, as where a target cannot be reduced."""
        with patch("lspade_train.training.losses.is_reducible", lambda _: False):
            self._step(self.unreduced)

    def _step(self, batch: StateBatch) -> None:
        self.optimizer.zero_grad()
        self.module.losses(batch).sum().backward()
        self.optimizer.step()

    def layer_by_layer(self) -> None:
        """The loop of common lens trainers: one layer at a time, KL as tuned-lens writes it."""
        self._loop(_kl)

    def layer_by_layer_fused(self) -> None:
        """The same loop with PyTorch's own cross-entropy, the fastest option in autograd."""
        self._loop(lambda logits, goal: nn.functional.cross_entropy(logits, goal.softmax(-1)))

    def _loop(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.loop_optimizer.zero_grad()
        for layer, head in enumerate(self.loop):
            hidden = self.hidden[:, layer].to(head.weight.dtype)
            logits = self.unembed((hidden + head(hidden)).to(DTYPE)).float()
            with torch.no_grad():
                goal = self.unembed(self.target[:, layer]).float()
            loss(logits, goal).backward()
        self.loop_optimizer.step()

    @torch.no_grad()
    def products(self) -> None:
        """The step's products alone: student logits, gradient, and target logits if not reduced."""
        student, target = (it.flatten(0, 1) for it in (self.hidden, self.target))
        chunk = 512 if DEVICE == "cpu" else 8192  # the fastest found
        for part in range(0, len(student), chunk):
            logits: Tensor = self.unembed.head(student[part : part + chunk])
            if not self.reducible:
                self.unembed.head(target[part : part + chunk])
            logits @ self.unembed.weight


def _kl(logits: Tensor, goal: Tensor) -> Tensor:
    with torch.no_grad():
        labels = goal.log_softmax(-1)
    return (labels.exp() * (labels - logits.log_softmax(-1))).sum(-1).mean()


def prepared() -> Setting:
    """A setting whose optimisers already hold their state."""
    setting = Setting(64)
    setting.step()
    setting.layer_by_layer()
    full = Setting()
    full.optimizer, full.module = setting.optimizer, setting.module
    full.loop_optimizer, full.loop = setting.loop_optimizer, setting.loop
    full.module._buffer = None  # persists across steps, and is counted
    return full


def fit(rounds: int = ROUNDS) -> list[Row]:
    """Time of a step, and its peak memory beyond inputs, heads and optimiser state."""
    setting = Setting()
    cases = {
        "step": setting.step,
        "unreduced": setting.unreduced_step,
        "products": setting.products,
        "loop": setting.layer_by_layer,
        "fused": setting.layer_by_layer_fused,
    }
    taken = interleaved(cases, rounds)
    count, most = ("two", 1.15) if setting.reducible else ("three", 1.30)
    where = f"{ROWS:,} rows x {LAYERS - 1} layers, d={WIDTH}, V={VOCAB:,}"
    return [
        (
            f"fit step / its {count} products",
            versus(taken, "step", "products"),
            f"at most {most:.2f}; {seconds(taken, 'step'):.2f} s / "
            f"{seconds(taken, 'products'):.2f} s, {where}, optimiser included",
        ),
        (
            "three-product step / fit step",
            versus(taken, "unreduced", "step"),
            f"at least 1.35 where targets are reduced; {seconds(taken, 'unreduced'):.2f} s / "
            f"{seconds(taken, 'step'):.2f} s",
        ),
        (
            "loop over the layers / fit step, time",
            versus(taken, "loop", "step"),
            f"at least 1.30; {seconds(taken, 'loop'):.2f} s / {seconds(taken, 'step'):.2f} s; "
            "KL as tuned-lens writes it",
        ),
        (
            "the same loop with PyTorch's cross-entropy / fit step, time",
            versus(taken, "fused", "step"),
            f"at least 1.60; {seconds(taken, 'fused'):.2f} s / {seconds(taken, 'step'):.2f} s",
        ),
    ]


def fit_memory() -> list[Row]:
    """Peak memory of a step beyond inputs, heads and optimiser state."""
    step, loop, three = (
        peak_memory("bench_fit", "prepared()", f"it.{way}()")
        for way in ("step", "layer_by_layer", "unreduced_step")
    )
    return [
        (
            "fit step / loop over the layers, peak memory",
            f"{step / loop:.3f}",
            f"at most 0.25; {step:,.0f} MB / {loop:,.0f} MB above heads and optimiser",
        ),
        (
            "fit step / three-product step, peak memory",
            f"{step / three:.3f}",
            f"at most 1.00; {step:,.0f} MB / {three:,.0f} MB",
        ),
    ]


def warmed(scope: LossScope) -> Setting:
    """A setting with a large vocabulary that has taken a step and released its working memory."""
    setting = Setting(ROWS // 8, LARGE, scope)
    setting.step()
    setting.module._buffer = None
    return setting


def choices(rounds: int = ROUNDS) -> list[Row]:
    """A step over four choices per row against one over a vocabulary of modern size."""
    ways: dict[str, LossScope] = {"over the choices": "choices", "vocabulary": "vocabulary"}
    cases = {name: Setting(ROWS // 8, LARGE, scope).step for name, scope in ways.items()}
    taken = interleaved(cases, rounds)
    few, all_ = (seconds(taken, name) for name in cases)
    where = f"{ROWS // 8} rows x {LAYERS - 1} layers, d={WIDTH}, V={LARGE:,}"
    return [
        (
            "fit step over the choices / over the vocabulary, time",
            versus(taken, *cases),
            f"{few * 1e3:,.0f} ms / {all_ * 1e3:,.0f} ms, {where}, optimiser included",
        )
    ]


def choices_memory() -> list[Row]:
    """Peak memory of the same two steps."""
    few, all_ = (
        peak_memory("bench_fit", f"warmed({scope!r})", "it.step()")
        for scope in ("choices", "vocabulary")
    )
    return [
        (
            "fit step over the choices / over the vocabulary, peak memory",
            f"{few / all_:.3f}",
            f"{few:,.0f} MB / {all_:,.0f} MB above states, heads and optimiser, V={LARGE:,}",
        )
    ]


PARTS = {
    "fit": Part(fit, 120, quick=15),
    "fit-memory": Part(fit_memory, 60),
    "choices": Part(choices, 60, quick=10),
    "choices-memory": Part(choices_memory, 60),
}
