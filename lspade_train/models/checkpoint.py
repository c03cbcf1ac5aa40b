"""Loads checkpoints whose weights match the configuration exactly, or raises a named error.

transformers initialises missing weights at random with a warning; here that is an error.
Independent of devices, precisions and quantisation.
"""

import logging
import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from lspade_train.errors import UnsupportedModelError
from lspade_train.io.hub_names import near_model
from lspade_train.io.storage import first_line, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LFS_POINTER = b"version https://git-lfs.github.com/"
WEIGHTS = {".safetensors", ".bin", ".gguf"}
READ = WEIGHTS | {".json", ".model", ".txt", ".jinja"}

log = logging.getLogger(__name__)


def load_checkpoint(model_id: str, **options: Any) -> "PreTrainedModel":
    """`AutoModelForCausalLM.from_pretrained`, for a checkpoint that matches its configuration.

    Tied weights and buffers that the model computes are not expected in the files.

    Args:
        model_id: Hub id or folder; for a folder with a PEFT adapter its base model is loaded, too.
        **options: options of transformers.

    Raises:
        UnsupportedModelError: nothing to load there, a damaged file, or weights that are missing,
            unexpected or of another shape.
    """
    base = _base_of_adapter(model_id)
    model, report = _load(base or model_id, options)
    require_complete(options.get("gguf_file") or base or model_id, model, report)
    if base is not None:
        try:
            model.load_adapter(model_id)
        except Exception as cause:
            raise UnsupportedModelError(load_failure("model", model_id, cause)) from cause
    return model


def load_without_blocks(folder: str, **options: Any) -> "PreTrainedModel":
    """A model without blocks: everything else is loaded, the blocks' weights are not read.

    Args:
        folder: the model's files.
        **options: options of transformers.

    Raises:
        UnsupportedModelError: the files cannot be read, or lack weights outside the blocks.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = 0
    if getattr(text, "layer_types", None):
        text.layer_types = []
    model, report = _load(folder, options | {"config": config})
    require_complete(folder, model, report | {"unexpected_keys": set()})
    return model


def require_complete(model_id: str, model: "PreTrainedModel", report: dict[str, Any]) -> None:
    """Raise if the load report lists missing, unexpected or mismatched weights.

    Args:
        model_id: name for the message.
        model: the loaded model.
        report: transformers' loading info.

    Raises:
        UnsupportedModelError: there are such weights.
    """
    if report["missing_keys"]:
        raise UnsupportedModelError(
            f"{model_id} is missing weights that its configuration requires: "
            f"{_listed(report['missing_keys'])}.\n"
            "They would be initialised at random. Download the checkpoint again, or correct its "
            "config.json."
        )
    if report["mismatched_keys"]:
        name, got, expected = min(report["mismatched_keys"])
        raise UnsupportedModelError(
            f"{model_id} holds {name} of shape {tuple(got)}, but its configuration expects "
            f"{tuple(expected)}{_more(len(report['mismatched_keys']) - 1)}.\n"
            "Download the checkpoint again, or correct its config.json."
        )
    ours, foreign = _by_owner(model, report["unexpected_keys"])
    if ours:
        raise UnsupportedModelError(
            f"{model_id} holds weights that its configuration has no place for: {_listed(ours)}.\n"
            "They would be left out. Download the checkpoint again, or correct its config.json."
        )
    if foreign:
        log.warning("%s: not part of the language model, left out: %s", model_id, _listed(foreign))


def load_failure(
    what: Literal["model", "tokenizer"], place: str, cause: Exception, gguf_file: str | None = None
) -> str:
    """The error message for a model or tokenizer that could not be loaded.

    Args:
        what: model or tokenizer.
        place: Hub id or folder.
        cause: transformers' exception.
        gguf_file: path of the GGUF file that it was read from.
    """
    text = first_line(cause)
    if "Unrecognized configuration class" in text:
        return (
            f"{place} is not a decoder-only causal language model "
            "(AutoModelForCausalLM has no class for it). Set data.model_id to one."
        )
    if isinstance(cause, torch.OutOfMemoryError):
        return (
            f"{place} does not fit in memory: {text}\n"
            "Use a narrower data.dtype, data.quantization, or data.device_map auto."
        )
    found = f"No {what} could be loaded from {gguf_file or repr(place)}: {text}\n"
    if gguf_file is not None:
        expected = "a complete GGUF file of a decoder-only model that transformers can read"
        return _damage([Path(gguf_file)]) or f"{found}Expected {expected}; check data.gguf_file."
    folder = Path(place)
    files = "config.json and weights" if what == "model" else "tokenizer.json"
    return (
        _damage(sorted(folder.iterdir()) if folder.is_dir() else [])
        or f"{found}Expected a Hub id that you can reach or a folder with {files}; "
        f"check data.model_id{near_model(place)}"
    )


def _damage(paths: Iterable[Path]) -> str | None:
    """Message for the first file that is not of the type its name says; None if there is none."""
    for path in paths:
        if path.suffix not in READ or not path.is_file():
            continue
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            return (
                f"{path} is a Git LFS pointer, not the actual file.\n"
                f"Run git lfs pull in {path.parent}, or download the model again."
            )
        why = "it is empty" if not start else _broken(path, start)
        if path.suffix in WEIGHTS and why:
            return f"{path} is not a complete weights file ({why}).\nDownload it again."
    return None


def _broken(path: Path, start: bytes) -> str | None:
    if path.suffix == ".gguf" and not start.startswith(b"GGUF"):
        return "it does not start with GGUF"
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt"):
            return None
    except (OSError, SafetensorError) as cause:
        return first_line(cause)


def _load(model_id: str, options: dict[str, Any]) -> tuple["PreTrainedModel", dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    try:
        with _quiet_report():
            # transformers' own error for mismatched shapes does not name the weights.
            found: Any = AutoModelForCausalLM.from_pretrained(
                model_id, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
            return found
    except Exception as cause:  # transformers raises many kinds of errors for broken files
        gguf_file = options.get("gguf_file")
        raise UnsupportedModelError(load_failure("model", model_id, cause, gguf_file)) from cause


@contextmanager
def _quiet_report() -> Generator[None]:
    """Keep transformers from printing its load report, which `require_complete` evaluates."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_not_the_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_not_the_report)
    try:
        yield
    finally:
        logger.removeFilter(is_not_the_report)


def _base_of_adapter(model_id: str) -> str | None:
    """The base model of a folder with only a PEFT adapter; None for anything else.

    Loading both in one call, transformers would report on the adapter's weights only.
    """
    config = Path(model_id) / "adapter_config.json"
    if not config.is_file() or (Path(model_id) / "config.json").exists():
        return None
    return read_json(config, UnsupportedModelError).get("base_model_name_or_path")


def _by_owner(model: "PreTrainedModel", names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names that belong to a module of the model, and names of parts that it does not have.

    A vision tower next to a text model is left out on purpose; a block beyond the configured number
    is not.
    """
    parts = {n for module in (model, model.base_model) for n, _ in module.named_children()}
    ours = [name for name in names if name.partition(".")[0] in parts]
    return ours, sorted(set(names) - set(ours))


def _listed(names: Iterable[str], most: int = 4) -> str:
    """The first few names, with the tensors of a block grouped into one entry."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        block = re.match(r"(.*?\.\d+\.)", name)
        groups.setdefault(block[1] if block else name, []).append(name)
    shown = [
        found[0] if len(found) == 1 else f"{group}* ({len(found)} tensors)"
        for group, found in groups.items()
    ]
    return ", ".join(shown[:most]) + _more(len(shown) - most)


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
