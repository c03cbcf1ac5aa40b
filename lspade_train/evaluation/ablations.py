"""Ablations of SPADE and its heads: one small run per change, stored beside the heads.

Independent of figures and terminals.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast, get_args

import torch

from lspade_train.cache import StateDataset
from lspade_train.cache.answers import chunks
from lspade_train.errors import ArtifactError
from lspade_train.evaluation.readings import read_lenses
from lspade_train.evaluation.refit import fit_heads
from lspade_train.evaluation.run import FittedRecipe
from lspade_train.evaluation.start_tokens import Start, spade_states
from lspade_train.evaluation.summary import FORMAT_VERSION, summarise
from lspade_train.io.storage import json_digest, read_json, write_json
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.lenses import L_SPADE, SPADE, TUNED_LENS
from lspade_train.recipe import HeadConfig

FOLDER = "ablations"
FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
PER_LAYER = (
    *("accuracy", "accuracy_interval", "agrees_model", "agrees_model_interval"),
    *("answer_agrees_model", "kl_to_model", "kl_to_spade", "entropy"),
)
START_LABELS = {
    "original": "start token, original positions",
    "compact": "start token, positions 0 and 1",
    "no_start": "no start token",
    "other_token": "token {other!r} as start",
    "random_vector": "random vector as start",
}


@dataclass(frozen=True)
class Ablation:
    """One change, and how it is measured.

    Attributes:
        group: start (of SPADE), heads (form and target) or rows (the learning curve).
        name: unique in its group.
        label: for tables and figures.
        measure: returns the numbers in the format of `results.json`.
        rows: number of training rows; None if nothing is trained.
        settings: other settings that determine the numbers, as JSON.
    """

    group: str
    name: str
    label: str
    measure: Callable[[], dict[str, Any]]
    rows: int | None = None
    settings: dict[str, Any] | None = None


Track = Callable[[list[Ablation]], Iterable[Ablation]]


def run_ablations(fitted: FittedRecipe, track: Track = iter) -> dict[str, list[dict[str, Any]]]:
    """Measure every change, or reuse the numbers of an earlier, identical run, as JSON.

    Each is written to `ablations/` in the heads folder as soon as it is done, so that an
    interrupted run resumes where it stopped.

    Args:
        fitted: heads, model and data.
        track: wraps the list in a progress bar.
    """
    wanted = [*_starts(fitted), *_forms(fitted), *_learning_curve(fitted)]
    common = {
        "format_version": FORMAT_VERSION,
        "rows": fitted.data.identity(fitted.split),
        "train": fitted.data.identity("train"),
        "heads": fitted.heads.digest,
        "layers": fitted.layers,
        "seed": fitted.recipe.seed_everything,
        "batch_size": fitted.recipe.data.batch_size,
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for ablation in track(wanted):
        found.setdefault(ablation.group, []).append(_kept(fitted, ablation, common))
    return found


def _kept(fitted: FittedRecipe, ablation: Ablation, common: dict[str, Any]) -> dict[str, Any]:
    path = fitted.folder / FOLDER / f"{ablation.group}-{ablation.name}.json"
    key = json_digest(common | {"rows_trained": ablation.rows, "settings": ablation.settings})
    if path.exists():
        kept = read_json(path, ArtifactError, f"Delete {path.parent} to measure again.")
        if kept.get("key") == key:
            return kept["variant"]
    variant = {
        "name": ablation.name,
        "label": ablation.label,
        "rows": ablation.rows,
        **ablation.measure(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"key": key, "variant": variant}, ArtifactError)
    return variant


# SPADE's start token ---------------------------------------------------------------------------


def _starts(fitted: FittedRecipe) -> Iterator[Ablation]:
    other = _other_token(fitted)
    text = fitted.data.tokenizer.convert_ids_to_tokens(other)
    for start in cast(tuple[Start, ...], get_args(Start)):
        yield Ablation(
            group="start",
            name=start,
            label=START_LABELS[start].format(other=text),
            measure=partial(_measure_start, fitted, start, other),
            settings={"start": start, "other": other},
        )


def _other_token(fitted: FittedRecipe) -> int:
    """A token of the vocabulary drawn with the recipe's seed; never the rows' start token."""
    first = int(fitted.states().labels["start_id"][0])
    generator = torch.Generator().manual_seed(fitted.recipe.seed_everything)
    vocab = len(fitted.data.tokenizer)
    step = int(torch.randint(1, vocab, (), generator=generator))
    return (first + step) % vocab


def _measure_start(fitted: FittedRecipe, start: Start, other: int) -> dict[str, Any]:
    dataset, adapter = fitted.states(), fitted.data.adapter
    shards: list[dict[str, torch.Tensor]] = []
    for batch in chunks(dataset):
        tensors = {n: v for n, v in vars(batch).items() if not (v is None or "target" in n)}
        moved = batch.to(adapter.device)
        target = spade_states(
            adapter, moved, dataset.layers, start, other=other, seed=fitted.recipe.seed_everything
        )
        shards.append({**tensors, "target": target.cpu()})
    changed = StateDataset(shards, dataset.groups, dataset.layers)
    readings = read_lenses(changed, adapter.unembed, {SPADE.key: None}, fitted.layers)
    numbers = summarise(readings, adapter.vocab_size)["lenses"][SPADE.key]
    kept = {name: numbers[name] for name in PER_LAYER}
    return {"parameters": None, **kept, "kl_to_spade": None}


# Heads: form, target, training rows ------------------------------------------------------------


def _forms(fitted: FittedRecipe) -> Iterator[Ablation]:
    """The heads as they are, then one change of form or target at a time."""
    heads, config = fitted.heads, _trained_as(fitted)
    rows = len(fitted.data.stored("train"))
    yield _of_heads(fitted, "as_fitted", _label(config), lambda: heads, rows, config)
    rank = max(fitted.data.adapter.hidden_size // 8, 1)
    changes = {
        "target_spade": replace(config, target="spade"),
        "target_final": replace(config, target="final"),
        "full": replace(config, form="full"),
        "low_rank": replace(config, form="low_rank", rank=rank),
        "bias": replace(config, form="bias"),
    }
    tuned = fitted.lenses.get(TUNED_LENS.key)
    for name, changed in changes.items():
        if changed == config or (name == "low_rank" and config.form == "low_rank"):
            continue
        make = partial(_fit, fitted, changed, rows)
        if name == "target_final" and tuned is not None and tuned.form == config.form:
            make = partial(_same, tuned)
        yield _of_heads(fitted, name, _label(changed), make, rows, changed)


def _learning_curve(fitted: FittedRecipe) -> Iterator[Ablation]:
    """The same heads from fewer training rows, in the same number of steps."""
    heads, config = fitted.heads, _trained_as(fitted)
    rows = len(fitted.data.stored("train"))
    for part in sorted({max(int(rows * fraction), 1) for fraction in FRACTIONS} - {rows}):
        make = partial(_fit, fitted, config, part)
        yield _of_heads(fitted, f"{part}", f"{part:,} rows", make, part, config, group="rows")
    make = partial(_same, heads)
    yield _of_heads(fitted, f"{rows}", f"{rows:,} rows", make, rows, config, group="rows")


def _of_heads(
    fitted: FittedRecipe,
    name: str,
    label: str,
    make: Callable[[], LSpadeHeads],
    rows: int,
    config: HeadConfig,
    group: str = "heads",
) -> Ablation:
    settings = {"config": asdict(config), "steps": _steps(fitted)}
    measure = partial(_measure_heads, fitted, make)
    return Ablation(group, name, label, measure, rows, settings)


def _measure_heads(fitted: FittedRecipe, make: Callable[[], LSpadeHeads]) -> dict[str, Any]:
    heads, adapter = make(), fitted.data.adapter
    dataset = fitted.states()
    readings = read_lenses(dataset, adapter.unembed, {L_SPADE.key: heads}, fitted.layers)
    numbers = summarise(readings, adapter.vocab_size)["lenses"][L_SPADE.key]
    parameters = sum(parameter.numel() for parameter in heads.parameters())
    return {"parameters": parameters, **{name: numbers[name] for name in PER_LAYER}}


def _fit(fitted: FittedRecipe, config: HeadConfig, rows: int) -> LSpadeHeads:
    dataset = fitted.data.stored("train")
    if rows < len(dataset):
        generator = torch.Generator().manual_seed(fitted.recipe.seed_everything)
        chosen = torch.randperm(len(dataset), generator=generator)[:rows].sort().values
        dataset = dataset.select(chosen).copied()
    return fit_heads(fitted.recipe, config, dataset, fitted.data.adapter, _steps(fitted))


def _same(heads: LSpadeHeads) -> LSpadeHeads:
    return heads


def _trained_as(fitted: FittedRecipe) -> HeadConfig:
    """The settings the heads were trained with: their own record, or the recipe without one."""
    training = fitted.heads.metadata.get("training", {})
    known = training.get("recipe", {}).get("model")
    config = HeadConfig(**known) if known else fitted.recipe.model
    return replace(config, target=config.targets[0])  # the set of heads that is measured


def _steps(fitted: FittedRecipe) -> int:
    """Optimiser steps of the fit that produced the heads."""
    return int(fitted.heads.metadata.get("training", {}).get("steps", 1000))


def _label(config: HeadConfig) -> str:
    form = f"rank {config.rank}" if config.form == "low_rank" else config.form
    return f"{form}, target {config.target}"
