"""Other early-exit rules on the same rows, as baselines for a policy.

Each has at most one setting, which is chosen to save most on the calibration rows with a measured
risk within the budget. There is no test and no guarantee, as in the papers that propose them.
Independent of files and terminals.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.optimize import minimize

from lspade_train.cache import StateDataset
from lspade_train.evaluation.verdict import ROUNDING
from lspade_train.models import ModelAdapter
from lspade_train.policies.cached_exits import CachedExits, read_exits
from lspade_train.policies.exit_table import ExitTable, PolicyRow, evaluate_policy, oracle_saving
from lspade_train.policies.policy import Decoder, ExitPolicy, Reader, Scope
from lspade_train.policies.readers import available
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.measures import FIXED

PENALTY = 1e-3
"""L2 penalty on the weights of the probe and the support vector machine, per row."""


@dataclass(frozen=True)
class Baseline:
    """One rule on three sets of rows.

    Attributes:
        name: name in words.
        source: where it comes from.
        tables: tables of the calibration rows and the measured ones, by the value of its setting.
    """

    name: str
    source: str
    tables: Mapping[str, tuple[ExitTable, ExitTable, float]]


def measure_baselines(
    proposing: StateDataset,
    calibrating: StateDataset,
    measured: StateDataset,
    adapter: ModelAdapter,
    heads: LSpadeHeads,
    *,
    layers: Sequence[int],
    scope: Scope,
    budget: float,
    risk: str = "accuracy_drop",
) -> list[dict[str, Any]]:
    """Every baseline on the measured rows, as JSON.

    Args:
        proposing: training rows that the learned baselines are fitted on.
        calibrating: rows that choose each baseline's setting.
        measured: rows that they are measured on.
        adapter: the frozen model.
        heads: bound heads; a tuned lens beside them is used, too.
        layers: layers where a rule may exit, ascending.
        scope: tokens to compute logits for: the vocabulary, or each row's choices.
        budget: largest risk.
        risk: `accuracy_drop` or `disagreement`; without labels always the latter.
    """
    readers = available(heads)
    words: tuple[Decoder, ...] = ("spade", *cast(list[Decoder], [*readers]))
    rows = [
        read_exits(part, adapter, readers, words, layers=layers, scope=scope)
        for part in (proposing, calibrating, measured)
    ]
    own = [name for name in readers if name != "logit_lens"]
    found = [
        _fixed(rows, [word for word in words if word != "logit_lens"]),
        *([_probe(rows)] if scope == "choices" else []),
        *([_paper(rows)] if "l-spade" in readers else []),
        _patience(rows, own),
        _adainfer(rows),
    ]
    ideal = max(oracle_saving(_table(rows[2], word, FIXED)) for word in words)
    return [_measured(one, budget, risk, ideal) for one in found if one.tables]


def _measured(baseline: Baseline, budget: float, risk: str, ideal: float) -> dict[str, Any]:
    """The baseline on the measured rows, with its setting chosen on the calibration rows.

    If no setting is within the budget, that of least risk is used and `within_budget` is false.
    """

    def key(setting: str) -> tuple[bool, float]:
        table, _, threshold = baseline.tables[setting]
        row = evaluate_policy(table, threshold, oracle=ideal)
        by_accuracy = risk == "accuracy_drop" and row.drop is not None
        lost = cast(float, row.drop) if by_accuracy else row.disagreement
        return (True, row.compute_saved) if lost <= budget + ROUNDING else (False, -lost)

    setting = max(baseline.tables, key=key)
    _, table, threshold = baseline.tables[setting]
    return {
        "name": baseline.name,
        "source": baseline.source,
        "setting": setting,
        "within_budget": key(setting)[0],
        "row": _plain(evaluate_policy(table, threshold, oracle=ideal)),
    }


def _plain(row: PolicyRow) -> dict[str, Any]:
    kept = ("accuracy", "drop", "disagreement", "mean_exit_layer", "compute_saved", "efficiency")
    found = asdict(row)
    return {name: found[name] for name in kept}


def _table(
    rows: CachedExits, decoder: Decoder, measure: str, reader: str | None = None
) -> ExitTable:
    policy = ExitPolicy(
        layers=rows.layers,
        measure=measure,
        scope=rows.scope,
        decoder=decoder,
        reader=cast(Reader | None, reader),
    )
    return rows.table(policy, () if reader is None else (reader,))


def _signalled(
    rows: CachedExits, reader: str, signal: Float[NDArray[Any], "rows checks"]
) -> ExitTable:
    """The table of a signal that is low for confident rows; one reader computes and answers."""
    table = _table(rows, cast(Decoder, reader), "entropy", reader)
    inside = float(np.abs(signal).max()) + 1
    return replace(table, confidence=signal.astype(np.float32), bounds=(-inside, inside))


def _fixed(rows: Sequence[CachedExits], words: Iterable[Decoder]) -> Baseline:
    """Exit with every row at one layer."""
    tables = {
        f"layer {layer}, {word}": (*(table.at([layer]) for table in both), 0.0)
        for word in words
        for both in [[_table(part, word, FIXED) for part in rows[1:]]]
        for layer in rows[0].layers
    }
    return Baseline("fixed layer", "always leave at one layer", cast(Any, tables))


def _paper(rows: Sequence[CachedExits]) -> Baseline:
    """One entropy threshold for the L-SPADE heads at every layer; SPADE answers."""
    calibrating, measured = (_table(part, "spade", "entropy", "l-spade") for part in rows[1:])
    tables = {
        f"{threshold:.3g} nats": (calibrating, measured, threshold)
        for threshold in calibrating.grid()
    }
    return Baseline("one entropy threshold", "the paper's rule, arXiv:2507.17618", tables)


def _patience(rows: Sequence[CachedExits], readers: Sequence[str]) -> Baseline:
    """Exit once a head has given the same answer at a number of checks in a row."""
    tables = {
        f"{count} checks of the {reader} heads": (
            *(
                _signalled(part, reader, -_streak(part.answers[cast(Decoder, reader)]))
                for part in rows[1:]
            ),
            float(-count),
        )
        for reader in readers
        for count in range(2, len(rows[0].layers) + 1)
    }
    return Baseline("patience", "PABEE, arXiv:2006.04152", cast(Any, tables))


def _streak(answers: Int[torch.Tensor, "rows checks"]) -> Int[NDArray[Any], "rows checks"]:
    """For each check, the number of consecutive checks up to it with the same answer."""
    seen = answers.numpy()
    found = np.ones(seen.shape, dtype=np.int64)
    for place in range(1, seen.shape[1]):
        same = seen[:, place] == seen[:, place - 1]
        found[:, place] = np.where(same, found[:, place - 1] + 1, 1)
    return found


def _adainfer(rows: Sequence[CachedExits]) -> Baseline:
    """A support vector machine over the logit lens's top probability and gap at every layer."""
    wrong = (rows[0].answers["logit_lens"] != rows[0].full_answer[:, None]).numpy()
    machines = [
        support_vectors(_top_and_gap(rows[0], place), wrong[:, place])
        for place in range(wrong.shape[1])
    ]

    def table(part: CachedExits) -> ExitTable:
        columns = [machine(_top_and_gap(part, k)) for k, machine in enumerate(machines)]
        return _signalled(part, "logit_lens", np.stack(columns, axis=1))

    tables = {"": (table(rows[1]), table(rows[2]), 0.0)}
    return Baseline("SVM over statistics", "AdaInfer, arXiv:2403.02181", tables)


def _top_and_gap(rows: CachedExits, place: int) -> NDArray[np.float64]:
    """Largest probability, and its gap to the second largest, (rows, 2)."""
    return rows.readings["logit_lens"][place].statistics[:, 1:3].double().numpy()


def support_vectors(
    inputs: Float[NDArray[Any], "rows columns"], wrong: Bool[NDArray[Any], " rows"]
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """A linear support vector machine (squared hinge), positive if it predicts wrong.

    Args:
        inputs: inputs; standardised internally.
        wrong: the positive class.
    """
    mean, scale = inputs.mean(0), inputs.std(0) + 1e-12
    side = np.where(wrong, 1.0, -1.0)
    columns = np.c_[(inputs - mean) / scale, np.ones(len(inputs))]

    def loss(weight: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        short = np.maximum(0, 1 - side * (columns @ weight))
        ridge = PENALTY * np.r_[weight[:-1], 0.0]
        value = (short**2).mean() + ridge @ weight / 2
        return float(value), ridge - 2 * columns.T @ (side * short) / len(side)

    weight = minimize(loss, np.zeros(columns.shape[1]), jac=True, method="L-BFGS-B").x
    return lambda seen: np.c_[(seen - mean) / scale, np.ones(len(seen))] @ weight


def _probe(rows: Sequence[CachedExits]) -> Baseline:
    """A linear classifier on one layer's state, fitted to the full model's answers."""
    labels = rows[0].full_answer.unique()
    tables: dict[str, tuple[ExitTable, ExitTable, float]] = {}
    for place, layer in enumerate(rows[0].layers):
        answer = linear_probe(rows[0].hidden(layer), rows[0].full_answer, labels)
        parts: list[ExitTable] = []
        for part in rows[1:]:
            table = _table(part, "spade", FIXED).at([layer])
            states = part.hidden(layer)
            costs = table.costs
            own = np.full(len(part), 2.0 * states.shape[1] * len(labels))
            replaced = np.c_[own, costs.answer[:, -1]]
            parts.append(
                replace(
                    table,
                    answers=answer(states).numpy()[:, None],
                    costs=replace(costs, answer=replaced, unchecked=own[:, None]),
                )
            )
        tables[f"layer {rows[0].layers[place]}"] = (parts[0], parts[1], 0.0)
    return Baseline("linear probe", "a classifier of one layer's state", tables)


def linear_probe(
    states: Float[torch.Tensor, "rows d"],
    answers: Int[torch.Tensor, " rows"],
    labels: Int[torch.Tensor, " labels"],
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Multinomial regression of the answers on the standardised states.

    Args:
        states: states of one layer.
        answers: answers, each one of `labels`.
        labels: tokens.

    Returns:
        A function from states to the most likely labels.
    """
    mean, scale = states.mean(0), states.std(0).clamp(min=1e-6)
    inputs = (states - mean) / scale
    target = (answers[:, None] == labels).long().argmax(1)
    weight = torch.zeros(len(labels), inputs.shape[1], requires_grad=True)
    bias = torch.zeros(len(labels), requires_grad=True)
    steps = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        steps.zero_grad()
        value = torch.nn.functional.cross_entropy(inputs @ weight.T + bias, target)
        value = value + PENALTY * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        steps.step(cast(Any, loss))
    fitted, shift = weight.detach(), bias.detach()
    return lambda seen: labels[((seen - mean) / scale @ fitted.T + shift).argmax(1)]
