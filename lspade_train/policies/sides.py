"""Which rows choose a policy and which evaluate it, disjoint whenever possible.

If the data has a labelled test split, all of validation chooses. Otherwise (BoolQ) a hash of each
row's content halves validation (`tasks/held_out.py`): one half chooses, the held-out half
evaluates.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from lspade_train import tasks
from lspade_train.cache import StateDataset
from lspade_train.errors import PolicyError
from lspade_train.policies.policy import ExitPolicy
from lspade_train.tasks import Split

if TYPE_CHECKING:
    from lspade_train.training.datamodule import HiddenStateDataModule

Part = Literal["all", "calibration", "held_out"]


@dataclass(frozen=True, kw_only=True)
class Side:
    """Some rows of a task's data, in a form that files can record.

    Attributes:
        task: the recipe's task.
        dataset: the recipe's data set.
        split: train, validation or test.
        part: part of the split: all of it, or one half of a shared validation split.
    """

    task: str
    dataset: str | None
    split: Split
    part: Part

    @property
    def words(self) -> str:
        """Description such as `validation` or `validation, held-out half`."""
        if self.part == "all":
            return self.split
        return f"{self.split}, {self.part.replace('_', '-')} half"

    def states(self, data: "HiddenStateDataModule") -> StateDataset:
        """Its cached rows.

        Raises:
            PolicyError: this side has no rows of the split.
        """
        found = data.stored(self.split)
        if self.part == "all":
            return found
        rows = self._rows(data)
        if not len(rows):
            raise PolicyError(
                f"The {self.part} half of the {self.split} split is empty ({len(found)} rows). "
                "Raise --data.limit, or set --data.dataset to data with a labelled test split."
            )
        return found.select(rows)

    def independent(self, data: "HiddenStateDataModule") -> StateDataset:
        """`states` for a test that assumes independent rows: one position, at random, of each text.

        Of running text, that is; rows of other tasks are a prompt each.
        """
        found = self.states(data)
        if data.config.task != "text":
            return found
        examples = data.encoded(self.split).examples
        owner = torch.tensor([n for n, example in enumerate(examples) for _ in example.positions])
        if self.part != "all":
            owner = owner[self._rows(data)]
        order = torch.randperm(len(owner), generator=torch.Generator().manual_seed(data.seed))
        _, first = np.unique(owner[order].numpy(), return_index=True)
        return found.select(order[torch.from_numpy(first)].sort().values)

    def prompts(self, data: "HiddenStateDataModule", rows: Sequence[int]) -> list[list[int]]:
        """Token ids, up to the answer, of some of the rows of `states`."""
        examples = data.encoded(self.split).examples
        places = [(example, int(at)) for example in examples for at in example.positions]
        if self.part != "all":
            places = [places[row] for row in self._rows(data).tolist()]
        chosen = (places[row] for row in rows)
        return [example.input_ids[: at + 1].tolist() for example, at in chosen]

    def _rows(self, data: "HiddenStateDataModule") -> Tensor:
        held_out = data.held_out(self.split)
        return (held_out if self.part == "held_out" else ~held_out).nonzero()[:, 0]

    def to_json(self) -> dict[str, Any]:
        """The form that is written to files."""
        return asdict(self)


def calibration_side(data: "HiddenStateDataModule") -> Side:
    """The validation rows that may choose a policy."""
    return _side(data, "validation", "calibration" if _is_shared(data) else "all")


def evaluation_side(data: "HiddenStateDataModule", split: Split | None = None) -> Side:
    """The rows to report on; a split that is requested by name is used as a whole.

    Args:
        data: a recipe's data.
        split: None means test, or the held-out half of validation if test has no labels.
    """
    if split is not None:
        return _side(data, split, "all")
    shared = _is_shared(data)
    return _side(data, "validation" if shared else "test", "held_out" if shared else "all")


def chose(policy: ExitPolicy, side: Side) -> bool:
    """Whether some of these rows chose that policy, which biases its figures on them.

    A policy without a calibration was set by hand, so no rows chose it.
    """
    if not policy.calibration:
        return False
    known = policy.calibration.get("rows")
    if known is None:  # older calibrations do not record them: all of validation
        return side.split != "test"
    if (known["task"], known["dataset"]) != (side.task, side.dataset):
        return False
    if side.split == "train":  # training rows proposed the policy
        return True
    return side.split == known["split"] and {side.part, known["part"]} != {
        "calibration",
        "held_out",
    }


def _side(data: "HiddenStateDataModule", split: Split, part: Part) -> Side:
    return Side(task=data.config.task, dataset=data.config.dataset, split=split, part=part)


def _is_shared(data: "HiddenStateDataModule") -> bool:
    """Whether results are also reported on validation."""
    return tasks.evaluation_split(data.config) == "validation"
