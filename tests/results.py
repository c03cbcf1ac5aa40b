"""A toy project, fitted and evaluated once and copied by the tests that write to it."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import toy

from lspade_train.cli import main
from lspade_train.io.storage import atomic_path
from lspade_train.reporting.plots import static
from lspade_train.reporting.plots.charts import Figure

DRAW = static.draw
DRAWN: list[bytes] = []


@dataclass(frozen=True)
class Evaluated:
    """A project with heads for both targets, results, figures and a report.

    Attributes:
        project: its recipe is in `home/recipe.yaml`, its heads in `home/checkpoints/toy`.
        root: the model and data that all projects share.
    """

    project: toy.Project
    root: Path

    @property
    def cards(self) -> dict[str, str]:
        """The model cards after `fit` and after `evaluate`."""
        return json.loads((self.project.home / "cards.json").read_text(encoding="utf-8"))

    @property
    def printed(self) -> str:
        """The commands' output, with `evaluate` last."""
        return (self.project.home / "printed.txt").read_text(encoding="utf-8")

    @property
    def folder(self) -> Path:
        """The heads folder."""
        return self.project.home / "checkpoints/toy"

    @property
    def results(self) -> dict[str, Any]:
        """`results.json`, read afresh."""
        return json.loads((self.folder / "results.json").read_text(encoding="utf-8"))

    def copy(self, home: Path) -> "Evaluated":
        """A copy in an empty folder, to write to."""
        shutil.copytree(self.project.home, home, dirs_exist_ok=True)
        project = toy.Project(self.root, home)
        project.recipe()
        return Evaluated(project, self.root)


def draw_again(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Reuse the PNG and SVG of the first figure drawn, under this figure's name."""
    paths = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")
    if not DRAWN:
        DRAW(figure, stem)
        DRAWN.extend(path.read_bytes() for path in paths)
    for path, content in zip(paths, DRAWN, strict=True):
        with atomic_path(path) as unfinished:
            unfinished.write_bytes(content)
    return paths


@contextmanager
def drawing(*names: str) -> Iterator[None]:
    """Draw the figures of these names for real; all of them if none is named."""

    def draw(figure: Figure, stem: Path) -> tuple[Path, Path]:
        return (DRAW if not names or stem.name in names else draw_again)(figure, stem)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static, "draw", draw)
        yield


def evaluate_toy(root: Path, home: Path) -> None:
    """Fit L-SPADE and a tuned lens for two epochs, then evaluate; run it from `home`."""
    project, cards = toy.Project(root, home), {}
    folder = Evaluated(project, root).folder
    printed = StringIO()
    for command, *more in (["fit"], ["fit", "--model.target=final"], ["evaluate"]):
        with drawing(), redirect_stdout(printed):
            assert main([command, "--config", str(project.recipe()), *more]) == 0
        cards[command] = (folder / "README.md").read_text(encoding="utf-8")
    (home / "printed.txt").write_text(printed.getvalue(), encoding="utf-8")
    (home / "cards.json").write_text(json.dumps(cards), encoding="utf-8")
