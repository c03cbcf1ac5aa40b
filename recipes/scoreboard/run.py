"""The scoreboard: cache, fit, calibrate and evaluate every pair of model and task; resumes.

    python recipes/scoreboard/run.py --models DIR --data DIR [--only smollm2-sst2,smollm2-trec6]
    python recipes/scoreboard/run.py --wall ...       (times the policies, on a machine left alone)
    python recipes/scoreboard/run.py --table          (the page and figure from the results alone)

Writes one results file per pair to results/, which a second run skips; docs/scoreboard.md and its
figure are made from those. DIR has the models and data in pairs.yaml; others come from the Hub.
"""

import argparse
import gc
import os
import platform
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from prepare import prepare
from table import RESULTS, write_page
from wall import wall

from lspade_train.cli import main as toolkit
from lspade_train.errors import ArtifactError
from lspade_train.evaluation.chance import cached_accuracy
from lspade_train.evaluation.exits import measure_policy
from lspade_train.evaluation.run import FittedRecipe, evaluate_recipe
from lspade_train.evaluation.summary import plain
from lspade_train.io.provenance import source_state, versions
from lspade_train.io.storage import read_json, write_json, write_text
from lspade_train.policies.policy import ExitPolicy
from lspade_train.policies.selection import calibrate
from lspade_train.recipe import DataConfig, HeadConfig, PromptConfig, Recipe, heads_folder
from lspade_train.training.datamodule import HiddenStateDataModule

HERE = Path(__file__).parent
FORMAT = 1
SEED = 0

RULES: dict[str, dict[str, Any]] = {"paper": {"paper": True}, "ours": {}}
"""Options of `calibrate`: the paper's rule, or a search over everything."""

PER_LENS = ("accuracy", "answer_agrees_model", "auroc")
PER_POLICY = (
    *("accuracy", "drop", "drop_interval", "disagreement", "mean_exit_layer", "compute_saved"),
)


def main() -> None:
    """Run the requested pairs and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path(), help="folder of the model folders")
    parser.add_argument("--data", type=Path, default=Path(), help="folder of the data")
    parser.add_argument("--only", default="", help="pairs such as smollm2-sst2, by commas")
    parser.add_argument("--work", type=Path, default=Path("checkpoints/scoreboard"))
    parser.add_argument("--dtype", default="bfloat16", help="float32 on a CPU without bf16")
    parser.add_argument("--pairs", type=Path, default=HERE / "pairs.yaml")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--wall", action="store_true", help="time what was run before")
    parser.add_argument("--table", action="store_true", help="run nothing, write the page")
    given = parser.parse_args()
    if not given.table:
        run(given)
    if given.results == RESULTS:
        sys.stdout.write(f"{write_page()}\n")


def run(given: argparse.Namespace) -> None:
    """Run every requested pair that has no results yet."""
    settings = yaml.safe_load(given.pairs.read_text(encoding="utf-8"))
    known = [f"{model}-{task}" for model in settings["models"] for task in settings["tasks"]]
    asked = given.only.split(",") if given.only else known
    for pair in asked:
        if pair not in known:
            raise SystemExit(f"No pair {pair!r}; expected some of {', '.join(known)}.")
        path = given.results / f"{pair}.json"
        if given.wall:
            add_wall(path, pair, settings, given)
            continue
        if path.exists():
            continue
        sys.stderr.write(f"{datetime.now(UTC):%H:%M:%S} {pair}\n")
        write_json(path, Pair(pair, settings, given).results(), ArtifactError)
        gc.collect()


def add_wall(path: Path, pair: str, settings: Mapping[str, Any], given: argparse.Namespace) -> None:
    """Time a pair's policy, if it has results and heads here and ever exits."""
    found = read_json(path, ArtifactError) if path.exists() else {}
    if not found.get("policies", {}).get("ours", {}).get("layers"):
        return
    recipe = Pair(pair, settings, given).recipe()
    sys.stderr.write(f"{datetime.now(UTC):%H:%M:%S} {pair}, wall time\n")
    found["wall"] = wall(FittedRecipe(recipe, heads_folder(recipe)))
    write_json(path, found, ArtifactError)


class Pair:
    """One model on one task.

    Args:
        name: name such as `smollm2-sst2`.
        settings: content of pairs.yaml.
        given: the command line.
    """

    def __init__(self, name: str, settings: Mapping[str, Any], given: argparse.Namespace) -> None:
        self.name, self.settings = name, settings
        self.model_key, _, self.task_key = name.partition("-")
        self.model = settings["models"][self.model_key]
        self.task = settings["tasks"][self.task_key]
        self.rows: Mapping[str, int] = settings.get("rows", {}).get(name, self.model["rows"])
        self.work: Path = given.work / name
        self.data: Path = given.data
        self.dtype: str = given.dtype
        local = given.models / self.model["model_id"]
        self.model_id = str(local) if local.exists() else self.model["model_id"]
        self.clock = Clock()

    def results(self) -> dict[str, Any]:
        """Everything that the page needs, without paths of this machine."""
        rows = prepare(self.task, self.rows, self.data, self.work / "data", SEED)
        recipe = self.recipe()
        with self.clock("the model itself"):
            data = HiddenStateDataModule(recipe.data, recipe.model.layers, spade=False)
            baseline = cached_accuracy(data.stored("test"), data.unembed)
        assert baseline is not None  # prepare keeps labelled rows only
        found = self._header(rows, data) | {"n": baseline.n, "full_model": asdict(baseline)}
        if not baseline.at_chance:
            found |= self._measured(recipe)
        return plain(found) | {"provenance": self._provenance()}

    def _measured(self, recipe: Recipe) -> dict[str, Any]:
        """Results of heads, lenses and policies on the test rows."""
        folder = heads_folder(recipe)
        with self.clock("cache and fit"):
            self._fit(folder)
        fitted = FittedRecipe(recipe, folder)
        with self.clock("calibrate"):
            # The last one stays beside the heads, where evaluate reads its budget.
            policies = {rule: self._policy(fitted, asked) for rule, asked in RULES.items()}
        with self.clock("evaluate"):
            found = evaluate_recipe(fitted, baselines=True)
        return slim(found) | {"policies": policies}

    def recipe(self) -> Recipe:
        """The recipe as an object; also written as a YAML file for the other commands."""
        shots = self.task["data"].get("prompt", {}).get("shots", 0)
        data: dict[str, Any] = {
            "model_id": self.model_id,
            "task": "jsonl",
            "dataset": str(self.work / "data"),
            "cache_dir": str(self.work / "cache"),
            "dtype": self.dtype,
            "overlong": "skip",
            "shard_mb": 16,  # so that an interrupted run loses little
        }
        heads, trainer = self.settings["heads"], self.settings["trainer"]
        text = {
            "name": self.name, "seed_everything": SEED, "data": data | {"prompt": {"shots": shots}},
            "model": heads, "trainer": trainer,
        }  # fmt: skip
        write_text(self.work / "recipe.yaml", yaml.safe_dump(text, sort_keys=False), ArtifactError)
        return Recipe(
            name=self.name, seed_everything=SEED, trainer=trainer, model=HeadConfig(**heads),
            data=DataConfig(**data, prompt=PromptConfig(shots=shots)),
        )  # fmt: skip

    def _fit(self, folder: Path) -> None:
        """Build the caches and fit, if there are no heads yet."""
        if (folder / "heads.safetensors").exists():
            return
        for command in (["cache", "--splits=[train,validation,test]"], ["fit"]):
            if toolkit([*command, "--config", str(self.work / "recipe.yaml")]):
                raise SystemExit(f"{self.name}: {command[0]} failed")

    def _policy(self, fitted: FittedRecipe, asked: dict[str, Any]) -> dict[str, Any]:
        """A policy chosen on validation rows, measured on test rows."""
        budget = self.settings["budget"]
        found = calibrate(fitted.data, fitted.heads, max_accuracy_drop=budget, seed=SEED, **asked)
        found.policy.save(fitted.folder)
        return policy_on_test(fitted, found.policy, found.calibration.chosen.name)

    def _header(self, rows: dict[str, int], data: HiddenStateDataModule) -> dict[str, Any]:
        adapter = data.adapter
        return {
            "format": FORMAT,
            "pair": self.name,
            "model": self.model["title"],
            "weights": self.model["weights"],
            "task": self.task["title"],
            "from": self.task["from"],
            "prompt": self.task["data"].get("prompt", {}),
            "rows": rows,
            "seed": SEED,
            "budget": self.settings["budget"],
            "num_layers": adapter.num_layers,
            "hidden_size": adapter.hidden_size,
            "vocab_size": adapter.vocab_size,
        }

    def _provenance(self) -> dict[str, Any]:
        return {
            "command": "python recipes/scoreboard/run.py --models DIR --data DIR "
            f"--only {self.name}",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()})",
            "threads": torch.get_num_threads(),
            "dtype": self.dtype,
            "cpu_seconds": self.clock.spent,
            "versions": versions(),
            "source": source_state(),
            "recipe": {"heads": self.settings["heads"], "trainer": self.settings["trainer"]},
        }


def slim(found: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of `results.json` to keep."""
    exits = found["exits"] or {}
    return {
        "layers": found["layers"],
        "lenses": {
            key: {name: rounded(lens[name]) for name in PER_LENS}
            for key, lens in found["lenses"].items()
        },
        "oracle_spade": exits.get("oracle_saving"),
        "paper_thresholds": [
            {"nats": row["threshold"]} | {name: row[name] for name in PER_POLICY}
            for row in exits.get("paper", [])
        ],
        "baselines": {
            rule["name"]: {"setting": rule["setting"], **rule["row"]}
            for rule in found["baselines"]["rules"]
        },
        "iso_compute": {
            "budgets": found["iso_compute"]["budgets"],
            "accuracy": found["iso_compute"]["at_budget"],
        },
    }


def policy_on_test(fitted: FittedRecipe, policy: ExitPolicy, name: str) -> dict[str, Any]:
    """Results of a policy on the measured rows."""
    never = policy.threshold is None
    states, adapter = fitted.states(), fitted.data.adapter
    found, _ = measure_policy(states, adapter, fitted.heads, policy, fitted.side)
    row = found["row"] or {}
    return {
        "name": "never exit" if never else name,
        "layers": [] if never else list(policy.layers),
        "oracle_saving": found["oracle_saving"],
        **{key: row.get(key) for key in PER_POLICY},
    }


def rounded(values: Any) -> Any:
    """Round to four digits: intervals are a hundred times wider."""
    return None if values is None else [None if v is None else round(v, 4) for v in values]


class Clock:
    """CPU seconds of a run's stages, over all threads: wall time depends on other processes."""

    def __init__(self) -> None:
        self.spent: dict[str, int] = {}

    @contextmanager
    def __call__(self, stage: str) -> Generator[None]:
        """Time a stage."""
        started = time.process_time()
        yield
        self.spent[stage] = round(time.process_time() - started)


if __name__ == "__main__":
    main()
