"""What every row would answer and cost at every check layer, and what a policy makes of it.

Arrays in, numbers out: knows nothing of models, of how a threshold is chosen or of files.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from lspade_train.errors import NumericsError, PolicyError

Threshold = float | tuple[float, ...]
PER_CHECK = ("confidence", "answers", "cost", "free_cost")
PER_ROW = ("full_answer", "gold", "full_cost", "plain_cost")
GRID_POINTS = 80
GRID_FLOOR = 1e-5


@dataclass(frozen=True, kw_only=True)
class ExitTable:
    """What every row would answer and cost if it stopped at each check layer.

    Attributes:
        layers: check layers, ascending, K of them.
        num_layers: blocks of the model: the exit layer of a row that never stops.
        bounds: confidence of a certain and of an undecided row, such as (0, ln vocab) for entropy
            in nats. Lower is more certain; pass a margin or a probability negated: (-1, 0).
        confidence: the signal at each check layer, in the runtime's precision (fp32), (n, K).
        answers: token answered when stopping there, (n, K).
        full_answer: the full model's answer, (n,).
        gold: the right answer, (n,), or None where it is not known.
        cost: FLOPs of stopping there, with every check on the way, (n, K).
        full_cost: FLOPs of never stopping, with all K checks, (n,).
        free_cost: FLOPs of stopping there without any check: what an oracle would pay, (n, K).
        plain_cost: FLOPs of the model alone, (n,).

    Raises:
        PolicyError: no rows, no layers, or shapes that do not fit together.
        NumericsError: a confidence that is NaN or infinite.
    """

    layers: tuple[int, ...]
    num_layers: int
    bounds: tuple[float, float]
    confidence: Float[np.ndarray, "rows checks"]
    answers: Int[np.ndarray, "rows checks"]
    full_answer: Int[np.ndarray, " rows"]
    gold: Int[np.ndarray, " rows"] | None
    cost: Float[np.ndarray, "rows checks"]
    full_cost: Float[np.ndarray, " rows"]
    free_cost: Float[np.ndarray, "rows checks"]
    plain_cost: Float[np.ndarray, " rows"]

    def __post_init__(self) -> None:
        n, checks = len(self.full_answer), len(self.layers)
        if not n or not checks:
            raise PolicyError(
                f"{n} rows and {checks} check layers to calibrate on; expected some of both. "
                "Choose a split that has rows, and heads of at least one layer."
            )
        for name, value in self._arrays():
            expected = (n, checks) if name in PER_CHECK else (n,)
            if value.shape != expected:
                raise PolicyError(f"{name} has shape {value.shape}, expected {expected}.")
        broken = np.argwhere(~np.isfinite(self.confidence))
        if len(broken):
            row, check = broken[0]
            raise NumericsError(
                f"The confidence of row {row} at layer {self.layers[check]} is "
                f"{self.confidence[row, check]}. Run lspade-train evaluate to see which layers' "
                "heads give such values, and fit them again."
            )

    def __len__(self) -> int:
        return len(self.full_answer)

    def rows(self, index: NDArray[Any]) -> "ExitTable":
        """The rows at `index` (positions or a mask)."""
        return replace(self, **{name: value[index] for name, value in self._arrays()})

    def exits(self, threshold: Threshold) -> Int[np.ndarray, " rows"]:
        """Position of the first check layer whose confidence is at or under its threshold.

        Returns:
            0..K-1, or K for a row that never stops.
        """
        # As in the runtime, the threshold is rounded to the signal's precision.
        stops = self.confidence <= np.asarray(threshold, dtype=self.confidence.dtype)
        return np.where(stops.any(1), stops.argmax(1), len(self.layers))

    def grid(self, points: int = GRID_POINTS) -> list[float]:
        """Thresholds for all layers, strict to loose, from the bounds alone: no row is looked at.

        From certain to undecided, log-spaced over five decades of that range.
        """
        certain, undecided = self.bounds
        steps = np.concatenate([[0.0], np.geomspace(GRID_FLOOR, 1, points - 1)])
        return (certain + (undecided - certain) * steps).tolist()

    def _arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        names = (*PER_CHECK, *PER_ROW)
        return ((name, getattr(self, name)) for name in names if getattr(self, name) is not None)


@dataclass(frozen=True, kw_only=True)
class PolicyRow:
    """One policy measured on one table.

    Attributes:
        layers: its check layers.
        threshold: one for all check layers, one per check layer, or None: never exit.
        accuracy: of its answers; None without right answers, as is `drop`.
        drop: accuracy of the full model less its own.
        disagreement: fraction of rows it answers unlike the full model.
        mean_exit_layer: rows that never stop count as the model's number of blocks.
        compute_saved: fraction of the plain model's FLOPs; negative where checks cost more.
        efficiency: `compute_saved` over `oracle_saving`; None where the oracle saves nothing.
        p_value: of "its risk is over the budget"; None where nothing was tested.
        accepted: it and all stricter ones of its sequence passed; None where nothing was tested.
    """

    layers: tuple[int, ...]
    threshold: Threshold | None
    accuracy: float | None
    drop: float | None
    disagreement: float
    mean_exit_layer: float
    compute_saved: float
    efficiency: float | None
    p_value: float | None = None
    accepted: bool | None = None


def evaluate_policy(table: ExitTable, threshold: Threshold | None) -> PolicyRow:
    """Measure one policy, for instance on the test split; None is the plain model, unchecked."""
    checks = len(table.layers)
    stops = np.full(len(table), checks) if threshold is None else table.exits(threshold)
    answers = pick(table.answers, table.full_answer, stops)
    cost = table.plain_cost if threshold is None else pick(table.cost, table.full_cost, stops)
    saved, ideal = 1 - cost.sum() / table.plain_cost.sum(), oracle_saving(table)
    accuracy, drop = None, None
    if table.gold is not None:
        accuracy = float((answers == table.gold).mean())
        drop = float((table.full_answer == table.gold).mean()) - accuracy
    return PolicyRow(
        layers=table.layers,
        threshold=threshold,
        accuracy=accuracy,
        drop=drop,
        disagreement=float((answers != table.full_answer).mean()),
        mean_exit_layer=float(np.array([*table.layers, table.num_layers])[stops].mean()),
        compute_saved=float(saved),
        efficiency=float(saved) / ideal if ideal > 0 else None,
    )


def oracle_saving(table: ExitTable) -> float:
    """Compute saved by stopping every row at the first layer that answers like the full model.

    The oracle knows that layer, so it pays for no check. Give a table of all layers for the bound
    that no choice of check layers can beat without changing an answer.

    Returns:
        Fraction of the plain model's FLOPs.
    """
    same = table.answers == table.full_answer[:, None]
    stops = np.where(same.any(1), same.argmax(1), len(table.layers))
    cost = pick(table.free_cost, table.plain_cost, stops)
    return float(1 - cost.sum() / table.plain_cost.sum())


def pick(per_check: NDArray[Any], otherwise: NDArray[Any], stops: NDArray[Any]) -> NDArray[Any]:
    """Each row's value at its exit, `otherwise` (n,) where it never stops (K)."""
    both = np.concatenate([per_check, otherwise[:, None]], axis=1)
    return np.take_along_axis(both, stops[:, None], axis=1)[:, 0]
