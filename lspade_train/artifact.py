"""The heads folder: heads, config with provenance, results, model card. Knows nothing of training.

`heads.safetensors` and `config.json` are `LSpadeHeads`' own; this module adds what stands around
them. Each file is complete or absent.
"""

import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lspade_train.errors import ArtifactError
from lspade_train.heads import CONFIG, LSpadeHeads
from lspade_train.recipe import Recipe
from lspade_train.storage import read_json, write_json, write_text

RESULTS, CARD = "results.json", "README.md"
PACKAGES = ("lspade-train", "torch", "transformers", "lightning", "datasets", "safetensors")


def heads_folder(recipe: Recipe, root: Path | None = None) -> Path:
    """Where a recipe's heads land: `checkpoints/<name>/` of the working directory.

    Raises:
        ArtifactError: the name is no plain folder name.
    """
    name = recipe.name
    if not name or Path(name).name != name or name.startswith("."):
        raise ArtifactError(
            f"name is {name!r}; expected a plain folder name such as arc. Set name in the recipe."
        )
    return (root or Path("checkpoints")) / name


def export(
    folder: Path,
    heads: LSpadeHeads,
    *,
    base_model: dict[str, Any],
    recipe: Recipe,
    cache_digests: dict[str, str],
    steps: int,
    metrics: dict[str, float],
) -> None:
    """Write a complete heads folder.

    Args:
        folder: made if missing.
        heads: the trained heads.
        base_model: id, revision and digests of the frozen model.
        recipe: the whole recipe, as run.
        cache_digests: identity digest of each split's cache.
        steps: optimiser steps taken.
        metrics: last logged metrics by name.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    heads.metadata = {
        "base_model": base_model,
        "training": {
            "recipe": asdict(recipe),
            "caches": cache_digests,
            "steps": steps,
            "metrics": metrics,
            "versions": versions(),
            "source": source_state(),
        },
    }
    heads.save_pretrained(folder)
    write_text(folder / CARD, _card(heads, recipe, base_model, metrics), ArtifactError)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def source_state() -> dict[str, Any] | None:
    """Commit of this package's own checkout and whether it was changed; None outside a clone."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):
            return None  # installed inside somebody else's repository
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def read_results(folder: Path) -> dict[str, Any]:
    """`results.json` as written by evaluate.

    Raises:
        ArtifactError: missing or damaged.
    """
    return read_json(folder / RESULTS, ArtifactError)


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write `results.json`.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    write_json(folder / RESULTS, results, ArtifactError)


def describe(folder: Path) -> dict[str, str]:
    """What a heads folder is, from its files alone.

    Raises:
        ArtifactError: missing or damaged.
    """
    config = read_json(folder / CONFIG, ArtifactError)
    base, training = config.get("base_model", {}), config.get("training", {})
    recipe = training.get("recipe", {})
    rows = {
        "heads": f"{config.get('form')}, layers {_ranges(config.get('layers', []))}",
        "base model": f"{base.get('model_id')} @ {base.get('revision') or 'local files'}",
        "precision": str(base.get("dtype")),
        "task": str(recipe.get("data", {}).get("task")),
        "target": str(recipe.get("model", {}).get("target")),
        "steps": str(training.get("steps")),
        "made with": ", ".join(f"{k} {v}" for k, v in training.get("versions", {}).items()),
    }
    files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return rows | {"files": ", ".join(files)}


def _ranges(layers: list[int]) -> str:
    """`1-3, 7` for [1, 2, 3, 7]."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _card(
    heads: LSpadeHeads, recipe: Recipe, base_model: dict[str, Any], metrics: dict[str, float]
) -> str:
    model = base_model["model_id"]
    kl = {k: v for k, v in sorted(metrics.items()) if k.startswith("val/kl/layer_")}
    agree = {k: v for k, v in sorted(metrics.items()) if k.startswith("val/agreement/layer_")}
    table = "\n".join(
        f"| {int(k[-2:])} | {v:.3f} | {a:.3f} |"
        for (k, v), a in zip(kl.items(), agree.values(), strict=True)
    )
    against = "SPADE at the same layer" if recipe.model.target == "spade" else "the full model"
    return f"""---
library_name: lspade-train
base_model: {model}
tags: [early-exit, l-spade]
---
# L-SPADE heads for {model}

One linear map per layer ({heads.form}, layers {_ranges(list(heads.layers))}) in front of the
model's frozen final norm and unembedding, distilled from {against} on `{recipe.data.task}`
(arXiv:2507.17618).

```python
from transformers import AutoModelForCausalLM
from lspade_train import LSpadeHeads

model = AutoModelForCausalLM.from_pretrained("{model}")
heads = LSpadeHeads.from_pretrained("checkpoints/{recipe.name}").bind(model)
logits = heads.logits(hidden, layer={heads.layers[-1]})  # hidden: raw output of that block
```

Validation, after training:

| layer | KL to the target (nats) | agreement with the target |
|---|---|---|
{table}

`config.json` holds the model's digests, the recipe and the versions these heads were made with.
"""
