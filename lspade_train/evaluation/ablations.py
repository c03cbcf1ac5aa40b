"""What SPADE and its heads owe to each choice: one small run each, kept beside the heads.

Knows nothing of pictures or terminals.
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
from lspade_train.evaluation.refit import fit_heads, subset
from lspade_train.evaluation.run import Subject
from lspade_train.evaluation.start_tokens import Start, spade_states
from lspade_train.evaluation.summary import FORMAT_VERSION, summarise
from lspade_train.io.storage import json_digest, read_json, write_json
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.lenses import HeadsLens, SpadeLens
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
        measure: gives the numbers, as `results.json` holds them.
        rows: training rows; None where nothing is trained.
        settings: what else decides the numbers, as JSON.
    """

    group: str
    name: str
    label: str
    measure: Callable[[], dict[str, Any]]
    rows: int | None = None
    settings: dict[str, Any] | None = None


Track = Callable[[list[Ablation]], Iterable[Ablation]]


def run_ablations(subject: Subject, track: Track = iter) -> dict[str, list[dict[str, Any]]]:
    """Measure every change, or take its numbers from an earlier run of the same, as JSON.

    Each is written to `ablations/` in the heads folder when it is done, so that a run that was
    stopped goes on where it was.

    Args:
        subject: heads, model and data.
        track: wraps the list in a progress bar.
    """
    wanted = [*_starts(subject), *_forms(subject), *_learning_curve(subject)]
    common = {
        "format_version": FORMAT_VERSION,
        "rows": subject.data.identity(subject.split),
        "train": subject.data.identity("train"),
        "heads": subject.heads.digest,
        "layers": subject.layers,
        "seed": subject.recipe.seed_everything,
        "batch_size": subject.recipe.data.batch_size,
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for ablation in track(wanted):
        found.setdefault(ablation.group, []).append(_kept(subject, ablation, common))
    return found


def _kept(subject: Subject, ablation: Ablation, common: dict[str, Any]) -> dict[str, Any]:
    path = subject.folder / FOLDER / f"{ablation.group}-{ablation.name}.json"
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


def _starts(subject: Subject) -> Iterator[Ablation]:
    other = _other_token(subject)
    text = subject.data.tokenizer.convert_ids_to_tokens(other)
    for start in cast(tuple[Start, ...], get_args(Start)):
        yield Ablation(
            group="start",
            name=start,
            label=START_LABELS[start].format(other=text),
            measure=partial(_measure_start, subject, start, other),
            settings={"start": start, "other": other},
        )


def _other_token(subject: Subject) -> int:
    """A token of the vocabulary drawn by the seed; never the rows' own start token."""
    first = int(subject.states().labels["start_id"][0])
    generator = torch.Generator().manual_seed(subject.recipe.seed_everything)
    vocab = len(subject.data.tokenizer)
    step = int(torch.randint(1, vocab, (), generator=generator))
    return (first + step) % vocab


def _measure_start(subject: Subject, start: Start, other: int) -> dict[str, Any]:
    dataset, adapter = subject.states(), subject.data.adapter
    shards: list[dict[str, torch.Tensor]] = []
    for batch in chunks(dataset):
        tensors = {n: v for n, v in vars(batch).items() if not (v is None or "target" in n)}
        moved = batch.to(adapter.device)
        target = spade_states(
            adapter, moved, dataset.layers, start, other=other, seed=subject.recipe.seed_everything
        )
        shards.append({**tensors, "target": target.cpu()})
    changed = StateDataset(shards, dataset.groups, dataset.layers)
    readings = read_lenses(changed, adapter.unembed, [SpadeLens()], subject.layers)
    numbers = summarise(readings, adapter.vocab_size)["lenses"]["spade"]
    kept = {name: numbers[name] for name in PER_LAYER}
    return {"parameters": None, **kept, "kl_to_spade": None}


# Heads: form, target, training rows ------------------------------------------------------------


def _forms(subject: Subject) -> Iterator[Ablation]:
    """The heads as they are, then one change of form or target at a time."""
    heads, config = subject.heads, _trained_as(subject)
    rows = len(subject.data.stored("train"))
    yield _of_heads(subject, "as_fitted", _label(config), lambda: heads, rows, config)
    rank = max(subject.data.adapter.hidden_size // 8, 1)
    changes = {
        "target_spade": replace(config, target="spade"),
        "target_final": replace(config, target="final"),
        "full": replace(config, form="full"),
        "low_rank": replace(config, form="low_rank", rank=rank),
        "bias": replace(config, form="bias"),
    }
    tuned = subject.tuned_lens()
    for name, changed in changes.items():
        if changed == config or (name == "low_rank" and config.form == "low_rank"):
            continue
        make = partial(_fit, subject, changed, rows)
        if name == "target_final" and tuned is not None and tuned.form == config.form:
            make = partial(_same, tuned)
        yield _of_heads(subject, name, _label(changed), make, rows, changed)


def _learning_curve(subject: Subject) -> Iterator[Ablation]:
    """The same heads from fewer training rows, in as many steps."""
    heads, config = subject.heads, _trained_as(subject)
    rows = len(subject.data.stored("train"))
    for part in sorted({max(int(rows * fraction), 1) for fraction in FRACTIONS} - {rows}):
        make = partial(_fit, subject, config, part)
        yield _of_heads(subject, f"{part}", f"{part:,} rows", make, part, config, group="rows")
    make = partial(_same, heads)
    yield _of_heads(subject, f"{rows}", f"{rows:,} rows", make, rows, config, group="rows")


def _of_heads(
    subject: Subject,
    name: str,
    label: str,
    make: Callable[[], LSpadeHeads],
    rows: int,
    config: HeadConfig,
    group: str = "heads",
) -> Ablation:
    settings = {"config": asdict(config), "steps": _steps(subject)}
    measure = partial(_measure_heads, subject, make)
    return Ablation(group, name, label, measure, rows, settings)


def _measure_heads(subject: Subject, make: Callable[[], LSpadeHeads]) -> dict[str, Any]:
    heads, adapter = make(), subject.data.adapter
    dataset = subject.states()
    readings = read_lenses(dataset, adapter.unembed, [HeadsLens(heads)], subject.layers)
    numbers = summarise(readings, adapter.vocab_size)["lenses"]["l_spade"]
    parameters = sum(parameter.numel() for parameter in heads.parameters())
    return {"parameters": parameters, **{name: numbers[name] for name in PER_LAYER}}


def _fit(subject: Subject, config: HeadConfig, rows: int) -> LSpadeHeads:
    dataset = subject.data.stored("train")
    if rows < len(dataset):
        generator = torch.Generator().manual_seed(subject.recipe.seed_everything)
        chosen = torch.randperm(len(dataset), generator=generator)[:rows].sort().values
        dataset = subset(dataset, chosen)
    return fit_heads(subject.recipe, config, dataset, subject.data.adapter, _steps(subject))


def _same(heads: LSpadeHeads) -> LSpadeHeads:
    return heads


def _trained_as(subject: Subject) -> HeadConfig:
    """The settings of the heads in hand: their own record, or the recipe where they have none."""
    training = subject.heads.metadata.get("training", {})
    known = training.get("recipe", {}).get("model")
    return HeadConfig(**known) if known else subject.recipe.model


def _steps(subject: Subject) -> int:
    """Optimiser steps of the fit that made the heads."""
    return int(subject.heads.metadata.get("training", {}).get("steps", 1000))


def _label(config: HeadConfig) -> str:
    form = f"rank {config.rank}" if config.form == "low_rank" else config.form
    return f"{form}, target {config.target}"
