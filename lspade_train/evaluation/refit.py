"""Short extra fits on cached rows, for ablations. Independent of files."""

from dataclasses import asdict

import torch
from lightning.pytorch import LightningDataModule, Trainer

from lspade_train.cache import StateDataset
from lspade_train.cache.loader import RowLoader
from lspade_train.models import ModelAdapter
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.recipe import HeadConfig, Recipe
from lspade_train.training.module import LSpadeModule


class TrainingRows(LightningDataModule):
    """Cached rows to train on, with what `LSpadeModule` needs of a data module."""

    def __init__(self, dataset: StateDataset, adapter: ModelAdapter, loader: RowLoader) -> None:
        super().__init__()
        self.layers = dataset.layers
        self.unembed, self.hidden_size = adapter.unembed, adapter.hidden_size
        self.loader = loader

    def train_dataloader(self) -> RowLoader:
        """The rows, shuffled."""
        return self.loader

    def val_dataloader(self) -> RowLoader:
        """Required by Lightning, never read: these fits do not validate."""
        return self.loader


def fit_heads(
    recipe: Recipe, config: HeadConfig, dataset: StateDataset, adapter: ModelAdapter, steps: int
) -> LSpadeHeads:
    """Heads trained as in `fit`, for a number of steps, on one device.

    Args:
        recipe: gives batch size, seed, precision and device.
        config: form, target and optimiser of the heads.
        dataset: training rows.
        adapter: the frozen model.
        steps: optimiser steps, the same for any number of rows.

    Returns:
        Heads bound to the model.
    """
    loader = RowLoader(dataset, recipe.data.batch_size, seed=recipe.seed_everything)
    kept = {k: v for k, v in recipe.trainer.items() if k in {"accelerator", "precision"}}
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed_everything)
        module = LSpadeModule(config)
        trainer = Trainer(
            max_steps=steps, max_epochs=-1, devices=1, limit_val_batches=0, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            **kept,
        )  # fmt: skip
        trainer.fit(module, TrainingRows(dataset, adapter, loader))
    assert module.heads is not None
    module.heads.metadata = {"training": {"recipe": {"model": asdict(config)}}}
    return module.heads.requires_grad_(False).eval().bind(adapter)
