"""A consistent space: can a model be trained so that its own head reads its middle layers?

    python recipes/consistent_space.py recipes/quickstart.yaml --weights '[0.1, 1, 10]'

For every weight LoRA is trained and merged (`consistent/own_head.py`), then heads are fitted and
policies calibrated as for any model; the same on the frozen model, with the recipe's epochs and
with as many training FLOPs. Resumes. `--output` gets everything, the table as `results.json`.
"""

import importlib.util
import logging
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from consistent.cost import Cost, count
from consistent.measure import epochs_of, fit, measure, open_data
from consistent.own_head import Tuning, fine_tune, prompts
from jsonargparse import auto_cli

from lspade_train.cli.parsing import command_parser, parse
from lspade_train.errors import ArtifactError, LSpadeError, RecipeError
from lspade_train.evaluation.summary import plain
from lspade_train.io.provenance import source_state, versions
from lspade_train.io.storage import json_digest, read_json, write_json
from lspade_train.models.open import open_adapter, resolved_revision
from lspade_train.policies.sides import evaluation_side
from lspade_train.recipe import Recipe

FORMAT = 1


def consistent_space(
    recipe: str,
    *,
    weights: tuple[float, ...] = (0.1, 1.0, 10.0),
    epochs: int = 3,
    batch_size: int = 16,
    lr: float = 1e-4,
    rank: int = 16,
    seed: int = 0,
    max_accuracy_drop: float = 0.01,
    max_epochs: int = 400,
    title: str | None = None,
    output: Path = Path("checkpoints/consistent/run"),
) -> None:
    """Fine-tune with every weight, and compare with the frozen model.

    Args:
        recipe: the recipe: model, data, heads.
        weights: weights of the own head's loss, one model each.
        epochs: passes over the training split of each fine-tuning.
        batch_size: rows per step of it.
        lr: its learning rate.
        rank: LoRA's rank.
        seed: seed of LoRA, of the shuffling and of the heads.
        max_accuracy_drop: accuracy that the policies may lose, at 95% confidence.
        max_epochs: most epochs of the fit that gets the fine-tuning's FLOPs.
        title: model and task in the table; default: the recipe's name.
        output: folder for models, caches, heads and `results.json`.
    """
    if importlib.util.find_spec("peft") is None:
        raise SystemExit("error: LoRA needs peft, which is not installed: pip install peft")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        found = parse(command_parser("fit", ""), ["--config", recipe]).recipe
        found = replace(found, seed_everything=seed)
        tunings = [
            Tuning(weight=w, epochs=epochs, batch_size=batch_size, lr=lr, rank=rank, seed=seed)
            for w in weights
        ]
        given = title or found.name
        Experiment(found, tunings, max_accuracy_drop, max_epochs, given, output).run()
    except LSpadeError as error:
        raise SystemExit(f"error: {error}") from error


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: its key in `results.json`.
        recipe: recipe of the frozen or the merged model.
        folder: folder of its stages.
        tuning: how the model is fine-tuned; None: it is frozen.
        note: a deviation to show.
    """

    name: str
    recipe: Recipe
    folder: Path
    tuning: Tuning | None = None
    note: str = ""


class Experiment:
    """All rows of one recipe.

    Args:
        recipe: recipe of the frozen model.
        tunings: one per weight, equal in all else.
        budget: accuracy that a policy may lose.
        max_epochs: most epochs of the fit that gets the fine-tuning's FLOPs.
        title: model and task in words.
        output: folder that gets everything.
    """

    def __init__(
        self, recipe: Recipe, tunings: Sequence[Tuning], budget: float, max_epochs: int,
        title: str, output: Path,
    ) -> None:  # fmt: skip
        if "max_steps" in recipe.trainer or "callbacks" in recipe.trainer:
            raise RecipeError(
                "trainer.max_steps or callbacks is set; expected max_epochs alone, which decides "
                "what a fit costs. Remove it from the recipe."
            )
        self.tunings, self.budget, self.max_epochs = tunings, budget, max_epochs
        self.title, self.output = title, output
        data = replace(recipe.data, cache_dir=str(output / "frozen/cache"))
        self.recipe = replace(recipe, data=data)
        self.original = open_data(self.recipe)

    def run(self) -> None:
        """Complete `results.json`, row by row."""
        path = self.output / "results.json"
        found: dict[str, Any] = read_json(path, ArtifactError) if path.exists() else {}
        if found.get("common") != self.common:  # the header describes all rows
            found["rows"] = {}
        for row in self.rows():
            tuning = None if row.tuning is None else asdict(row.tuning)
            key = json_digest([self.source, self.budget, row.name, epochs_of(row.recipe), tuning])
            if found["rows"].get(row.name, {}).get("settings") == key:
                continue
            sys.stderr.write(f"{datetime.now(UTC):%H:%M:%S} {row.name}\n")
            done = {"settings": key} | self.measured(row)
            found["rows"][row.name] = done
            found = self.header() | {"common": self.common, "rows": found["rows"]}
            write_json(path, plain(found), ArtifactError)

    def rows(self) -> list[Row]:
        """The frozen model, the frozen model with as many training FLOPs, one row per weight."""
        epochs, tuning = epochs_of(self.recipe), self.cost.fine_tune(self.tunings[0].epochs)
        needed = max(round(self.cost.epochs(tuning)), epochs)
        given = min(needed, max(self.max_epochs, epochs))
        sys.stderr.write(
            f"training FLOPs: fine-tuning takes {tuning / self.cost.fit(epochs):.1f} times those "
            f"of the recipe's fit ({epochs} epochs), as many as a fit of {needed:,} epochs\n"
        )
        longer = replace(self.recipe, trainer=self.recipe.trainer | {"max_epochs": given})
        note = f"{given} of {needed:,} epochs" if given < needed else ""
        return [
            Row("frozen", self.recipe, self.output / "frozen"),
            Row("frozen, equal compute", longer, self.output / "equal-compute", note=note),
            *map(self.tuned, self.tunings),
        ]

    def tuned(self, tuning: Tuning) -> Row:
        """The row of one weight; its recipe names the merged model."""
        folder = self.output / f"weight-{tuning.weight:g}"
        where = {"model_id": str(folder / "model"), "cache_dir": str(folder / "cache")}
        data = replace(self.recipe.data, **where, revision=None, gguf_file=None)
        return Row(f"weight {tuning.weight:g}", replace(self.recipe, data=data), folder, tuning)

    @cached_property
    def common(self) -> str:
        """Digest of what all rows share."""
        tuning = {k: v for k, v in asdict(self.tunings[0]).items() if k != "weight"}
        return json_digest([self.source, self.budget, tuning, self.title])

    @cached_property
    def source(self) -> str:
        """Digest of the original model, the rows, and the settings of the heads."""
        data, trainer = self.original, self.recipe.trainer
        splits = ("train", "validation", evaluation_side(data).split)
        heads = {k: v for k, v in asdict(self.recipe.model).items() if k != "validation_rows"}
        return json_digest(
            {
                "data": [data.identity(split) for split in splits],
                "heads": heads | {"batch_size": data.config.batch_size},
                "trainer": {k: v for k, v in trainer.items() if k != "max_epochs"},
                "seed": self.recipe.seed_everything,
            }
        )

    @cached_property
    def cost(self) -> Cost:
        """Training FLOPs of a pass over the rows."""
        return count(self.original, self.recipe.model)

    def measured(self, row: Row) -> dict[str, Any]:
        """Train, fit, calibrate and measure; finished stages are reused."""
        epochs, trained = epochs_of(row.recipe), {}
        flops = self.cost.fit(epochs)
        if row.tuning is not None:
            key = json_digest([self.source, asdict(row.tuning)])
            trained = stage(row.folder / "trained.json", key, lambda: self.train(row))
            flops += self.cost.fine_tune(row.tuning.epochs)
        heads, key = row.folder / "heads", json_digest([self.source, epochs, trained])
        fitted = stage(row.folder / "fitted.json", key, lambda: fit(row.recipe, heads))
        return measure(row.recipe, heads, self.original, self.budget) | {
            "note": row.note,
            "training": trained,
            "fit": fitted | {"epochs": epochs},
            "training_flops": flops,
        }

    def train(self, row: Row) -> dict[str, Any]:
        """Fine-tune a fresh copy of the original model."""
        data, tuning = self.recipe.data, row.tuning
        assert tuning is not None
        model = open_adapter(data, resolved_revision(data), device=data.device).model
        rows, folder = prompts(self.original.encoded("train")), Path(row.recipe.data.model_id)
        return fine_tune(model, self.original.tokenizer, rows, tuning, folder)

    def header(self) -> dict[str, Any]:
        """What was run, without paths of this machine."""
        data, side, adapter = self.original, evaluation_side(self.original), self.original.adapter
        return {
            "format": FORMAT,
            "title": self.title,
            "recipe": self.recipe.name,
            "seed": self.recipe.seed_everything,
            "n": {
                "train": len(data.stored("train")),
                "validation": len(data.stored("validation")),
                "test": len(side.states(data)),
            },
            "measured_on": side.words,
            "budget": self.budget,
            "tuning": {k: v for k, v in asdict(self.tunings[0]).items() if k != "weight"},
            "heads": asdict(self.recipe.model),
            "num_layers": adapter.num_layers,
            "hidden_size": adapter.hidden_size,
            "vocab_size": adapter.vocab_size,
            "provenance": {
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()})",
                "device": str(adapter.device),
                "dtype": adapter.identity["dtype"],
                "threads": torch.get_num_threads(),
                "versions": versions() | {"peft": version("peft")},
                "source": source_state(),
            },
        }


def stage(path: Path, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The record of a finished stage, which runs if there is none.

    Raises:
        ArtifactError: the folder holds the stage of other settings.
    """
    if path.exists():
        found = read_json(path, ArtifactError)
        if found.get("settings") != key:
            raise ArtifactError(f"{path} has other settings, model or data. Set another --output.")
        return found
    found = make() | {"settings": key}
    write_json(path, plain(found), ArtifactError)
    return found


if __name__ == "__main__":
    auto_cli(consistent_space)
