"""Results as `evaluate` writes them, of a toy project; and what a project without labels gives."""

import json
from pathlib import Path
from typing import Any

from lspade_train.cli import main


def evaluated(project, **changes) -> tuple[Path, dict[str, Any]]:
    """Fit and evaluate in the project's home: the heads folder and its results."""
    recipe = str(project.recipe(trainer__max_epochs=1, trainer__logger=False, **changes))
    assert main(["fit", "--config", recipe]) == 0
    assert main(["evaluate", "--config", recipe]) == 0
    folder = project.home / "checkpoints/toy"
    return folder, json.loads((folder / "results.json").read_text(encoding="utf-8"))
