"""The complete evaluation of a recipe: opens model, heads and cache, and collects `results.json`.

Independent of figures and terminals.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from lspade_train import tasks
from lspade_train.cache import StateDataset
from lspade_train.errors import NumericsError, RecipeError
from lspade_train.evaluation.baselines import measure_baselines
from lspade_train.evaluation.examples import SHOWN, worst_disagreements
from lspade_train.evaluation.exits import measure_policy, sweep_thresholds, swept_table
from lspade_train.evaluation.iso_compute import iso_compute
from lspade_train.evaluation.readings import Readings, read_lenses
from lspade_train.evaluation.reliability import reliability
from lspade_train.evaluation.summary import FORMAT_VERSION, plain, summarise
from lspade_train.evaluation.verdict import judge
from lspade_train.io.layout import POLICY
from lspade_train.io.provenance import source_state, versions
from lspade_train.policies.cached_exits import has_choices
from lspade_train.policies.policy import ExitPolicy
from lspade_train.policies.selection import DESIGN_ROWS, DROP
from lspade_train.policies.sides import Side, calibration_side, evaluation_side
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.lenses import LENSES, HeadsSource, Lens, lens_of_target
from lspade_train.probes.measures import FIXED
from lspade_train.recipe import Recipe
from lspade_train.tasks import Split
from lspade_train.training.datamodule import HiddenStateDataModule

log = logging.getLogger(__name__)


class FittedRecipe:
    """A recipe whose heads were fitted: heads, model and data, opened for measuring.

    Args:
        recipe: names model, data and layers.
        folder: heads folder.
        split: split to measure completely; None means test, or, if test has no labels, the half of
            validation that chooses no policy.
        beside: recipes opened before; if one has the same model, it is loaded once for both.

    Raises:
        LSpadeError: heads, model, data or split cannot be used.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        split: str | None = None,
        *,
        beside: Sequence["FittedRecipe"] = (),
    ) -> None:
        self.recipe, self.folder = recipe, folder
        self.heads = LSpadeHeads.from_pretrained(folder)
        self.data = HiddenStateDataModule(
            recipe.data, recipe.model.layers, seed=recipe.seed_everything, name=recipe.name
        )
        for other in beside:
            if other.data.frozen.serves(recipe.data):
                self.data.frozen = other.data.frozen
        self.heads.bind(self.data.adapter)
        self.side: Side = evaluation_side(self.data, _known_split(recipe, split))
        self.layers = _common_layers(self.data, self.heads, folder)
        if self.heads.scope == "choices":
            tasks.require_choices(recipe.data, tasks.load_rows(recipe.data, self.split))

    @property
    def split(self) -> Split:
        """The split that is measured."""
        return self.side.split

    def states(self) -> StateDataset:
        """The rows that are measured."""
        return self.side.states(self.data)

    @cached_property
    def lenses(self) -> dict[str, LSpadeHeads | None]:
        """Every lens that can be read here, by key, with the bound heads it uses.

        A lens with its own heads is left out if they were not fitted, or lack the measured layers.
        """
        found: dict[str, LSpadeHeads | None] = {}
        for lens in LENSES.values():
            heads = None if lens.heads is None else self._heads_of(lens, lens.heads)
            if lens.heads is None or heads is not None:
                found[lens.key] = heads
        return found

    def _heads_of(self, lens: Lens, source: HeadsSource) -> LSpadeHeads | None:
        target = self.heads.target or "spade"
        if lens is lens_of_target(target):
            return self.heads
        folder = self.folder / source.folder
        if folder == self.folder:
            return self.heads if source.target == target else None
        if not folder.is_dir():
            return None
        heads = LSpadeHeads.from_pretrained(folder).bind(self.data.adapter)
        if not set(self.layers) <= set(heads.layers):
            log.warning(
                "%s left out: its heads have layers %s, the heads measured have %s. Fit it again "
                "with --model.target %s.",
                lens.label, list(heads.layers), self.layers, source.target,
            )  # fmt: skip
            return None
        return heads


def evaluate_recipe(
    fitted: FittedRecipe, *, baselines: bool = False, examples: int = SHOWN
) -> dict[str, Any]:
    """Lenses, exits and equal compute of one recipe, in the format of `results.json`.

    Args:
        fitted: the recipe to measure.
        baselines: also measure other early-exit methods: reads the training and validation rows.
        examples: how many disagreements with the full model to keep, with the end of each
            prompt.
    """
    adapter = fitted.data.adapter
    dataset = fitted.states()
    readings = read_lenses(dataset, adapter.unembed, fitted.lenses, fitted.layers)
    if readings.over_choices:
        log.info(
            "%s: fitted over the choices; vocabulary-level metrics are null, and the entropy is "
            "over the choices.", ", ".join(LENSES[key].label for key in readings.over_choices)
        )  # fmt: skip
    results = _header(fitted) | summarise(readings, adapter.vocab_size)
    results["exits"], results["examples"] = _measured_exits(fitted, readings, examples)
    results["baselines"] = _baselines(fitted) if baselines else None
    results["iso_compute"] = iso_compute(results, dataset, adapter, fitted.lenses)
    results["verdict"] = judge(results)
    return plain(results | {"cross_task": None, "ablations": None})


def _measured_exits(
    fitted: FittedRecipe, readings: Readings, examples: int
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The threshold sweep, the saved policy, and rows where its answer is not the full model's.

    None for heads whose entropy is not finite; no rows if no policy can be measured.
    """
    heads, adapter = fitted.heads, fitted.data.adapter
    dataset = fitted.states()
    sweep = ExitPolicy(
        layers=tuple(fitted.layers), scope=heads.scope, positions=fitted.recipe.data.positions
    )
    try:
        swept = swept_table(readings, dataset, adapter, heads, sweep)
        found: dict[str, Any] = {"scope": sweep.scope} | sweep_thresholds(swept)
    except NumericsError as broken:
        log.warning("no exits measured: %s", str(broken).split(". ")[0])
        return None, None
    signal = {"of": "sweep"} | reliability(swept, sweep.measure)
    found |= {"policy": None, "reliability": signal}
    if not (fitted.folder / POLICY).exists():
        return found, None
    policy = ExitPolicy.load(fitted.folder / POLICY)
    found["policy"], table = measure_policy(dataset, adapter, heads, policy, fitted.side)
    if table is None:
        return found, None
    if policy.measure != FIXED:
        found["reliability"] = {"of": "policy"} | reliability(table, policy.measure)
    where, limit = fitted.side, policy.threshold
    return found, worst_disagreements(fitted.data, where, readings, table, limit, examples)


def _baselines(fitted: FittedRecipe) -> dict[str, Any]:
    """Other rules within the saved policy's budget, or the default one."""
    data, saved = fitted.data, fitted.folder / POLICY
    policy = ExitPolicy.load(saved) if saved.exists() else None
    calibration = {} if policy is None else policy.calibration
    side, budget = calibration_side(data), calibration.get("budget", DROP)
    calibrating = side.states(data)
    found = measure_baselines(
        data.stored("train", DESIGN_ROWS),
        calibrating,
        fitted.states(),
        data.adapter,
        fitted.heads,
        layers=fitted.layers,
        scope="choices" if has_choices(calibrating) else "vocabulary",
        budget=budget,
        risk=calibration.get("risk", "accuracy_drop"),
    )
    return {"budget": budget, "rows": side.to_json(), "n": len(calibrating), "rules": found}


def _header(fitted: FittedRecipe) -> dict[str, Any]:
    """What was measured, and with what."""
    recipe, adapter, heads = fitted.recipe, fitted.data.adapter, fitted.heads
    training: dict[str, Any] = heads.metadata.get("training", {})
    trained = training.get("recipe", {})
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
        "split": fitted.split,
        "part": fitted.side.part,
        "seed": recipe.seed_everything,
        "heads": {
            "folder": str(fitted.folder),
            "form": heads.form,
            "rank": heads.rank if heads.form == "low_rank" else None,
            "layers": list(heads.layers),
            "target": heads.target,
            "scope": heads.scope,
            "trained_on": trained.get("data", {}).get("task"),
            "weights_sha256": heads.digest,
        },
        "training": {name: training.get(name) for name in ("seconds", "steps", "history")},
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
            f"{folder} has heads for layers {list(heads.layers)}, the recipe asks for "
            f"{list(data.layers)}; none is in common. Set --model.layers to layers of the heads."
        )
    return layers
