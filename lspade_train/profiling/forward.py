"""What a policy gains on this machine: wall time, memory and FLOPs against the model's own forward.

Both run in turn on the same batches, over prompt lengths, batch sizes and thresholds. Knows
nothing of accuracy: what an exit costs in answers is `calibration`'s to say.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lspade_train.adapters import ModelAdapter
from lspade_train.errors import TaskError
from lspade_train.exits import Threshold
from lspade_train.policy import ExitPolicy
from lspade_train.runtime import ExitRuntime
from lspade_train.runtime.decide import Outcome, Probe, decide_batch
from lspade_train.runtime.flops import FlopCounts, count_flops, exit_costs
from lspade_train.runtime.prompts import Batch, Query, collate
from lspade_train.storage import write_json

if TYPE_CHECKING:
    from rich.table import Table

# Okabe-Ito colours, told apart by marker as well.
LINES = [("#0072B2", "o"), ("#D55E00", "D"), ("#009E73", "s"), ("#E69F00", "^"), ("#CC79A7", "v")]
SMAPS_RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class ProfileRow:
    """One policy on one shape of batch.

    Attributes:
        tokens: length of each prompt.
        rows: prompts in the batch.
        threshold: the policy's; None never checks.
        mean_exit_layer: over the batch; L for a row that never stops.
        seconds: median wall time of the batch.
        plain_seconds: of the model's own forward, answer position only (`logits_to_keep=1`).
        speedup: median over rounds of plain time over the policy's time in the same round.
        tokens_per_second: prompt tokens answered.
        peak_mb: most memory above what was held before; None where it cannot be read.
        plain_peak_mb: the same for the model's own forward.
        flops: operations as a fraction of the model's, checks and all.
    """

    tokens: int
    rows: int
    threshold: Threshold | None
    mean_exit_layer: float
    seconds: float
    plain_seconds: float
    speedup: float
    tokens_per_second: float
    peak_mb: float | None
    plain_peak_mb: float | None
    flops: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """All rows, and what they were measured on.

    Attributes:
        device: the accelerator's name, or the number of CPU threads.
        dtype: the model's precision.
        prompts: `given`, or `random` tokens, whose exits say nothing about real ones.
        repeats: timed rounds per shape.
        results: shape by shape.
    """

    device: str
    dtype: str
    prompts: str
    repeats: int
    results: tuple[ProfileRow, ...]

    def save(self, folder: Path) -> Path:
        """Write `profile.json` and, under `figures/`, `speedup.png` and `.svg`.

        Returns:
            The JSON file.

        Raises:
            LSpadeError: the folder cannot be written.
        """
        path = Path(folder) / "profile.json"
        write_json(path, asdict(self))
        _draw(self, path.parent / "figures")
        return path

    def table(self) -> "Table":
        """The results for a terminal."""
        from rich.table import Table

        titles = ("tokens", "batch", "threshold", "exit layer", "model", "policy", "speed-up")
        table = Table(*titles, "tokens/s", "memory", "FLOPs", title=f"{self.device}, {self.dtype}")
        for column in table.columns:
            column.justify = "right"
        for row in self.results:
            table.add_row(
                str(row.tokens),
                str(row.rows),
                _name(row.threshold),
                f"{row.mean_exit_layer:.1f}",
                f"{row.plain_seconds * 1e3:,.1f} ms",
                f"{row.seconds * 1e3:,.1f} ms",
                f"{row.speedup:.2f}x",
                f"{row.tokens_per_second:,.0f}",
                "" if row.peak_mb is None else f"{row.peak_mb:,.0f} MB",
                f"{row.flops:.2f}",
            )
        return table


def profile(
    runtime: ExitRuntime,
    *,
    lengths: Sequence[int] = (64, 256, 1024),
    batch_sizes: Sequence[int] = (1, 8),
    thresholds: Sequence[Threshold | None] = (),
    prompts: Sequence[Sequence[int]] = (),
    choices: Sequence[int] = (),
    repeats: int = 5,
    track: Callable[[list[Any]], Iterable[Any]] = lambda shapes: shapes,
) -> Profile:
    """Time the policy and the plain model in turn, on every length x batch size x threshold.

    Args:
        runtime: model, heads and policy.
        lengths: prompt lengths in tokens.
        batch_sizes: prompts per batch.
        thresholds: thresholds to put in the policy; () takes its own.
        prompts: real ones as token ids, cut from the left or joined to each length, so that exits
            are those of real text; () takes random tokens.
        choices: tokens to choose from, for a policy of scope `choices`.
        repeats: timed rounds per shape, behind one that warms up.
        track: progress over the shapes.

    Raises:
        TaskError: a length over the model's context, or a policy of scope `choices` without any.
    """
    adapter, policy = runtime.adapter, runtime.policy
    _check(adapter, lengths, policy.scope == "choices" and not choices)
    asked = thresholds or (policy.threshold,)
    probes = [replace(runtime.probe, policy=replace(policy, threshold=t)) for t in asked]
    counts = count_flops(adapter, runtime.heads)
    results: list[ProfileRow] = []
    for tokens, rows in track(list(product(lengths, batch_sizes))):
        batch = _batch(adapter, prompts, tokens, rows, choices)
        results += _measure(adapter, probes, batch, counts, repeats)
    return Profile(
        device=_device_name(adapter.device),
        dtype=str(adapter.dtype).removeprefix("torch."),
        prompts="given" if prompts else "random",
        repeats=repeats,
        results=tuple(results),
    )


@dataclass(frozen=True, kw_only=True)
class GenerationRow:
    """Greedy generation behind one exit layer, against the full model's.

    Attributes:
        layer: exit layer of every prompt; L is the full model.
        agreement: fraction of the full model's tokens that stand at the same place.
        first_token: the same for the first token alone, which `decide` would answer.
        prefill_seconds: median time to the first token of all prompts.
        cache_bytes: mean keys and values held per prompt at its end.
    """

    layer: int
    agreement: float
    first_token: float
    prefill_seconds: float
    cache_bytes: float


def profile_generation(
    runtime: ExitRuntime,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    layers: Sequence[int] | None = None,
    repeats: int = 3,
) -> list[GenerationRow]:
    """What an exit at each layer keeps of greedy decoding, and what it saves.

    Args:
        runtime: model and heads; its policy's decoder and positions are used.
        prompts: token ids, start token first.
        max_new_tokens: most tokens per prompt.
        layers: exit layers, 0..L; None takes the heads' and L.
        repeats: timed prefills per layer.
    """
    top = runtime.adapter.num_layers
    known = runtime.heads.layers if runtime.heads is not None else ()
    asked = [*known, top] if layers is None else layers
    full = _leaving_at(runtime, top).generate(prompts, max_new_tokens)
    rows: list[GenerationRow] = []
    for layer in asked:
        at = _leaving_at(runtime, layer)
        found = at.generate(prompts, max_new_tokens)
        hits = [
            [a == b for a, b in zip_longest(one.token_ids[: len(all_.token_ids)], all_.token_ids)]
            for one, all_ in zip(found, full, strict=True)
        ]
        times = [
            _seconds(lambda at=at: at.generate(prompts, 1), runtime.adapter.device)
            for _ in range(repeats)
        ]
        rows.append(
            GenerationRow(
                layer=layer,
                agreement=statistics.mean(hit for row in hits for hit in row),
                first_token=statistics.mean(row[0] for row in hits),
                prefill_seconds=statistics.median(times),
                cache_bytes=statistics.mean(one.cache_bytes for one in found),
            )
        )
    return rows


def _leaving_at(runtime: ExitRuntime, layer: int) -> ExitRuntime:
    policy = ExitPolicy.never()
    if layer < runtime.adapter.num_layers:
        kept = {"decoder": runtime.policy.decoder, "positions": runtime.policy.positions}
        policy = ExitPolicy.always(layer, **kept)
    return ExitRuntime(
        runtime.adapter,
        runtime.heads,
        policy=policy,
        tokens_per_batch=runtime.tokens_per_batch,
    )


def _check(adapter: ModelAdapter, lengths: Sequence[int], lacks_choices: bool) -> None:
    limit = adapter.max_length
    if min(lengths) < 2 or (limit is not None and max(lengths) > limit):
        raise TaskError(
            f"Prompt lengths {list(lengths)} are out of range: this model takes 2 to "
            f"{limit or 'any number of'} tokens."
        )
    if lacks_choices:
        raise TaskError(
            "The policy's scope is choices: give the tokens to choose from, or calibrate a policy "
            "of scope vocabulary."
        )


def _batch(
    adapter: ModelAdapter,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    rows: int,
    choices: Sequence[int],
) -> Batch:
    """Prompts of exactly that length: the start token, then the end of what is there."""
    if not prompts:
        seeded = torch.Generator().manual_seed(0)
        found = torch.randint(adapter.vocab_size, (rows, tokens), generator=seeded).tolist()
    else:
        every = [[*text[1:]] or [*text] for text in prompts]
        found = []
        for row in range(rows):
            text: list[int] = []
            back = row  # the row's own prompt ends it; those before fill what is missing
            while len(text) < tokens - 1:
                text = every[back % len(every)] + text
                back -= 1
            found.append([prompts[row % len(prompts)][0], *text[1 - tokens :]])
    named = {str(token): token for token in choices} or None
    return collate([Query(i, tuple(ids), named) for i, ids in enumerate(found)], adapter.device)


def _measure(
    adapter: ModelAdapter, probes: Sequence[Probe], batch: Batch, counts: FlopCounts, repeats: int
) -> Iterator[ProfileRow]:
    def plain() -> object:
        with torch.no_grad():
            return adapter.model(
                input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=1
            )

    runs = [plain, *((lambda probe=probe: decide_batch(probe, batch)) for probe in probes)]
    outcomes = [run() for run in runs]
    peaks = [_peak(run, adapter.device) for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, seconds in zip(runs, times, strict=True):  # in turn: all see the same machine
            seconds.append(_seconds(run, adapter.device))
    for probe, outcome, peak, seconds in zip(
        probes, outcomes[1:], peaks[1:], times[1:], strict=True
    ):
        assert isinstance(outcome, Outcome)
        median = statistics.median(seconds)
        yield ProfileRow(
            tokens=batch.ids.shape[1],
            rows=len(batch.queries),
            threshold=probe.policy.threshold,
            mean_exit_layer=float(outcome.layers.double().mean()),
            seconds=median,
            plain_seconds=statistics.median(times[0]),
            speedup=statistics.median(a / b for a, b in zip(times[0], seconds, strict=True)),
            tokens_per_second=batch.ids.numel() / median,
            peak_mb=peak,
            plain_peak_mb=peaks[0],
            flops=_flops(probe, outcome, batch, counts),
        )


def _flops(probe: Probe, outcome: Outcome, batch: Batch, counts: FlopCounts) -> float:
    choices = None if batch.choice_ids is None else batch.choice_ids.shape[1]
    every = exit_costs(
        counts, batch.mask.sum(-1), range(len(counts.step) + 1), probe.policy, choices=choices
    )
    return float(every.gather(1, outcome.layers[:, None]).mean())


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _peak(run: Callable[[], object], device: torch.device) -> float | None:
    """Most memory in MB held during one run above what was held before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    if device.type != "cpu" or not SMAPS_RESET.exists():
        return None
    try:
        SMAPS_RESET.write_text("5")  # Linux: forget the peak so far
    except OSError:
        return None
    before = _resident("VmRSS:")
    run()
    return max(_resident("VmHWM:") - before, 0.0)


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _name(threshold: Threshold | None) -> str:
    if threshold is None:
        return "never exit"
    return f"{threshold:.3g}" if isinstance(threshold, float | int) else "per layer"


def _draw(found: Profile, folder: Path) -> None:
    """Speed-up by prompt length, one panel per batch size, one line per threshold."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    sizes = sorted({row.rows for row in found.results})
    thresholds = list(dict.fromkeys(row.threshold for row in found.results))
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(1 + 3.2 * len(sizes), 3.6), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel, rows in zip(panels[0], sizes, strict=True):
        for place, threshold in enumerate(thresholds):
            line = [r for r in found.results if r.rows == rows and r.threshold == threshold]
            color, marker = LINES[place % len(LINES)]
            panel.plot(
                [row.tokens for row in line], [row.speedup for row in line],
                color=color, marker=marker, label=_name(threshold),
            )  # fmt: skip
        panel.axhline(1, color="black", lw=1)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("prompt tokens")
        panel.set_title(f"batch of {rows}", fontsize=10)
        panel.grid(alpha=0.25)
    panels[0][0].set_ylabel("speed-up over the model's forward")
    panels[0][-1].legend(frameon=False, title="threshold")
    figure.suptitle(f"{found.device}, {found.dtype}, {found.prompts} prompts", fontsize=10)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"speedup.{suffix}", dpi=160)
    plt.close(figure)
