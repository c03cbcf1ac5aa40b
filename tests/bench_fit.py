"""A training step of all layers: against its matrix products, and against a loop over layers."""

from collections.abc import Callable

import torch
from bench_cache import DEVICE, DTYPE, LAYERS, VOCAB, WIDTH
from bench_timing import Row, interleaved, peak_memory, ratio, seconds
from torch import Tensor, nn

from lspade_train.cache import StateBatch
from lspade_train.models import Unembedding
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.recipe import HeadConfig
from lspade_train.training.module import LSpadeModule

ROWS = 1024


class Setting:
    """Random states and targets, a frozen unembedding, and the heads both ways train."""

    def __init__(self, rows: int = ROWS) -> None:
        torch.manual_seed(0)
        count, self.rows = LAYERS - 1, rows
        with torch.device(DEVICE):
            head = nn.Linear(WIDTH, VOCAB, bias=False).to(DTYPE).requires_grad_(False)
            norm = nn.RMSNorm(WIDTH).to(DTYPE).requires_grad_(False)
            self.unembed = Unembedding(norm, head)
            self.hidden = torch.randn(rows, count, WIDTH).to(DTYPE)
            self.target = torch.randn(rows, count, WIDTH).to(DTYPE)
            number = torch.zeros(rows, dtype=torch.int32)
            self.batch = StateBatch(
                self.hidden, self.hidden[:, 0], number, number, number, number > 0,
                number[:, None].expand(-1, 4), number, number, self.target,
            )  # fmt: skip
            self.module = LSpadeModule(HeadConfig(), LSpadeHeads(range(1, LAYERS), WIDTH))
            self.loop = [nn.Linear(WIDTH, WIDTH) for _ in range(count)]
        self.module._unembed = self.unembed
        self.optimizer = torch.optim.AdamW(self.module.parameters())
        self.loop_optimizer = torch.optim.AdamW([p for m in self.loop for p in m.parameters()])

    def step(self) -> None:
        """All layers at once, as `fit` trains them."""
        self.optimizer.zero_grad()
        self.module.losses(self.batch).sum().backward()
        self.optimizer.step()

    def layer_by_layer(self) -> None:
        """The loop of the usual lens trainers: a layer's logits, KL as tuned-lens writes it."""
        self._loop(_kl)

    def layer_by_layer_fused(self) -> None:
        """The same loop with PyTorch's own cross-entropy, the fastest that autograd has."""
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
        """The step's three products alone: student's logits, target's logits, gradient."""
        student, target = (it.flatten(0, 1) for it in (self.hidden, self.target))
        chunk = 192 if DEVICE == "cpu" else 8192
        for part in range(0, len(student), chunk):
            logits: Tensor = self.unembed.head(student[part : part + chunk])
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
    full.module.__dict__.pop("_memory")  # kept from step to step, and counted
    return full


def fit(rounds: int = 3) -> list[Row]:
    """Time of a step, and its peak memory over inputs, heads and optimiser state."""
    setting = Setting()
    cases = {
        "step": setting.step,
        "products": setting.products,
        "loop": setting.layer_by_layer,
        "fused": setting.layer_by_layer_fused,
    }
    taken = interleaved(cases, rounds)
    peaks = [
        peak_memory("bench_fit", "prepared()", f"it.{way}()") for way in ("step", "layer_by_layer")
    ]
    where = f"{ROWS:,} rows x {LAYERS - 1} layers, d={WIDTH}, V={VOCAB:,}"
    return [
        (
            "fit step / its three matrix products",
            f"{ratio(taken, 'step', 'products'):.2f}",
            f"at most 1.30; {seconds(taken, 'step'):.2f} s / "
            f"{seconds(taken, 'products'):.2f} s, {where}, optimiser included",
        ),
        (
            "loop over the layers / fit step, time",
            f"{ratio(taken, 'loop', 'step'):.2f}",
            f"at least 1.30; {seconds(taken, 'loop'):.2f} s / {seconds(taken, 'step'):.2f} s; "
            "KL as tuned-lens writes it",
        ),
        (
            "the same loop with PyTorch's cross-entropy / fit step, time",
            f"{ratio(taken, 'fused', 'step'):.2f}",
            f"{seconds(taken, 'fused'):.2f} s / {seconds(taken, 'step'):.2f} s",
        ),
        (
            "fit step / loop over the layers, peak memory",
            f"{peaks[0] / peaks[1]:.3f}",
            f"at most 0.25; {peaks[0]:,.0f} MB / {peaks[1]:,.0f} MB above heads and optimiser",
        ),
    ]


PARTS: dict[str, Callable[[], list[Row]]] = {"fit": fit}
