"""A frozen model from the Hub or a folder, in the precision and on the device asked for."""

import importlib.util
import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lspade_train.errors import RecipeError, UnsupportedModelError
from lspade_train.models.structure import find_decoder
from lspade_train.models.unembedding import Unembedding, find_unembedding
from lspade_train.recipe import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(
    model_id: str,
    *,
    revision: str | None,
    dtype: str,
    device: str,
    device_map: str | None,
    quantization: Quantization | None,
    trust_remote_code: bool,
) -> "PreTrainedModel":
    """Load a Hub id or a folder; `ModelAdapter.from_pretrained` says what the arguments are.

    Raises:
        RecipeError: no such device, or no bitsandbytes for a quantised model.
        UnsupportedModelError: nothing there, or no causal language model.
    """
    from transformers import AutoModelForCausalLM

    where: Any = device_map or resolve_device(device)
    options: dict[str, Any] = {"device_map": device_map} if device_map else {}
    if quantization is not None:
        # Quantised weights are made where they stay: they cannot be moved like others.
        options = {
            "quantization_config": _bitsandbytes(quantization, dtype),
            "device_map": device_map or {"": where},
        }
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_id,
            revision=revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            **options,
        )
    except (OSError, ValueError, ImportError) as cause:
        raise UnsupportedModelError(_load_failure(model_id, cause)) from cause
    if not options:
        nn.Module.to(model, where)
    return model


def model_folder(model_id: str, revision: str | None) -> Path | None:
    """The local folder of a model's files; None where there is none, as loading it will say."""
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(model_id, "config.json", revision=revision)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found).parent


def hub_commit(model_id: str, revision: str | None) -> str | None:
    """The commit that a Hub id and a revision stand for; None for a folder."""
    folder = None if Path(model_id).is_dir() else model_folder(model_id, revision)
    return None if folder is None else folder.name


def load_unembedding(folder: str, *, dtype: str, device: str) -> Unembedding:
    """The final norm and head of a model, its blocks left unread.

    The family's own class is made without blocks, so that its own code finds and names the rest.
    Whoever calls compares the digest with that of the whole model: not every family need allow it.

    Args:
        folder: the model's files.
        dtype: float32, bfloat16 or float16.
        device: auto (a GPU when there is one) or a torch device.

    Raises:
        Exception: whatever the family's code says to having no blocks.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = 0
    if getattr(text, "layer_types", None):
        text.layer_types = []
    with _unread_weights_unsaid():
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=getattr(torch, dtype)
        )
    model.eval().requires_grad_(False)
    found = find_unembedding(model, find_decoder(model)[0])
    for part in found.modules:
        part.to(resolve_device(device))
    return found


@contextmanager
def _unread_weights_unsaid() -> Generator[None]:
    """Keep transformers from listing every weight of every block as unexpected."""
    logger = logging.getLogger("transformers.modeling_utils")

    def says_something_else(record: logging.LogRecord) -> bool:
        return "UNEXPECTED" not in record.getMessage()

    logger.addFilter(says_something_else)
    try:
        yield
    finally:
        logger.removeFilter(says_something_else)


def resolve_device(device: str) -> torch.device:
    """`auto` is a GPU where there is one.

    Raises:
        RecipeError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as cause:
        text = str(cause).splitlines()[0]
        raise RecipeError(
            f"data.device is {device!r}, which cannot be used here ({text[:200]}).\n"
            "Expected auto, cpu or a device such as cuda:0."
        ) from cause


def _bitsandbytes(quantization: Quantization, dtype: str) -> Any:
    missing = [n for n in ("bitsandbytes", "accelerate") if importlib.util.find_spec(n) is None]
    if missing:
        raise RecipeError(
            f"data.quantization is {quantization}, which needs {' and '.join(missing)}.\n"
            "Install with: pip install 'lspade-train[quantization]', or set it to null."
        )
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        # It tells of a cast to half precision at every product of every block.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )


def _load_failure(model_id: str, cause: Exception) -> str:
    text = (str(cause).splitlines() or [type(cause).__name__])[0]
    if "Unrecognized configuration class" in text:
        return (
            f"{model_id} is not a decoder-only causal language model "
            "(AutoModelForCausalLM has no class for it). Set data.model_id to one."
        )
    return (
        f"No model could be loaded from {model_id!r}: {text}\n"
        "Expected a Hub id that you can reach or a folder with config.json and weights; "
        "check data.model_id."
    )
