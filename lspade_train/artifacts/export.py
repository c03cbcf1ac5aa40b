"""The Lightning callback that writes the heads folder when a fit ends."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from lspade_train.artifacts.card import write_card
from lspade_train.io.layout import CONFIG, TUNED_LENS, WEIGHTS
from lspade_train.io.provenance import source_state, versions
from lspade_train.io.storage import json_digest
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.recipe import Recipe
from lspade_train.training.callbacks import forget_groups, group_folder
from lspade_train.training.datamodule import HiddenStateDataModule
from lspade_train.training.layerwise import ALL_LAYERS, LayerGroup

FINAL = "/final/"
"""Part of the names of a tuned lens's metrics, if it is fitted together with L-SPADE heads."""


class ExportHeads(Callback):
    """Write the heads folder when fit ends, and upload it to W&B if that is enabled.

    The heads of a group of layers are kept in `training/` until the last group is fitted.

    Args:
        folder: the heads folder.
        recipe: recipe to record in it.
        group: the layers that are fitted.
    """

    def __init__(self, folder: Path, recipe: Recipe, group: LayerGroup = ALL_LAYERS) -> None:
        self.folder = folder
        self.recipe = recipe
        self.group = group
        self.metrics: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self._steps, self._losses = 0, torch.zeros(())  # since the last validation
        self._before, self._began = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time of the fit, including the runs that it resumed."""
        return self._before + time.monotonic() - self._began

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the recipe with the run, so that a dashboard can filter by it."""
        for logger in trainer.loggers:
            logger.log_hyperparams(asdict(self.recipe))

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add up the step's losses on the device, without synchronising."""
        module: Any = pl_module
        self._losses = module.latest + self._losses.to(module.device)
        self._steps += 1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics: a fit stopped after its last epoch exports them when resumed."""
        if trainer.sanity_checking:
            return
        found = sorted(trainer.callback_metrics.items())
        self.metrics = {k: float(v) for k, v in found if k.startswith("val/")}
        epoch = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
        means = {k: v for k, v in self.metrics.items() if k.endswith("/mean")}
        # A fit that was stopped between validation and the end of the epoch validates again.
        again = [one for one in self.history if one["epoch"] == epoch["epoch"]]
        before = self.history[: len(self.history) - len(again)]
        known = again[0] if again else epoch
        self.history = [*before, known | epoch | self._trained(pl_module) | means]

    def _trained(self, module: Any) -> dict[str, float]:
        """`train/loss/mean` of each set of heads over the steps since the last validation."""
        if not self._steps:
            return {}
        prefixes = [prefix for prefix, _, _ in module.fitted()]
        parts = (self._losses / self._steps).chunk(len(prefixes))
        self._steps, self._losses = 0, torch.zeros(())
        pairs = zip(prefixes, parts, strict=True)
        return {f"train/{prefix}loss/mean": float(part.mean()) for prefix, part in pairs}

    def state_dict(self) -> dict[str, Any]:
        """State for the checkpoint."""
        return {
            "metrics": self.metrics,
            "history": self.history,
            "seconds": self.seconds,
            "losses": (self._steps, self._losses.cpu()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from the checkpoint."""
        self.metrics, self.history = dict(state_dict["metrics"]), list(state_dict["history"])
        self._before = state_dict["seconds"]
        self._steps, self._losses = state_dict["losses"]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export on rank 0."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        module: Any = pl_module
        heads: LSpadeHeads = module.heads.beside(module.tuned_lens)
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
        """The heads and metrics of all groups, joined."""
        groups = (LayerGroup(number, self.group.count) for number in range(self.group.count))
        parts = [LSpadeHeads.from_pretrained(group_folder(self.folder, g)) for g in groups]
        for part in parts:
            self.metrics |= part.metadata["training"]["metrics"]
            if part.tuned_lens is not None:
                found = part.tuned_lens.metadata["training"]["metrics"]
                self.metrics |= _as_final(found)
        self.history = _joined_history(parts)
        self._before += sum(part.metadata["training"]["seconds"] for part in parts[:-1])
        for name in {name.rpartition("/")[0] for name in self.metrics}:
            layers = [v for k, v in self.metrics.items() if k.startswith(f"{name}/layer_")]
            self.metrics[f"{name}/mean"] = sum(layers) / len(layers)
        tuned = [part.tuned_lens for part in parts if part.tuned_lens is not None]
        return LSpadeHeads.joined(parts).beside(LSpadeHeads.joined(tuned) if tuned else None)

    def _export(self, trainer: Trainer, heads: LSpadeHeads, folder: Path) -> None:
        data: HiddenStateDataModule = trainer.datamodule  # type: ignore[attr-defined]
        identity = data.identity("train")
        export(
            folder,
            heads,
            base_model=data.base_model,
            recipe=self.recipe,
            data={
                **{k: identity[k] for k in ("dataset", "dataset_revision", "subset", "rows")},
                "answer_prefix": data.answer_prefix("train"),
            },
            cache_digests={
                split: json_digest(data.identity(split)) for split in ("train", "validation")
            },
            steps=trainer.global_step,
            metrics=self.metrics,
            history=self.history,
            seconds=round(self.seconds, 1),
        )


def export(
    folder: Path,
    heads: LSpadeHeads,
    *,
    base_model: dict[str, Any],
    recipe: Recipe,
    data: dict[str, Any],
    cache_digests: dict[str, str],
    steps: int,
    metrics: dict[str, float],
    history: Sequence[dict[str, float]],
    seconds: float,
) -> None:
    """Write a complete heads folder, with a tuned lens beside the heads in a subfolder.

    Args:
        folder: folder to write to; created if missing.
        heads: the trained heads.
        base_model: id, revision and digests of the frozen model.
        recipe: the whole recipe, as run.
        data: the training rows' Hub data set, revision and subset (None for local files), number,
            and the text between prompt and answer.
        cache_digests: identity digest of each split's cache.
        steps: optimiser steps taken.
        metrics: last logged metrics by name; those of a tuned lens are named `.../final/...`.
        history: means over the layers for each epoch, by the same names.
        seconds: wall time, including building a missing cache.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    training = {
        "data": data,
        "caches": cache_digests,
        "steps": steps,
        "seconds": seconds,
        "versions": versions(),
        "source": source_state(),
    }
    tuned = heads.tuned_lens
    if tuned is not None:
        # Recorded as if it had been fitted alone.
        alone = replace(recipe, model=replace(recipe.model, target="final"))
        found = {"metrics": _of_final(metrics), "history": [*map(_of_final, history)]}
        record = training | {"recipe": asdict(alone)} | found
        tuned.metadata = {"base_model": base_model, "training": record}

    def mine(values: Mapping[str, float]) -> dict[str, float]:
        return {k: v for k, v in values.items() if tuned is None or FINAL not in k}

    found = {"metrics": mine(metrics), "history": [*map(mine, history)]}
    record = training | {"recipe": asdict(recipe)} | found
    heads.metadata = {"base_model": base_model, "training": record}
    heads.save_pretrained(folder)
    if tuned is not None:
        write_card(folder / TUNED_LENS)
    write_card(folder)


def _of_final(values: Mapping[str, float]) -> dict[str, float]:
    """The tuned lens's values, under the names they have in a fit of the tuned lens alone."""
    return {k.replace(FINAL, "/", 1): v for k, v in values.items() if FINAL in k or "/" not in k}


def _as_final(values: Mapping[str, float]) -> dict[str, float]:
    """A tuned lens's values, under the names they have beside those of other heads."""
    return {k.replace("/", FINAL, 1) if "/" in k else k: v for k, v in values.items()}


def _joined_history(parts: Sequence[LSpadeHeads]) -> list[dict[str, float]]:
    """Means over the layers of all groups, for each epoch."""
    histories: list[list[dict[str, float]]] = []
    for part in parts:
        epochs = part.metadata["training"]["history"]
        if part.tuned_lens is not None:
            beside = part.tuned_lens.metadata["training"]["history"]
            epochs = [a | _as_final(b) for a, b in zip(epochs, beside, strict=True)]
        histories.append(epochs)
    counts = [len(part.layers) for part in parts]
    joined: list[dict[str, float]] = []
    for epochs in zip(*histories, strict=False):
        means = {
            name: sum(n * one[name] for n, one in zip(counts, epochs, strict=True)) / sum(counts)
            for name in epochs[0]
            if "/" in name
        }
        joined.append({k: v for k, v in epochs[0].items() if "/" not in k} | means)
    return joined


def _log_artifact(logger: Logger, folder: Path, name: str) -> None:
    if type(logger).__name__ != "WandbLogger":
        return
    import wandb

    artifact = wandb.Artifact(f"{name}-heads", type="model")
    for name in (WEIGHTS, CONFIG, f"{TUNED_LENS}/{WEIGHTS}", f"{TUNED_LENS}/{CONFIG}"):
        if (folder / name).is_file():
            artifact.add_file(str(folder / name), name=name)
    logger.experiment.log_artifact(artifact)  # type: ignore[attr-defined]
