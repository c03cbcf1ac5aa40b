"""Wall time, memory and FLOPs of a policy against the forward of the original model.

The two run alternately on the same batches, over prompt lengths, batch sizes and thresholds. The
original model is a second, unmodified load of the same weights: changes to the runtime's own model,
such as `requires_grad_(False)`, may affect the speed of its forward.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lspade_train.errors import RecipeError, TaskError
from lspade_train.io.storage import write_json
from lspade_train.models import ModelAdapter
from lspade_train.policies.exit_table import Threshold
from lspade_train.policies.flops import FlopCounts, count_flops, paid_flops
from lspade_train.profiling.clock import device_name, peak_mb, seconds_of
from lspade_train.profiling.figure import draw, threshold_name
from lspade_train.profiling.prediction import Confirmation
from lspade_train.profiling.shapes import batch_of, check_baseline, forward_of
from lspade_train.runtime import ExitRuntime
from lspade_train.runtime.batching import Batch
from lspade_train.runtime.decide import Outcome, Probe, decide_batch

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class ProfileRow:
    """One policy on one shape of batch.

    Attributes:
        tokens: length of each prompt.
        rows: prompts in the batch.
        threshold: the policy's threshold; None never checks.
        mean_exit_layer: mean over the batch; L for a row that never exits.
        seconds: median wall time of the batch.
        plain_seconds: the same for the original model's forward, which unembeds the answer position
            only (`logits_to_keep=1`).
        speedup: `plain_seconds` over `seconds`.
        paired_speedup: smallest and largest ratio of two times of the same round.
        tokens_per_second: prompt tokens per second.
        peak_mb: peak memory above that in use before; None if it cannot be read.
        plain_peak_mb: the same for the original model's forward.
        flops: operations, including checks, as a fraction of the original model's.
    """

    tokens: int
    rows: int
    threshold: Threshold | None
    mean_exit_layer: float
    seconds: float
    plain_seconds: float
    speedup: float
    paired_speedup: tuple[float, float]
    tokens_per_second: float
    peak_mb: float | None
    plain_peak_mb: float | None
    flops: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """All results, and what they were measured on.

    Attributes:
        device: the accelerator's name, or the number of CPU threads.
        dtype: the model's precision.
        prompts: `given`, or `random` tokens, whose exits say nothing about real ones.
        repeats: timed rounds per shape.
        results: results, shape by shape.
        confirmation: the confirmation, for a policy that was priced by time.
    """

    device: str
    dtype: str
    prompts: str
    repeats: int
    results: tuple[ProfileRow, ...]
    confirmation: Confirmation | None = None

    def save(self, folder: Path) -> Path:
        """Write `profile.json` and, in `figures/`, `speedup.png` and `.svg`.

        Returns:
            The JSON file.

        Raises:
            LSpadeError: the folder cannot be written.
        """
        path = Path(folder) / "profile.json"
        write_json(path, asdict(self))
        draw(self, path.parent / "figures")
        return path

    def table(self) -> "Table":
        """The results for a terminal."""
        from rich.table import Table

        titles = ("tokens", "batch", "threshold", "exit layer", "model", "policy", "speed-up")
        where = f"{self.device}, {self.dtype}; medians of {self.repeats} rounds"
        table = Table(*titles, "of one round", "tokens/s", "memory", "FLOPs", title=where)
        for column in table.columns:
            column.justify = "right"
        for row in self.results:
            table.add_row(
                str(row.tokens),
                str(row.rows),
                threshold_name(row.threshold),
                f"{row.mean_exit_layer:.1f}",
                f"{row.plain_seconds * 1e3:,.1f} ms",
                f"{row.seconds * 1e3:,.1f} ms",
                f"{row.speedup:.2f}x",
                "{:.2f}-{:.2f}x".format(*row.paired_speedup),
                f"{row.tokens_per_second:,.0f}",
                "" if row.peak_mb is None else f"{row.peak_mb:,.0f} MB",
                f"{row.flops:.2f}",
            )
        return table


def profile(
    runtime: ExitRuntime,
    plain: "PreTrainedModel",
    *,
    lengths: Sequence[int] = (64, 256, 1024),
    batch_sizes: Sequence[int] = (1, 8),
    thresholds: Sequence[Threshold | None] = (),
    prompts: Sequence[Sequence[int]] = (),
    choices: Sequence[int] = (),
    repeats: int = 5,
    track: Callable[[list[Any]], Iterable[Any]] = lambda shapes: shapes,
) -> Profile:
    """Time the policy and the original model alternately, for all lengths, batches and thresholds.

    Args:
        runtime: model, heads and policy.
        plain: the same weights loaded a second time with transformers, unmodified.
        lengths: prompt lengths in tokens.
        batch_sizes: prompts per batch.
        thresholds: thresholds to use in the policy; () uses its own.
        prompts: real prompts as token ids, truncated from the left or joined to each length, so
            that exits are those of real text; () uses random tokens.
        choices: tokens to choose from, for a policy of scope `choices`.
        repeats: timed rounds per shape, after a warm-up.
        track: progress over the shapes.

    Raises:
        RecipeError: a number out of range.
        TaskError: a length over the model's context, or no choices for a policy of scope `choices`.
        PolicyError: a threshold out of the measure's range.
        UnsupportedModelError: `plain` is the runtime's own model, or a different one.
    """
    adapter, policy = runtime.adapter, runtime.policy
    _check_shapes(lengths, batch_sizes, repeats)
    _check_prompts(adapter, lengths, policy.scope == "choices" and not choices)
    check_baseline(plain, adapter)
    asked = thresholds or (policy.threshold,)
    policies = [replace(policy, threshold=threshold) for threshold in asked]
    probes = [ExitRuntime(adapter, runtime.heads, policy=one).probe for one in policies]
    counts = count_flops(adapter, runtime.heads)
    results: list[ProfileRow] = []
    for tokens, rows in track(list(product(lengths, batch_sizes))):
        batch = batch_of(adapter, prompts, tokens, rows, choices)
        results += _measure(plain, probes, batch, counts, repeats)
    return Profile(
        device=device_name(adapter.device),
        dtype=str(adapter.dtype).removeprefix("torch."),
        prompts="given" if prompts else "random",
        repeats=repeats,
        results=tuple(results),
    )


def _check_shapes(lengths: Sequence[int], batch_sizes: Sequence[int], repeats: int) -> None:
    for name, values in (("lengths", lengths), ("batch_sizes", batch_sizes)):
        if not values or min(values) < 1:
            raise RecipeError(
                f"--{name} is {list(values)}; expected one or more numbers, each 1 or more."
            )
    if repeats < 1:
        raise RecipeError(f"--repeats is {repeats}; expected 1 or more.")


def _check_prompts(adapter: ModelAdapter, lengths: Sequence[int], lacks_choices: bool) -> None:
    limit = adapter.max_length
    if min(lengths) < 2 or (limit is not None and max(lengths) > limit):
        raise TaskError(
            f"Prompt lengths {list(lengths)} are out of range: this model takes 2 to "
            f"{limit or 'any number of'} tokens. Set --lengths."
        )
    if lacks_choices:
        raise TaskError(
            "The policy's scope is choices: give the tokens to choose from, or calibrate a policy "
            "of scope vocabulary."
        )


def _measure(
    plain: "PreTrainedModel",
    probes: Sequence[Probe],
    batch: Batch,
    counts: FlopCounts,
    repeats: int,
) -> Iterator[ProfileRow]:
    device = batch.ids.device
    runs = [
        forward_of(plain, batch),
        *((lambda probe=probe: decide_batch(probe, batch)) for probe in probes),
    ]
    outcomes = [run() for run in runs]
    peaks = [peak_mb(run, device) for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, seconds in zip(runs, times, strict=True):  # alternately, for equal conditions
            seconds.append(seconds_of(run, device))
    for probe, outcome, peak, seconds in zip(
        probes, outcomes[1:], peaks[1:], times[1:], strict=True
    ):
        assert isinstance(outcome, Outcome)
        median, plain_median = statistics.median(seconds), statistics.median(times[0])
        paired = [whole / own for whole, own in zip(times[0], seconds, strict=True)]
        yield ProfileRow(
            tokens=batch.ids.shape[1],
            rows=len(batch.queries),
            threshold=probe.policy.threshold,
            mean_exit_layer=float(outcome.layers.double().mean()),
            seconds=median,
            plain_seconds=plain_median,
            speedup=plain_median / median,
            paired_speedup=(min(paired), max(paired)),
            tokens_per_second=batch.ids.numel() / median,
            peak_mb=peak,
            plain_peak_mb=peaks[0],
            flops=_flops(probe, outcome, batch, counts),
        )


def _flops(probe: Probe, outcome: Outcome, batch: Batch, counts: FlopCounts) -> float:
    choices = None if batch.choice_ids is None else batch.choice_ids.shape[1]
    lengths = batch.mask.sum(-1)
    paid = paid_flops(counts, lengths, outcome.layers, probe.policy, choices=choices)
    return float((paid / counts.full(lengths.cpu())).mean())
