"""Lightning callbacks: export at the end of fit, and loggers that work without key or network."""

import importlib.util
import json
import logging
import netrc
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lspade_train.artifact import export
from lspade_train.data import HiddenStateDataModule
from lspade_train.errors import ArtifactError
from lspade_train.heads import CONFIG, WEIGHTS, LSpadeHeads
from lspade_train.layerwise import ALL_LAYERS, LayerGroup
from lspade_train.recipe import Recipe
from lspade_train.storage import atomic_path, json_digest

LAST = "last.ckpt"

log = logging.getLogger(__name__)


class ExportHeads(Callback):
    """Write the heads folder when fit ends, and hand it to W&B where that is on.

    The heads of a group of layers wait in `training/` for the last group.

    Args:
        folder: the heads folder.
        recipe: recorded in it.
        group: the layers that are fitted.
    """

    def __init__(self, folder: Path, recipe: Recipe, group: LayerGroup = ALL_LAYERS) -> None:
        self.folder = folder
        self.recipe = recipe
        self.group = group
        self.metrics: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the recipe with the run, so that a dashboard can filter by it."""
        for logger in trainer.loggers:
            logger.log_hyperparams(asdict(self.recipe))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics: a fit that is stopped after its last epoch exports when it goes on."""
        if not trainer.sanity_checking:
            found = sorted(trainer.callback_metrics.items())
            self.metrics = {k: float(v) for k, v in found if k.startswith("val/")}

    def state_dict(self) -> dict[str, Any]:
        """Goes into the checkpoint."""
        return self.metrics

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Comes from the checkpoint."""
        self.metrics = dict(state_dict)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export on the first process."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        heads: Any = pl_module.heads
        if self.group != ALL_LAYERS:
            self._export(trainer, heads, group_folder(self.folder, self.group))
            if not self.group.is_last:
                return
            heads = self._join()
        self._export(trainer, heads, self.folder)
        forget_groups(self.folder)
        for logger in trainer.loggers:
            _log_artifact(logger, self.folder, self.recipe.name)

    def _join(self) -> LSpadeHeads:
        """The heads of all groups, and their metrics together."""
        groups = (LayerGroup(number, self.group.count) for number in range(self.group.count))
        parts = [LSpadeHeads.from_pretrained(group_folder(self.folder, g)) for g in groups]
        for part in parts:
            self.metrics |= part.metadata["training"]["metrics"]
        for name in {name.rpartition("/")[0] for name in self.metrics}:
            layers = [v for k, v in self.metrics.items() if k.startswith(f"{name}/layer_")]
            self.metrics[f"{name}/mean"] = sum(layers) / len(layers)
        return LSpadeHeads.joined(parts)

    def _export(self, trainer: Trainer, heads: LSpadeHeads, folder: Path) -> None:
        data: HiddenStateDataModule = trainer.datamodule  # type: ignore[attr-defined]
        identity = data.identity("train")
        export(
            folder,
            heads,
            base_model=data.base_model,
            recipe=self.recipe,
            data={key: identity[key] for key in ("dataset", "dataset_revision", "subset", "rows")},
            cache_digests={
                split: json_digest(data.identity(split)) for split in ("train", "validation")
            },
            steps=trainer.global_step,
            metrics=self.metrics,
        )


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


def default_loggers(folder: Path, name: str) -> list[Logger]:
    """CSV always; W&B too where it is installed and a key, a login or WANDB_MODE is there."""
    loggers: list[Logger] = [CSVLogger(folder, name="logs")]
    if wandb_is_on():
        from lightning.pytorch.loggers import WandbLogger

        loggers.append(WandbLogger(project="lspade-train", name=name, save_dir=folder))
    return loggers


def keep_wandb_from_asking() -> None:
    """Without a key and without WANDB_MODE, a W&B logger writes offline instead of asking."""
    if not os.environ.get("WANDB_MODE") and not _has_wandb_key():
        os.environ["WANDB_MODE"] = "offline"
        log.warning("W&B: no key found, writing offline; send it later with `wandb sync`.")


def wandb_is_on() -> bool:
    """Whether W&B is installed and a key, a login or WANDB_MODE is there; asks nobody."""
    mode = os.environ.get("WANDB_MODE")
    wanted = mode != "disabled" and (bool(mode) or _has_wandb_key())
    return wanted and importlib.util.find_spec("wandb") is not None


def _has_wandb_key() -> bool:
    """A key in the environment, or a login of `wandb login`; asks nobody."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def _log_artifact(logger: Logger, folder: Path, name: str) -> None:
    if type(logger).__name__ != "WandbLogger":
        return
    import wandb

    artifact = wandb.Artifact(f"{name}-heads", type="model")
    for file in (WEIGHTS, CONFIG):
        artifact.add_file(str(folder / file))
    logger.experiment.log_artifact(artifact)  # type: ignore[attr-defined]


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
            torch.save(checkpoint, file)
