"""Heads and thresholds of one task used on another, without retraining.

Independent of files and figures.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lspade_train.cache import StateDataset
from lspade_train.errors import RecipeError
from lspade_train.evaluation.exits import PAPER_THRESHOLDS, measure_exits
from lspade_train.evaluation.readings import read_lenses
from lspade_train.evaluation.run import FittedRecipe
from lspade_train.evaluation.summary import plain, summarise
from lspade_train.policies.cached_exits import exit_table, has_choices
from lspade_train.policies.calibration import learn_then_test
from lspade_train.policies.exit_table import ExitRule, ExitTable, Threshold
from lspade_train.policies.policy import ExitPolicy
from lspade_train.policies.sides import calibration_side
from lspade_train.probes.heads import LSpadeHeads, check_same_model
from lspade_train.probes.lenses import L_SPADE

BUDGET = 0.05
"""Largest disagreement of a threshold on its own task; needs no labels. Our choice."""
PER_LAYER = ("accuracy", "answer_agrees_model", "agrees_spade", "kl_to_spade")

Track = Callable[[Iterable[FittedRecipe]], Iterable[FittedRecipe]]


def cross_task(recipes: Sequence[FittedRecipe], track: Track = iter) -> dict[str, Any]:
    """The matrix of every recipe's heads and threshold on every recipe's task, as JSON.

    A row's threshold (one for all layers, entropy over the vocabulary in nats) is chosen on its
    own task's validation split, or, without a labelled test split, on the half of it that is not
    measured: by Learn then Test, the one that saves most among those whose answers differ from the
    full model's in at most `BUDGET` of the rows.

    Args:
        recipes: tasks of one model, with heads fitted for each.
        track: wraps the rows in a progress bar.

    Raises:
        RecipeError: two recipes have the same name.
        ArtifactError: heads of another model.
        TaskError: a task without a validation split.
    """
    require_one_model(recipes)
    rows: list[dict[str, Any]] = []
    cells: list[list[dict[str, Any] | None]] = []
    tasks: list[dict[str, Any]] = []
    for row in track(recipes):
        threshold = _threshold(row)
        rows.append(_about(row) | {"threshold": threshold, "budget": BUDGET})
        found = [_used_on(row.heads, threshold, column) for column in recipes]
        cells.append([None if pair is None else pair[0] for pair in found])
        own = found[len(tasks)]
        assert own is not None  # FittedRecipe requires a layer in common, and choices
        tasks.append(_about(row) | own[1])
    return plain({"tasks": tasks, "heads": rows, "cells": cells})


def require_one_model(recipes: Sequence[FittedRecipe]) -> None:
    """Refuse what cannot be compared; cheap, so that a command can do it first.

    Raises:
        RecipeError: two recipes have the same name.
        ArtifactError: heads of another model.
    """
    names = [fitted.recipe.name for fitted in recipes]
    if len(set(names)) < len(names):
        raise RecipeError(
            f"Two recipes are named {max(names, key=names.count)!r}; expected one "
            "name each. Set name in one of them, or leave one out of --cross."
        )
    for fitted in recipes:
        made_for = fitted.heads.metadata.get("base_model", {})
        check_same_model(made_for, recipes[0].data.adapter.identity)


def _about(fitted: FittedRecipe) -> dict[str, Any]:
    return {
        "name": fitted.recipe.name,
        "task": fitted.recipe.data.task,
        "folder": str(fitted.folder),
    }


def _threshold(fitted: FittedRecipe) -> Threshold | None:
    rows = calibration_side(fitted.data).independent(fitted.data)
    table = _table(fitted, rows, fitted.heads, fitted.layers)
    rules = [ExitRule(layers=table.layers, threshold=limit) for limit in table.grid()]
    return learn_then_test([(table, rules)], "disagreement", BUDGET).chosen.threshold


def _used_on(
    heads: LSpadeHeads, threshold: Threshold | None, column: FittedRecipe
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The cell, and the full model's results on the column; None if the heads cannot be used.

    That is the case if no layers are shared, or heads fitted over choices meet rows without any.
    """
    heads.bind(column.data.adapter)
    layers = [layer for layer in column.data.layers if layer in heads.layers]
    if not layers:
        return None
    dataset, adapter = column.states(), column.data.adapter
    if heads.scope == "choices" and not has_choices(dataset):
        return None
    readings = read_lenses(dataset, adapter.unembed, {L_SPADE.key: heads}, layers)
    summary = summarise(readings, adapter.vocab_size)
    table = _table(column, dataset, heads, layers)
    policy, *paper = measure_exits(table, [threshold, *PAPER_THRESHOLDS])
    lens = summary["lenses"][L_SPADE.key]
    cell = {
        "layers": layers,
        "exit_layers": [*layers, adapter.num_layers],
        "policy": policy,
        "paper": paper,
        **{name: lens[name] for name in PER_LAYER},
    }
    return cell, {
        "split": column.split,
        "n": summary["n"],
        "full_model": summary["full_model"]["accuracy"],
    }


def _table(
    fitted: FittedRecipe, dataset: StateDataset, heads: LSpadeHeads, layers: Sequence[int]
) -> ExitTable:
    policy = ExitPolicy(
        layers=tuple(layers), scope=heads.scope, positions=fitted.recipe.data.positions
    )
    return exit_table(dataset, fitted.data.adapter, heads, policy)
