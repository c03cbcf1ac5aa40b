"""The model card of a heads folder, from its JSON files alone. Independent of models and tensors.

Every command that changes the folder (fit, evaluate, calibrate, push) calls `write_card`; the text
is in `card.md.jinja`, the numbers come from here.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from yaml import YAMLError

from lspade_train.errors import ArtifactError
from lspade_train.io.layout import CARD, CONFIG, POLICY, RESULTS
from lspade_train.io.storage import read_json, write_text
from lspade_train.policies.audit import audit_of
from lspade_train.policies.promise import promise
from lspade_train.probes.lenses import label_of
from lspade_train.reporting.rows import rows_measured
from lspade_train.reporting.tables import exit_lens

TAGS = ["l-spade", "spade", "early-exit", "logit-lens", "interpretability", "text-generation"]
NO_LICENCE = "unknown"  # the Hub's own identifier
KEEP = "<!-- Generated above this line; what is written below it is kept. -->"
FIGURES = ("figures/accuracy_by_layer.png", "figures/agreement_by_layer.png")

Json = dict[str, Any]


def write_card(folder: Path, *, repo: str | None = None, license: str | None = None) -> None:
    """Rewrite `README.md` from the folder's current files.

    Args:
        folder: a heads folder.
        repo: `org/name` that the heads are loaded from; None: the folder.
        license: the Hub's identifier of a licence; None: the one in the existing card, or
            `unknown`. Never inherited from the base model.

    Raises:
        ArtifactError: a JSON file of the folder is damaged, or the card cannot be written.
    """
    write_text(folder / CARD, card(folder, repo=repo, license=license), ArtifactError)


def card(folder: Path, *, repo: str | None = None, license: str | None = None) -> str:
    """The card that `write_card` would write: YAML metadata and Markdown.

    Raises:
        ArtifactError: a JSON file of the folder is damaged, or not as this package writes it.
    """
    from jinja2 import TemplateError

    try:
        return _card(folder, repo, license)
    except (LookupError, TypeError, ValueError, AttributeError, TemplateError) as cause:
        raise ArtifactError(
            f"The JSON files in {folder} are not as lspade-train writes them ({cause!r:.100}).\n"
            "Write them again with lspade-train fit, evaluate and calibrate."
        ) from cause


def _card(folder: Path, repo: str | None, license: str | None) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    config = read_json(folder / CONFIG, ArtifactError)
    training, base = config.get("training", {}), config.get("base_model", {})
    recipe, data = training.get("recipe", {}), training.get("data", {})
    results, policy = (_of_these_heads(folder / name, config) for name in (RESULTS, POLICY))
    licence, added = _present(folder / CARD)
    on_hub = base.get("revision") is not None  # no commit is recorded for a folder
    base_name = base["model_id"] if on_hub else Path(base.get("model_id", "the model")).name
    name = repo.split("/")[-1] if repo else recipe.get("name") or folder.name
    # model-index names the training data set: results on others are only in the table.
    asked = recipe.get("data", {})
    same = all(results.get(key) == asked.get(key) for key in ("task", "dataset"))
    metadata = ModelCardData(
        library_name="lspade-train",
        license=license or licence or NO_LICENCE,
        base_model=base_name if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        datasets=[data["dataset"]] if data.get("dataset") else None,
        pipeline_tag="text-generation",
        tags=TAGS,
        model_name=name,
        eval_results=_measured(recipe, data, results if same else {}, policy) or None,
    )
    text = ModelCard.from_template(
        metadata,
        template_str=files("lspade_train.artifacts")
        .joinpath("card.md.jinja")
        .read_text(encoding="utf-8"),
        name=name,
        repo=repo,
        where=repo or (folder.name if folder.is_absolute() else folder.as_posix()),
        config=config,
        layers=ranges(config["layers"]),
        base=base,
        base_name=base_name,
        base_path=base_name if on_hub else f"path/to/{base_name}",
        on_hub=on_hub,
        training=training,
        recipe=recipe,
        data=data,
        results=results,
        rows=rows_measured(results) if results else None,
        table=_layer_table(results) if results else _training_table(training),
        figure=next((name for name in FIGURES if (folder / name).is_file()), None),
        policy=policy,
        check_layers=ranges(policy.get("layers", [])),
        decoder=_decoder_words(policy),
        thresholds=_as_list(policy.get("threshold")),
        measure=_measure_words(policy),
        chosen=policy.get("calibration", {}),
        promise=promise(policy.get("calibration", {}), audit_of(folder)),
        policy_rows=_policy_rows(results, policy),
        over_choices=recipe.get("model", {}).get("scope") == "choices",
        of_others=[
            name
            for name, value in ((RESULTS, results), (POLICY, policy))
            if not value and (folder / name).exists()
        ],
    )
    blocks = re.sub(r"\n{3,}", "\n\n", str(text)).rstrip()
    return f"{blocks}\n\n{KEEP}{added}"


def ranges(layers: Sequence[int]) -> str:
    """`1-3, 7` for [1, 2, 3, 7]."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _of_these_heads(path: Path, config: Json) -> Json:
    """A file's content; empty if it does not exist or belongs to other heads."""
    if not path.exists():
        return {}
    value = read_json(path, ArtifactError, f"Delete it, or write {path.name} again.")
    about = value.get("heads_digest") or value.get("heads", {}).get("weights_sha256")
    return value if about in {None, config.get("weights_sha256")} else {}


def _present(path: Path) -> tuple[str | None, str]:
    """The existing card's licence, and the text below its generated part."""
    from huggingface_hub import ModelCard

    try:
        text = path.read_text(encoding="utf-8")
        return ModelCard(text).data.get("license"), text.partition(KEEP)[2] or "\n"
    except (OSError, ValueError, YAMLError):  # missing, or not a card
        return None, "\n"


@dataclass(frozen=True)
class _Measured:
    """The policy's figures on some rows.

    Attributes:
        split: split of the data set.
        where: the rows in words.
        flattered: whether these rows chose the policy, which biases the figures.
        row: the figures.
    """

    split: str
    where: str
    flattered: bool
    row: Json


def _policy_rows(results: Json, policy: Json) -> list[_Measured]:
    """The policy's figures: from `evaluate`, then from the rows on which it was selected."""
    found: list[_Measured] = []
    measured = (results.get("exits") or {}).get("policy") or {}
    if measured.get("row"):
        split = results["split"]
        # Older results do not record this: policies are selected on validation rows only.
        flattered = measured.get("chosen_on_these_rows", split == "validation")
        found.append(_Measured(split, rows_measured(results), flattered, measured["row"]))
    record = policy.get("calibration", {})
    if record.get("chosen"):
        rows = record.get("rows", {"split": "validation"})
        split, where = rows["split"], rows_measured(rows)
        if record.get("audited"):  # lspade-train audit --recalibrate
            split, where = "audited", "audited production rows"
        found.append(_Measured(split, where, True, record["chosen"]))
    return found


def _measure_words(policy: Json) -> Json:
    """How a value that exits compares to its threshold, and its unit, in words."""
    from lspade_train.probes.measures import MEASURES

    # A shared policy's measure may not be registered here.
    known = MEASURES.get(policy.get("measure", "entropy"))
    return {
        "relation": known.relation if known else "as certain as",
        "unit": known.unit if known else "",
    }


def _decoder_words(policy: Json) -> str:
    """The decoder in words; layer by layer if the layers differ."""
    decoder = policy.get("decoder", "spade")
    words = decoder if isinstance(decoder, list) else [decoder]
    names = ["SPADE" if word == "spade" else f"the {word} head" for word in words]
    if len(set(names)) == 1:
        return names[0]
    layers = policy.get("layers", [])
    return ", ".join(f"{n} (layer {x})" for n, x in zip(names, layers, strict=False))


def _layer_table(results: Json) -> Json:
    """Every lens by layer: accuracy (agreement with the model without labels); the heads' KL."""
    metric = "accuracy" if results["n_labelled"] else "agrees_model"
    lenses, heads = results["lenses"], exit_lens(results)
    if any(lens[metric] is None for lens in lenses.values()):  # heads fitted over the choices
        metric = "answer_agrees_model"
    rows: list[list[str]] = []
    for place, layer in enumerate(results["layers"]):
        cells = [_cell(lens, metric, place) for lens in lenses.values()]
        kl = (lenses[heads]["kl_to_spade"] or {place: None})[place]
        rows.append([str(layer), *cells, "-" if kl is None else f"{kl:.3f}"])
    header = ["layer", *map(label_of, lenses), f"KL of {label_of(heads)} to SPADE (nats)"]
    what = "Accuracy" if metric == "accuracy" else "Agreement with the full model"
    level = (results.get("interval") or {}).get("level")
    return {"what": what, "header": header, "rows": rows, "level": level}


def _training_table(training: Json) -> Json | None:
    """Validation metrics at the end of fit."""
    found: dict[str, list[float]] = {}
    for name, value in sorted(training.get("metrics", {}).items()):
        kind, _, layer = name.removeprefix("val/").partition("/layer_")
        if layer and kind in {"kl", "agreement"}:
            found.setdefault(layer, []).append(value)  # agreement sorts before kl
    rows = [[str(int(layer)), *(f"{v:.3f}" for v in values)] for layer, values in found.items()]
    header = ["layer", "agreement with the target", "KL to the target (nats)"]
    return {"what": "Validation after training", "header": header, "rows": rows} if rows else None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _cell(lens: Json, metric: str, place: int) -> str:
    """A number, with its interval if there is one."""
    text, interval = f"{lens[metric][place]:.3f}", lens.get(f"{metric}_interval")
    return text if not interval else f"{text} [{interval[place][0]:.3f}, {interval[place][1]:.3f}]"


def _measured(recipe: Json, data: Json, results: Json, policy: Json) -> list[Any]:
    """The numbers of `model-index`: the deepest head, and the policy at work."""
    from huggingface_hub import EvalResult

    task = recipe.get("data", {}).get("task") or "text"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=data.get("dataset") or task,
            dataset_name=task,
            dataset_config=data.get("subset"),
            dataset_split=split,
            dataset_revision=data.get("dataset_revision"),
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for split, kind, name, value in [*_of_the_heads(results), *_of_the_policy(results, policy)]
        if value is not None
    ]


def _of_the_heads(results: Json) -> Iterator[tuple[str, str, str, float | None]]:
    """Split, kind, name and value of each metric of the deepest head."""
    if results:
        key, deepest = exit_lens(results), results["layers"][-1]
        lens = results["lenses"][key]
        for kind, name in (("accuracy", "accuracy"), ("agrees_model", "agreement with the model")):
            value = lens[kind][-1] if lens[kind] else None  # without labels there is no accuracy
            yield results["split"], kind, f"{label_of(key)} {name}, layer {deepest}", value


def _of_the_policy(results: Json, policy: Json) -> Iterator[tuple[str, str, str, float | None]]:
    """The same of the exit policy, where it was chosen and where it was measured."""
    names = {
        "accuracy": "accuracy",
        "disagreement": "answers unlike the model's",
        "compute_saved": "FLOPs saved",
    }
    for found in _policy_rows(results, policy):
        whose = ", on the selection rows (optimistic)" if found.flattered else ""
        for kind, name in names.items():
            yield found.split, kind, f"{name} with the exit policy{whose}", found.row[kind]
