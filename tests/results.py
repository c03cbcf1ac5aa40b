"""A toy project that was fitted and evaluated, made once and copied by the tests that write."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import toy

from lspade_train.cli import main


@dataclass(frozen=True)
class Evaluated:
    """A project with heads of both targets, results, figures and a report.

    Attributes:
        project: its recipe is in `home/recipe.yaml`, its heads in `home/checkpoints/toy`.
        root: the model and data that all projects share.
        cards: the model card after `fit` and after `evaluate`.
    """

    project: toy.Project
    root: Path
    cards: dict[str, str]

    @property
    def folder(self) -> Path:
        """The heads folder."""
        return self.project.home / "checkpoints/toy"

    @property
    def results(self) -> dict[str, Any]:
        """`results.json`, read anew."""
        return json.loads((self.folder / "results.json").read_text(encoding="utf-8"))

    def copy(self, home: Path) -> "Evaluated":
        """The same in an empty folder, to write into."""
        shutil.copytree(self.project.home, home, dirs_exist_ok=True)
        project = toy.Project(self.root, home)
        project.recipe()
        return Evaluated(project, self.root, self.cards)


def evaluate_toy(root: Path, home: Path) -> Evaluated:
    """Fit L-SPADE and a tuned lens for two epochs, then evaluate; the process must be in `home`."""
    project, cards = toy.Project(root, home), {}
    made = Evaluated(project, root, cards)
    for command, *more in (["fit"], ["fit", "--model.target=final"], ["evaluate"]):
        assert main([command, "--config", str(project.recipe()), *more]) == 0
        cards[command] = (made.folder / "README.md").read_text(encoding="utf-8")
    return made
