"""Heads and thresholds of one task used on another, without retraining.

Knows nothing of files or pictures.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lspade_train.cache import StateDataset
from lspade_train.errors import RecipeError
from lspade_train.evaluation.exits import PAPER_THRESHOLDS, measure_exits
from lspade_train.evaluation.readings import read_lenses
from lspade_train.evaluation.run import Subject
from lspade_train.evaluation.summary import plain, summarise
from lspade_train.policies.cached_exits import exit_table
from lspade_train.policies.calibration import learn_then_test
from lspade_train.policies.exit_table import ExitRule, ExitTable, Threshold
from lspade_train.policies.policy import ExitPolicy
from lspade_train.policies.sides import calibration_side
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.lenses import HeadsLens

BUDGET = 0.05
"""Disagreement that a threshold may cost on its own task. Ours; it needs no labels."""
PER_LAYER = ("accuracy", "answer_agrees_model", "agrees_spade", "kl_to_spade")

Track = Callable[[Iterable[Subject]], Iterable[Subject]]


def cross_task(subjects: Sequence[Subject], track: Track = iter) -> dict[str, Any]:
    """The matrix of every subject's heads and threshold on every subject's task, as JSON.

    A row's threshold (one for all layers, entropy over the vocabulary in nats) is chosen on its
    own task's validation split, or on the half of it that is not measured where there is no
    labelled test split: the one that saves most of those whose answers differ from the full
    model's in at most `BUDGET` of the rows, by Learn then Test.

    Args:
        subjects: tasks of one model, heads fitted for each.
        track: wraps the rows in a progress bar.

    Raises:
        RecipeError: two subjects of one name.
        ArtifactError: heads of another model.
        TaskError: a task without a validation split.
    """
    names = [subject.recipe.name for subject in subjects]
    if len(set(names)) < len(names):
        raise RecipeError(
            f"Two recipes are named {max(names, key=names.count)!r}; expected one name each. "
            "Set name in one of them, or leave it out of --cross."
        )
    rows: list[dict[str, Any]] = []
    cells: list[list[dict[str, Any] | None]] = []
    tasks: list[dict[str, Any]] = []
    for row in track(subjects):
        threshold = _threshold(row)
        rows.append(_about(row) | {"threshold": threshold, "budget": BUDGET})
        found = [_used_on(row.heads, threshold, column) for column in subjects]
        cells.append([None if pair is None else pair[0] for pair in found])
        own = found[len(tasks)]
        assert own is not None  # a subject's heads and data have layers in common
        tasks.append(_about(row) | own[1])
    return plain({"tasks": tasks, "heads": rows, "cells": cells})


def _about(subject: Subject) -> dict[str, Any]:
    return {
        "name": subject.recipe.name,
        "task": subject.recipe.data.task,
        "folder": str(subject.folder),
    }


def _threshold(subject: Subject) -> Threshold | None:
    rows = calibration_side(subject.data).states(subject.data)
    table = _table(subject, rows, subject.heads, subject.layers)
    rules = [ExitRule(layers=table.layers, threshold=limit) for limit in table.grid()]
    return learn_then_test([(table, rules)], "disagreement", BUDGET).chosen.threshold


def _used_on(
    heads: LSpadeHeads, threshold: Threshold | None, column: Subject
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The cell, and what the column's full model does; None without a layer in common."""
    heads.bind(column.data.adapter)
    layers = [layer for layer in column.data.layers if layer in heads.layers]
    if not layers:
        return None
    dataset, adapter = column.states(), column.data.adapter
    readings = read_lenses(dataset, adapter.unembed, [HeadsLens(heads)], layers)
    summary = summarise(readings, adapter.vocab_size)
    table = _table(column, dataset, heads, layers)
    policy, *paper = measure_exits(table, [threshold, *PAPER_THRESHOLDS])
    lens = summary["lenses"]["l_spade"]
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
    subject: Subject, dataset: StateDataset, heads: LSpadeHeads, layers: Sequence[int]
) -> ExitTable:
    policy = ExitPolicy(layers=tuple(layers), positions=subject.recipe.data.positions)
    return exit_table(dataset, subject.data.adapter, heads, policy)
