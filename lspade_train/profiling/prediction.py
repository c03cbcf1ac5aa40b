"""Compares predicted and measured time of a policy that was priced by time."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lspade_train.policies.seconds import Seconds, place
from lspade_train.profiling.clock import hardware, seconds_of
from lspade_train.profiling.shapes import batch_of, check_baseline, forward_of
from lspade_train.runtime import ExitRuntime
from lspade_train.runtime.batching import Batch
from lspade_train.runtime.decide import decide_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS = 32
"""Prompts used to confirm a prediction, in batches of the priced size."""


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """Predicted (by `calibrate --cost time`) and measured time for some batches.

    All ratios are the policy's seconds over the original model's.

    Attributes:
        shape: prompts and tokens of a batch, in words.
        priced_on: hardware, threads and precision of the prediction.
        measured_on: the same for the measurement.
        prompts: number of prompts.
        mean_exit_layer: their mean exit layer.
        expected: ratio that calibrate predicted for the validation rows; None: not recorded.
        predicted: ratio predicted for these prompts, from their exit layers.
        measured: ratio measured for these prompts, median of the rounds.
        rounds: lowest and highest ratio of a round.
    """

    shape: str
    priced_on: str
    measured_on: str
    prompts: int
    mean_exit_layer: float
    expected: float | None
    predicted: float
    measured: float
    rounds: tuple[float, float]

    @property
    def difference(self) -> float:
        """Relative difference between prediction and measurement."""
        return self.predicted / self.measured - 1

    @property
    def words(self) -> str:
        """A few lines for a terminal."""
        calibrated = "" if self.expected is None else f" (calibrate: {self.expected:.3f})"
        elsewhere = ""
        if self.priced_on != self.measured_on:
            elsewhere = (
                f"\nPredicted on {self.priced_on}; measured on {self.measured_on}: run calibrate "
                "--cost time here."
            )
        return (
            f"Time of the policy over the original model's, {self.prompts} prompts at "
            f"{self.shape}:\npredicted {self.predicted:.3f}{calibrated}, measured "
            f"{self.measured:.3f} ({self.rounds[0]:.3f} to {self.rounds[1]:.3f}): "
            f"{self.difference:+.1%}.{elsewhere}"
        )


def confirm(
    runtime: ExitRuntime,
    plain: "PreTrainedModel",
    *,
    prompts: Sequence[Sequence[int]] = (),
    choices: Sequence[int] = (),
    repeats: int = 5,
) -> Confirmation | None:
    """Time a policy that was priced by time and the original model alternately, batch by batch.

    Args:
        runtime: model, heads and policy.
        plain: as for `profile`.
        prompts: as for `profile`; those nearest to the priced length are used.
        choices: as for `profile`.
        repeats: timed rounds of each batch, after a warm-up.

    Returns:
        The comparison; None for a policy that was not priced by time.

    Raises:
        PolicyError: the policy's record cannot be read.
        UnsupportedModelError: `plain` is the runtime's own model, or a different one.
    """
    adapter, policy = runtime.adapter, runtime.policy
    priced = policy.calibration.get("seconds")
    if priced is None:
        return None
    check_baseline(plain, adapter)
    seconds = Seconds.from_json(priced)
    size, tokens = seconds.batch_size, seconds.prompt_length
    nearest = sorted(prompts, key=lambda ids: abs(len(ids) - tokens))
    found: list[_Batch] = []
    for first in range(0, max(PROMPTS, size), size):
        turned = [*nearest[first:], *nearest[:first]]
        batch = batch_of(adapter, turned, tokens, size, choices)
        found.append(_time(runtime, plain, batch, repeats))
    layers = [layer for one in found for layer in one.stops]
    predicted = sum(seconds.batch(policy, one.stops) for one in found)
    ratios = [sum(o.own[n] for o in found) / sum(o.plain[n] for o in found) for n in range(repeats)]
    dtype = str(adapter.dtype).removeprefix("torch.")
    saved = policy.calibration.get("chosen", {}).get("time_saved")
    return Confirmation(
        shape=seconds.shape,
        priced_on=seconds.where,
        measured_on=place(hardware(adapter.device), torch.get_num_threads(), dtype),
        prompts=len(layers),
        mean_exit_layer=statistics.mean(layers),
        expected=None if saved is None else 1 - saved,
        predicted=predicted / (len(found) * seconds.plain),
        measured=statistics.median(ratios),
        rounds=(min(ratios), max(ratios)),
    )


@dataclass(frozen=True)
class _Batch:
    """A batch's exit layers, and the seconds of each round."""

    stops: list[int]
    own: list[float]
    plain: list[float]


def _time(runtime: ExitRuntime, plain: "PreTrainedModel", batch: Batch, repeats: int) -> _Batch:
    """Time one batch with the policy and with the original model, alternately."""
    forward, device = forward_of(plain, batch), batch.ids.device
    found = _Batch(decide_batch(runtime.probe, batch).layers.tolist(), [], [])
    forward()
    for _ in range(repeats):
        found.own.append(seconds_of(lambda: decide_batch(runtime.probe, batch), device))
        found.plain.append(seconds_of(forward, device))
    return found
