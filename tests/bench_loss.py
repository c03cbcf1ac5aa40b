"""The chunked distillation loss against the naive one, timed in turn in the same process.

Floor: three products of rows x vocab x d (student's logits, target's logits, gradient).
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lspade_train.adapters import Unembedding
from lspade_train.losses import distillation, hidden_target

ROWS, LAYERS, WIDTH, VOCAB = 1024, 8, 512, 32_000


def setting() -> tuple[Tensor, Tensor, Unembedding]:
    """Random student and target states for 1,024 rows at 8 layers, V=32,000, d=512."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCAB, bias=False).requires_grad_(False)
    unembed = Unembedding(nn.RMSNorm(WIDTH).requires_grad_(False), head)
    student = torch.randn(ROWS * LAYERS, WIDTH, requires_grad=True)
    return student, torch.randn(ROWS * LAYERS, WIDTH), unembed


def chunked(student: Tensor, goal: Tensor, unembed: Unembedding) -> None:
    """One loss and gradient as training computes them."""
    distillation(student, hidden_target(goal, unembed), unembed).loss.mean().backward()


def naive(student: Tensor, goal: Tensor, unembed: Unembedding) -> None:
    """Every logit at once, gradient by autograd."""
    with torch.no_grad():
        target = unembed(goal).softmax(-1)
    torch.nn.functional.cross_entropy(unembed(student), target).backward()


def products(student: Tensor, goal: Tensor, unembed: Unembedding) -> None:
    """The three matrix products alone, in the same chunks."""
    with torch.no_grad():
        for part in range(0, len(goal), 192):
            rows = slice(part, part + 192)
            logits = unembed.head(student[rows])
            unembed.head(goal[rows])
            logits @ unembed.weight


WAYS: dict[str, Callable[[Tensor, Tensor, Unembedding], None]] = {
    "chunked": chunked,
    "naive": naive,
    "products": products,
}


def extra_memory(way: str) -> float:
    """Peak resident memory above the inputs, in MB, of one step in a process of its own (Linux)."""
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import bench_loss as b

def resident(field):
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))

student, goal, unembed = b.setting()
b.WAYS[{way!r}](student[:64].detach().requires_grad_(), goal[:64], unembed)
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = resident("VmRSS:")
b.WAYS[{way!r}](student, goal, unembed)
print((resident("VmHWM:") - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def run(repeats: int = 3) -> list[tuple[str, str, str]]:
    """Rows of (figure, ratio, detail) for the table of `make bench`."""
    inputs = setting()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way, step in WAYS.items():  # in turn, so that a slow minute slows all of them
            inputs[0].grad = None
            start = time.perf_counter()
            step(*inputs)
            times[way].append(time.perf_counter() - start)
    seconds = {way: statistics.median(values) for way, values in times.items()}
    memory = {way: extra_memory(way) for way in ("chunked", "naive")}
    where = f"{ROWS:,} rows x {LAYERS} layers, d={WIDTH}, V={VOCAB:,}"
    return [
        (
            "loss: time, chunked / naive",
            f"{seconds['chunked'] / seconds['naive']:.2f}",
            f"{seconds['chunked']:.2f} s / {seconds['naive']:.2f} s, {where}",
        ),
        (
            "loss: time, chunked / its three products",
            f"{seconds['chunked'] / seconds['products']:.2f}",
            f"{seconds['chunked']:.2f} s / {seconds['products']:.2f} s",
        ),
        (
            "loss: peak extra memory, chunked / naive",
            f"{memory['chunked'] / memory['naive']:.3f}",
            f"{memory['chunked']:,.0f} MB / {memory['naive']:,.0f} MB",
        ),
    ]


if __name__ == "__main__":
    for row in run():
        sys.stdout.write("  ".join(row) + "\n")
