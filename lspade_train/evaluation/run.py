"""One recipe's whole evaluation: opens model, heads and cache, and gathers `results.json`.

Knows nothing of pictures or terminals.
"""

import logging
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lspade_train import tasks
from lspade_train.cache import StateDataset
from lspade_train.errors import NumericsError, RecipeError
from lspade_train.evaluation.exits import measure_policy, sweep_thresholds
from lspade_train.evaluation.iso_compute import iso_compute
from lspade_train.evaluation.readings import read_lenses
from lspade_train.evaluation.summary import FORMAT_VERSION, plain, summarise
from lspade_train.io.layout import POLICY
from lspade_train.io.provenance import source_state, versions
from lspade_train.policies.cached_exits import exit_table
from lspade_train.policies.policy import ExitPolicy
from lspade_train.policies.sides import Side, evaluation_side
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.lenses import HeadsLens, Lens, LogitLens, SpadeLens
from lspade_train.recipe import Recipe
from lspade_train.tasks import Split
from lspade_train.training.datamodule import HiddenStateDataModule

log = logging.getLogger(__name__)


class Subject:
    """Heads, their model and the data of one recipe, opened for measuring.

    Args:
        recipe: names model, data and layers.
        folder: heads folder.
        split: split to measure, all of it; None takes test, or the half of validation that chooses
            no policy where test has no labels.

    Raises:
        LSpadeError: heads, model, data or split cannot be used; says which and why.
    """

    def __init__(self, recipe: Recipe, folder: Path, split: str | None = None) -> None:
        self.recipe, self.folder = recipe, folder
        self.heads = LSpadeHeads.from_pretrained(folder)
        self.data = HiddenStateDataModule(
            recipe.data, recipe.model.layers, seed=recipe.seed_everything, name=recipe.name
        )
        self.heads.bind(self.data.adapter)
        self.side: Side = evaluation_side(self.data, _known_split(recipe, split))
        self.layers = _common_layers(self.data, self.heads, folder)

    @property
    def split(self) -> Split:
        """The split that is measured."""
        return self.side.split

    def states(self) -> StateDataset:
        """The rows that are measured."""
        return self.side.states(self.data)

    def lenses(self) -> list[Lens]:
        """Those that exist, in the order of tables and figures."""
        found: list[Lens] = [LogitLens(self.data.adapter.unembed)]
        if (tuned := self.tuned_lens()) is not None:
            found.append(HeadsLens(tuned, "tuned_lens"))
        return [*found, HeadsLens(self.heads), SpadeLens()]

    def tuned_lens(self) -> LSpadeHeads | None:
        """Heads fitted with `target: final`, where they are there and have the same layers."""
        folder = self.folder / "tuned_lens"
        if not folder.is_dir():
            return None
        heads = LSpadeHeads.from_pretrained(folder).bind(self.data.adapter)
        if not set(self.layers) <= set(heads.layers):
            log.warning(
                "tuned lens left out: it has layers %s, L-SPADE has %s. Fit it again with "
                "--model.target final.",
                list(heads.layers), self.layers,
            )  # fmt: skip
            return None
        return heads


def evaluate_recipe(subject: Subject) -> dict[str, Any]:
    """Lenses, exits and equal compute of one recipe, as `results.json` holds them.

    Args:
        subject: what is measured.
    """
    heads, adapter = subject.heads, subject.data.adapter
    dataset = subject.states()
    readings = read_lenses(dataset, adapter.unembed, subject.lenses(), subject.layers)
    results = _header(subject) | summarise(readings, adapter.vocab_size)
    results["exits"] = _exits(subject)
    tuned = subject.tuned_lens()
    trained = {"l_spade": heads} | ({} if tuned is None else {"tuned_lens": tuned})
    results["iso_compute"] = iso_compute(results, dataset, adapter, trained)
    return plain(results | {"cross_task": None, "ablations": None})


def _exits(subject: Subject) -> dict[str, Any] | None:
    """The threshold sweep and the saved policy; None for heads that give no finite entropy."""
    heads, adapter = subject.heads, subject.data.adapter
    dataset = subject.states()
    policy = ExitPolicy(layers=tuple(subject.layers), positions=subject.recipe.data.positions)
    try:
        found = sweep_thresholds(exit_table(dataset, adapter, heads, policy))
    except NumericsError as broken:
        log.warning("no exits measured: %s", str(broken).split(". ")[0])
        return None
    saved = subject.folder / POLICY
    found["policy"] = (
        measure_policy(dataset, adapter, heads, ExitPolicy.load(saved), subject.side)
        if saved.exists()
        else None
    )
    return found


def _header(subject: Subject) -> dict[str, Any]:
    """What was measured, and with what."""
    recipe, adapter, heads = subject.recipe, subject.data.adapter, subject.heads
    trained = heads.metadata.get("training", {}).get("recipe", {})
    return {
        "format_version": FORMAT_VERSION,
        "name": recipe.name,
        "model_id": recipe.data.model_id,
        "revision": adapter.revision,
        "num_layers": adapter.num_layers,
        "vocab_size": adapter.vocab_size,
        "dtype": adapter.identity["dtype"],
        "task": recipe.data.task,
        "dataset": recipe.data.dataset,
        "split": subject.split,
        "part": subject.side.part,
        "seed": recipe.seed_everything,
        "heads": {
            "folder": str(subject.folder),
            "form": heads.form,
            "rank": heads.rank if heads.form == "low_rank" else None,
            "layers": list(heads.layers),
            "target": heads.target,
            "trained_on": trained.get("data", {}).get("task"),
            "weights_sha256": heads.digest,
        },
        "recipe": asdict(recipe),
        "provenance": {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "source": source_state(),
            "device": str(adapter.device),
        },
    }


def _known_split(recipe: Recipe, asked: str | None) -> Split | None:
    if asked is None:
        return None
    available = tasks.splits(recipe.data)
    for split in available:
        if split == asked:
            return split
    raise RecipeError(
        f"No split {asked!r} in this data; it has {', '.join(available)}. Set --split."
    )


def _common_layers(data: HiddenStateDataModule, heads: LSpadeHeads, folder: Path) -> list[int]:
    layers = [layer for layer in data.layers if layer in heads.layers]
    if not layers:
        raise RecipeError(
            f"{folder} has heads of layers {list(heads.layers)}, the recipe asks for "
            f"{list(data.layers)}: none in common. Set --model.layers to those of the heads."
        )
    return layers
