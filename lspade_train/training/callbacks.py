"""Lightning callbacks: export at the end of fit, and loggers that work without key or network."""

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lspade_train.errors import ArtifactError
from lspade_train.io.storage import atomic_path
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.recipe import Recipe
from lspade_train.training.layerwise import ALL_LAYERS, LayerGroup

LAST = "last.ckpt"

log = logging.getLogger(__name__)


def group_folder(folder: Path, group: LayerGroup) -> Path:
    """Where a group's checkpoint and heads wait; all layers' checkpoint lies there for itself."""
    training = folder / "training"
    return training if group == ALL_LAYERS else training / f"group-{group.number}"


def finished_groups(folder: Path, recipe: Recipe) -> int:
    """How many groups were fitted by this very recipe, from the first on."""
    wanted = json.loads(json.dumps(asdict(recipe)))
    for number in range(recipe.model.layer_groups):
        place = group_folder(folder, LayerGroup(number, recipe.model.layer_groups))
        try:
            found = LSpadeHeads.from_pretrained(place).metadata["training"]["recipe"]
        except (ArtifactError, KeyError):
            return number
        if found != wanted:
            return number
    return recipe.model.layer_groups


def forget_groups(folder: Path) -> None:
    """Delete what groups of an earlier fit have left."""
    for place in (folder / "training").glob("group-*"):
        shutil.rmtree(place, ignore_errors=True)


class LastCheckpoint(ModelCheckpoint):
    """Keeps `last.ckpt` after every epoch and on SIGTERM, for `fit --ckpt_path last`."""

    def __init__(self, folder: Path) -> None:
        name = Path(LAST).stem
        super().__init__(dirpath=folder, filename=name, enable_version_counter=False)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save on SIGTERM: only that is raised between steps; the rest may cut one in half."""
        if isinstance(exception, SIGTERMException) and not trainer.sanity_checking:
            # Written, not read: with the optimiser, without which a resumed fit is another one.
            trainer.save_checkpoint(Path(str(self.dirpath)) / LAST, weights_only=False)


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that are complete or absent, also where the temporary folder is another disk."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write one in place of the last.

        Raises:
            ArtifactError: the disk is full, or the folder cannot be written.
        """
        with atomic_path(Path(path), ArtifactError) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # torch closes its archive over the failed write, and that fails in its own way.
                raise _failed_write(error) or error from error


def _failed_write(error: BaseException) -> OSError | None:
    """The operating system's error that another one was raised in the wake of."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause
