"""Checkpoints of a fit and of its groups of layers: complete or absent, one per group."""

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lspade_train.errors import ArtifactError
from lspade_train.io.storage import atomic_file
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.recipe import Recipe
from lspade_train.training.layerwise import ALL_LAYERS, LayerGroup

LAST = "last.ckpt"
LOG_EVERY = 10
"""Log training metrics every this many steps, or once per epoch if that is shorter."""

log = logging.getLogger(__name__)


def group_folder(folder: Path, group: LayerGroup) -> Path:
    """Where a group's checkpoint and heads are kept until all groups are fitted."""
    training = folder / "training"
    return training if group == ALL_LAYERS else training / f"group-{group.number}"


def finished_groups(folder: Path, recipe: Recipe) -> int:
    """How many of the first groups were already fitted by exactly this recipe."""
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
    """Delete the files of groups that an earlier fit left behind."""
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
        """Save on SIGTERM, which is raised between steps; other exceptions may interrupt one."""
        if isinstance(exception, SIGTERMException) and not trainer.sanity_checking:
            # Include the optimiser's state: a resumed fit would differ without it.
            trainer.save_checkpoint(Path(str(self.dirpath)) / LAST, weights_only=False)


class LogEachEpoch(Callback):
    """Log training metrics at least once per epoch, even if it is shorter than the interval."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the interval before Lightning compares it with the number of batches and warns."""
        if stage == "fit":
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            batches = max(len(data.train_dataloader()), 1)
            trainer.log_every_n_steps = min(LOG_EVERY, batches)  # type: ignore[attr-defined]


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that are complete or absent, even where TMPDIR is on another disk."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, replacing the last one only once it is complete.

        Raises:
            ArtifactError: the disk is full, or the folder cannot be written.
        """
        with atomic_file(Path(path), ArtifactError) as file:
            try:
                torch.save(checkpoint, cast(BinaryIO, file))
            except RuntimeError as error:
                # After a failed write torch still closes its archive, which raises another error.
                raise _failed_write(error) or error from error


def _failed_write(error: BaseException) -> OSError | None:
    """The operating system's error in the chain of exceptions that led to `error`."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause
