"""How many rows a guarantee needs, computed from the data alone, without loading a model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lspade_train import tasks
from lspade_train.errors import PolicyError, TaskError
from lspade_train.policies.calibration import LEAD, RiskKind, check_budget
from lspade_train.policies.power import most_losses, rows_to_prove, smallest_budget
from lspade_train.policies.sides import Side, calibration_side
from lspade_train.tasks.held_out import held_out
from lspade_train.tasks.registry import find_task
from lspade_train.tasks.rows import to_questions

if TYPE_CHECKING:
    from lspade_train.training.datamodule import HiddenStateDataModule

LOSSES = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many rows a budget needs, and what the available data can prove.

    Attributes:
        risk: the risk that the budget limits.
        budget: largest risk allowed, 0..1.
        confidence: probability that the guarantee holds.
        side: the rows that would be tested.
        rows: their number, before prompts over the model's context are dropped.
        needed: losses among the tested rows -> fewest rows that still prove the budget.
        losses: most losses with which `rows` prove the budget; None: not even without losses.
        provable: losses -> smallest budget that `rows` can prove; None: none under 1.
    """

    risk: RiskKind
    budget: float
    confidence: float
    side: Side
    rows: int
    needed: dict[int, int]
    losses: int | None
    provable: dict[int, float | None]


def plan(
    data: "HiddenStateDataModule", risk: RiskKind, budget: float, confidence: float = 0.95
) -> Plan:
    """Count the rows that `calibrate` would test, and the rows that the budget requires.

    Args:
        data: a recipe's data; its model is not loaded.
        risk: as for `learn_then_test`.
        budget: as for `learn_then_test`.
        confidence: as for `learn_then_test`.

    Raises:
        PolicyError: budget or confidence out of range, or a task of running text.
        TaskError: a missing split, or an accuracy budget for rows without labels.
    """
    check_budget(risk, budget, confidence)
    if find_task(data.config.task).to_question is None:
        raise PolicyError(
            "--plan counts questions, and this task's rows are positions in running text. Run "
            "lspade-train calibrate without it: where the rows are too few it says how many it "
            "takes."
        )
    side = calibration_side(data)
    rows = _count(data, side, risk)
    level = (1 - confidence) * LEAD  # level for the most promising signal
    return Plan(
        risk=risk,
        budget=budget,
        confidence=confidence,
        side=side,
        rows=rows,
        needed={losses: rows_to_prove(losses, risk, budget, level) for losses in LOSSES},
        losses=most_losses(risk, budget, rows, level),
        provable={losses: smallest_budget(losses, risk, rows, level) for losses in LOSSES},
    )


def _count(data: "HiddenStateDataModule", side: Side, risk: RiskKind) -> int:
    rows = tasks.load_rows(data.config, side.split)
    questions = to_questions(data.config, rows)
    if risk == "accuracy_drop" and any(question.answer is None for question in questions):
        raise TaskError(
            "--max_accuracy_drop requires labels, but some of these rows have none. "
            "Give --max_disagreement instead: it compares with the full model."
        )
    if side.part == "all":
        return len(questions)
    return held_out(rows.records).count(side.part == "held_out")
