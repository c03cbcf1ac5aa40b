"""Every row's answer and cost at every check layer, and the evaluation of policies on them.

Works on arrays only: independent of models, files and how a threshold is chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from lspade_train.errors import NumericsError, PolicyError
from lspade_train.policies.together import Together

Threshold = float | tuple[float, ...]
GRID_POINTS = 80
GRID_FLOOR = 1e-5


@dataclass(frozen=True, kw_only=True)
class ExitRule:
    """Where a policy checks, and with which thresholds.

    Attributes:
        layers: check layers, ascending, at least one.
        threshold: one for all check layers or one per check layer, in the measure's unit.
    """

    layers: tuple[int, ...]
    threshold: Threshold


@dataclass(frozen=True, kw_only=True)
class ExitCosts:
    """The components of an exit's cost, row by row, to price any set of check layers.

    All in one unit, FLOPs or seconds; K check layers.

    Attributes:
        reach: the model's own work up to each check layer, then to its last block, (n, K+1).
        check: one check at each check layer, (n, K).
        answer: from an exit to its answer, reusing what its check computed; the last column is the
            answer after the last block, (n, K+1).
        unchecked: from an exit without a check to its answer, (n, K).
        plain: the original model, (n,).
        together: extra cost if the rows of a batch exit at different layers; None: a row's cost
            does not depend on the others, as in FLOPs.
    """

    reach: Float[np.ndarray, "rows stages"]
    check: Float[np.ndarray, "rows checks"]
    answer: Float[np.ndarray, "rows stages"]
    unchecked: Float[np.ndarray, "rows checks"]
    plain: Float[np.ndarray, " rows"]
    together: Together | None = None

    def stops(self) -> Float[np.ndarray, "rows stages"]:
        """Cost of exiting at each check layer or never, including all checks on the way.

        Returns:
            (n, K+1); the last column includes all K checks.
        """
        checks = self.check.cumsum(1)
        return self.reach + np.concatenate([checks, checks[:, -1:]], axis=1) + self.answer

    def saved(self, stops: Int[np.ndarray, " rows"]) -> float:
        """Fraction of the original model's cost that is saved by exiting at these places."""
        cost = take(self.stops(), stops).sum()
        if self.together is not None:
            cost += len(stops) * self.together.extra(stops)
        return float(1 - cost / self.plain.sum())

    def without_checks(self) -> Float[np.ndarray, "rows checks"]:
        """Cost of exiting at each check layer without any checks, as an oracle does, (n, K)."""
        return self.reach[:, :-1] + self.unchecked

    def at(self, places: Sequence[int]) -> Self:
        """Only the check layers at these places."""
        columns, stages = list(places), [*places, self.check.shape[1]]
        return replace(
            self,
            reach=self.reach[:, stages],
            check=self.check[:, columns],
            answer=self.answer[:, stages],
            unchecked=self.unchecked[:, columns],
            together=None if self.together is None else self.together.at(places),
        )

    def rows(self, index: NDArray[Any]) -> Self:
        """The rows at `index` (positions or a mask)."""
        arrays = (f.name for f in fields(self) if f.name != "together")
        return replace(self, **{name: getattr(self, name)[index] for name in arrays})

    def without_checks_of(self, rows: Bool[np.ndarray, " rows"]) -> Self:
        """The same costs, except that some rows are never checked."""
        return replace(self, check=np.where(rows[:, None], 0.0, self.check))


@dataclass(frozen=True, kw_only=True)
class ExitTable:
    """Every row's answer and cost for an exit at each check layer.

    Attributes:
        layers: check layers, ascending, K of them.
        num_layers: number of blocks, which is the exit layer of a row that never exits.
        bounds: the measure's value for a certain and for an undecided row, such as (0, ln vocab)
            for an entropy or (1, 0) for a probability. Their order defines which end is certain.
        confidence: the measure at each check layer, in the runtime's precision (fp32), (n, K).
        answers: token answered when exiting there, (n, K).
        full_answer: the full model's answer, (n,).
        gold: the correct answer, (n,), or None if it is not known.
        costs: cost of exits, and of the original model, relative to which savings are measured.
        flops: the same in FLOPs, if `costs` are seconds; None: they are FLOPs.
        stays: rows that never exit at any threshold, (n,); None: there are none.

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
    costs: ExitCosts
    flops: ExitCosts | None = None
    stays: Bool[np.ndarray, " rows"] | None = None

    def __post_init__(self) -> None:
        n, checks = len(self.full_answer), len(self.layers)
        if not n or not checks:
            raise PolicyError(
                f"{n} rows and {checks} check layers to calibrate on; expected some of both. "
                "Choose a split that has rows, and heads of at least one layer."
            )
        expected = {
            **dict.fromkeys(("confidence", "answers", "check", "unchecked"), (n, checks)),
            **dict.fromkeys(("reach", "answer"), (n, checks + 1)),
            **dict.fromkeys(("full_answer", "gold", "plain", "stays"), (n,)),
        }
        arrays = vars(self) | vars(self.costs)
        for name, shape in expected.items():
            if arrays[name] is not None and arrays[name].shape != shape:
                raise PolicyError(f"{name} has shape {arrays[name].shape}, expected {shape}.")
        broken = np.argwhere(~np.isfinite(self.confidence))
        if len(broken):
            row, check = broken[0]
            raise NumericsError(
                f"Non-finite confidence ({self.confidence[row, check]}) for row {row} at layer "
                f"{self.layers[check]}. Run lspade-train evaluate to find the affected heads and "
                "fit them again."
            )

    def __len__(self) -> int:
        return len(self.full_answer)

    @property
    def lower_is_sure(self) -> bool:
        """Whether low values of `confidence` mean certain."""
        return self.bounds[0] < self.bounds[1]

    def rows(self, index: NDArray[Any]) -> Self:
        """The rows at `index` (positions or a mask)."""
        return replace(
            self,
            confidence=self.confidence[index],
            answers=self.answers[index],
            full_answer=self.full_answer[index],
            gold=None if self.gold is None else self.gold[index],
            costs=self.costs.rows(index),
            flops=None if self.flops is None else self.flops.rows(index),
            stays=None if self.stays is None else self.stays[index],
        )

    def held_back(self, rows: Bool[np.ndarray, " rows"]) -> Self:
        """The same table, with these rows, too, answered by the full model, unchecked."""
        stays = rows if self.stays is None else rows | self.stays
        flops = None if self.flops is None else self.flops.without_checks_of(rows)
        return replace(self, stays=stays, costs=self.costs.without_checks_of(rows), flops=flops)

    def at(self, layers: Sequence[int]) -> Self:
        """The same rows with only these check layers, each of them one of `layers`."""
        if tuple(layers) == self.layers:
            return self
        places = [self.layers.index(layer) for layer in layers]
        return replace(
            self,
            layers=tuple(layers),
            confidence=self.confidence[:, places],
            answers=self.answers[:, places],
            costs=self.costs.at(places),
            flops=None if self.flops is None else self.flops.at(places),
        )

    def sure(self, threshold: Threshold) -> Bool[np.ndarray, "rows checks"]:
        """Which checks would let which rows exit."""
        # As in the runtime, the threshold is rounded to the signal's precision.
        limits = np.asarray(threshold, dtype=self.confidence.dtype)
        return self.confidence <= limits if self.lower_is_sure else self.confidence >= limits

    def exits(self, threshold: Threshold) -> Int[np.ndarray, " rows"]:
        """Index of the first check layer whose confidence passes its threshold.

        Returns:
            0..K-1, or K for a row that never exits.
        """
        stops = first_true(self.sure(threshold))
        return stops if self.stays is None else np.where(self.stays, len(self.layers), stops)

    def grid(self, points: int = GRID_POINTS) -> list[float]:
        """Thresholds for all layers, strict to loose, from the bounds alone, not from the rows.

        From certain to undecided, log-spaced over five decades of that range.
        """
        certain, undecided = self.bounds
        steps = np.concatenate([[0.0], np.geomspace(GRID_FLOOR, 1, points - 1)])
        return (certain + (undecided - certain) * steps).tolist()


@dataclass(frozen=True, kw_only=True)
class PolicyRow:
    """One policy measured on one table.

    Attributes:
        layers: its check layers.
        threshold: one for all check layers, one per check layer, or None: never exit.
        accuracy: accuracy of its answers; None without labels, as is `drop`.
        drop: accuracy of the full model minus its own.
        disagreement: fraction of rows where its answer differs from the full model's.
        mean_exit_layer: mean exit layer; rows that never exit count with the number of blocks.
        compute_saved: fraction of the plain model's FLOPs; negative if checks cost more.
        efficiency: `saved` over the oracle's; None if the oracle saves nothing.
        time_saved: fraction of the plain model's seconds; None if the cost is FLOPs.
        name: signal and answer method, in words; "" if there is only one kind of policy.
        p_value: of "its risk is over the budget"; None if nothing was tested.
        accepted: whether it and all stricter ones of its sequence passed; None if not tested.
    """

    layers: tuple[int, ...]
    threshold: Threshold | None
    accuracy: float | None
    drop: float | None
    disagreement: float
    mean_exit_layer: float
    compute_saved: float
    efficiency: float | None
    time_saved: float | None = None
    name: str = ""
    p_value: float | None = None
    accepted: bool | None = None

    @property
    def saved(self) -> float:
        """Fraction saved of the cost used to compare policies: seconds if known, else FLOPs."""
        return self.compute_saved if self.time_saved is None else self.time_saved


def evaluate_policy(
    table: ExitTable, threshold: Threshold | None, *, oracle: float | None = None
) -> PolicyRow:
    """Measure one policy that checks all the table's layers, for instance on the test split.

    Args:
        table: table of its check layers (`ExitTable.at`).
        threshold: threshold in the table's measure; None is the plain model, unchecked.
        oracle: saving that `efficiency` is relative to; None: `oracle_saving` of this table.
    """
    checks = len(table.layers)
    stops = np.full(len(table), checks) if threshold is None else table.exits(threshold)
    answers = pick(table.answers, table.full_answer, stops)
    saved = 0.0 if threshold is None else table.costs.saved(stops)
    flops, time = saved, None
    if table.flops is not None:
        flops, time = 0.0 if threshold is None else table.flops.saved(stops), saved
    ideal = oracle_saving(table) if oracle is None else oracle
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
        compute_saved=flops,
        efficiency=saved / ideal if ideal > 0 else None,
        time_saved=time,
    )


def oracle_saving(table: ExitTable) -> float:
    """Saving if every row exits at the cheapest layer that answers like the full model.

    The oracle knows that layer, so it pays for no check. In FLOPs it is usually the first such
    layer; in seconds, SPADE's continuation from there may cost more than a later answer of a head,
    or than the full model. With a table of all layers this is an upper bound for every choice of
    check layers that changes no answer.

    Returns:
        Fraction of the plain model's cost.
    """
    same = table.answers == table.full_answer[:, None]
    ends = np.where(same, table.costs.without_checks(), np.inf).min(1)
    plain = table.costs.plain
    return float(1 - np.minimum(ends, plain).sum() / plain.sum())


def first_true(flags: Bool[np.ndarray, "rows checks"]) -> Int[np.ndarray, " rows"]:
    """Index of each row's first True; the number of columns if there is none."""
    return np.where(flags.any(1), flags.argmax(1), flags.shape[1])


def pick(per_check: NDArray[Any], otherwise: NDArray[Any], stops: NDArray[Any]) -> NDArray[Any]:
    """Each row's value at its exit; `otherwise` (n,) for rows that never exit (K)."""
    return take(np.concatenate([per_check, otherwise[:, None]], axis=1), stops)


def take(values: NDArray[Any], places: NDArray[Any]) -> NDArray[Any]:
    """Each row's value at its own index, (rows, stages) -> (rows,)."""
    return np.take_along_axis(values, places[:, None], axis=1)[:, 0]
