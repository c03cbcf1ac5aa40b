"""Fits heads on a model by its recipe, and measures policies and the own head on test rows."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch.nn.functional import kl_div

from lspade_train.artifacts.export import ExportHeads
from lspade_train.cache.answers import chunks
from lspade_train.evaluation.chance import cached_accuracy
from lspade_train.evaluation.exits import measure_policy
from lspade_train.evaluation.readings import read_lenses
from lspade_train.evaluation.run import FittedRecipe
from lspade_train.evaluation.summary import summarise
from lspade_train.policies.selection import calibrate
from lspade_train.policies.sides import evaluation_side
from lspade_train.recipe import Recipe
from lspade_train.training.datamodule import HiddenStateDataModule
from lspade_train.training.module import LSpadeModule

POLICIES: dict[str, dict[str, Any]] = {
    "own_head": {"measure": "entropy", "reader": "logit_lens", "decoder": "logit_lens"},
    "own_answer": {"decoder": "logit_lens"},
    "anything": {},
}
"""Options of `calibrate`: the model's own head alone, its answers with any signal, or a search."""

PER_POLICY = ("accuracy", "drop", "drop_interval", "mean_exit_layer", "compute_saved")


def open_data(recipe: Recipe) -> HiddenStateDataModule:
    """The states of a recipe's model."""
    return HiddenStateDataModule(
        recipe.data, recipe.model.layers, seed=recipe.seed_everything, name=recipe.name
    )


def epochs_of(recipe: Recipe) -> int:
    """Epochs of a recipe's fit; without a setting, Lightning's default."""
    return int(recipe.trainer.get("max_epochs") or 1000)


def fit(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Fit heads, building missing caches; returns the CPU seconds."""
    began = time.process_time()
    seed_everything(recipe.seed_everything, verbose=False)
    quiet: dict[str, Any] = {
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "log_every_n_steps": 1_000_000,
        "check_val_every_n_epoch": epochs_of(recipe),  # it changes nothing
    }  # fmt: skip
    trainer = Trainer(**(recipe.trainer | quiet), callbacks=[ExportHeads(folder, recipe)])
    trainer.fit(LSpadeModule(recipe.model), open_data(recipe))
    return {"cpu_seconds": round(time.process_time() - began, 1)}


def measure(
    recipe: Recipe, folder: Path, original: HiddenStateDataModule, budget: float
) -> dict[str, Any]:
    """Accuracy at the last layer, KL to the original, the own head by layer, and the policies.

    Args:
        recipe: recipe of the model to measure.
        folder: its heads.
        original: states of the original model on the same rows.
        budget: accuracy that a policy may lose.
    """
    fitted = FittedRecipe(recipe, folder)
    states, data = fitted.states(), fitted.data
    readings = read_lenses(states, data.unembed, {"logit_lens": None}, fitted.layers)
    lens = summarise(readings, data.adapter.vocab_size)["lenses"]["logit_lens"]
    accuracy = cached_accuracy(states, data.unembed)
    return {
        "accuracy": None if accuracy is None else accuracy.accuracy,
        "kl": kl(original, data),
        "layers": list(fitted.layers),
        "own_head_agreement": [round(x, 4) for x in lens["answer_agrees_model"]],
        "own_head_kl": [round(x, 4) for x in lens["kl_to_model"]],
    } | {name: policy(fitted, budget, options) for name, options in POLICIES.items()}


@torch.no_grad()
def kl(original: HiddenStateDataModule, other: HiddenStateDataModule) -> float:
    """Mean KL(original || other) of the final answers on test rows, in nats."""
    sides = [(data, evaluation_side(data).states(data)) for data in (original, other)]
    total = 0.0
    for batches in zip(*(chunks(states, 64) for _, states in sides), strict=True):
        p, q = (
            data.unembed(batch.final.to(data.unembed.weight)).double().log_softmax(-1)
            for (data, _), batch in zip(sides, batches, strict=True)
        )
        total += float(kl_div(q, p, log_target=True, reduction="sum"))
    return total / len(sides[0][1])


def policy(fitted: FittedRecipe, budget: float, options: dict[str, Any]) -> dict[str, Any]:
    """A policy chosen on validation rows, measured on test rows."""
    seed = fitted.recipe.seed_everything
    found = calibrate(fitted.data, fitted.heads, max_accuracy_drop=budget, seed=seed, **options)
    found.policy.save(fitted.folder)  # the last one stays, for other commands
    if found.policy.threshold is None:
        return {"name": "never exit", "layers": [], "compute_saved": 0.0, "drop": 0.0}
    measured, _ = measure_policy(
        fitted.states(), fitted.data.adapter, fitted.heads, found.policy, fitted.side
    )
    kept = {key: (measured["row"] or {}).get(key) for key in PER_POLICY}
    return {"name": found.calibration.chosen.name, "layers": list(found.policy.layers)} | kept
