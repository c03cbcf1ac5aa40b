"""Loads a frozen model from the Hub or a folder, in a given precision and on a given device."""

import importlib.util
import logging
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lspade_train.errors import RecipeError
from lspade_train.io.storage import first_line
from lspade_train.models.checkpoint import load_checkpoint, load_without_blocks
from lspade_train.models.gguf import clear_gguf_marks, find_gguf, gguf_options
from lspade_train.models.structure import find_decoder
from lspade_train.models.unembedding import Unembedding, find_unembedding
from lspade_train.recipe import Quantization

log = logging.getLogger(__name__)

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
    gguf_file: str | None = None,
) -> "PreTrainedModel":
    """Load a Hub id or a folder; see `ModelAdapter.from_pretrained` for the arguments.

    Raises:
        RecipeError: no such device, or a package needed to read the weights is not installed.
        UnsupportedModelError: nothing there, not a causal language model, or weights that do not
            match the configuration.
    """
    where: Any = device_map or resolve_device(device)
    options: dict[str, Any] = {"device_map": device_map} if device_map else {}
    if quantization is not None:
        if gguf_file is not None:
            raise RecipeError(
                f"data.quantization is {quantization} and data.gguf_file is {gguf_file!r}: "
                "a GGUF file is quantised already.\nSet one of them to null."
            )
        # Quantised weights are created on their final device, as they cannot be moved like others.
        options = {
            "quantization_config": _bitsandbytes(quantization, dtype),
            "device_map": device_map or {"": where},
        }
    if gguf_file is not None:
        path = find_gguf(model_id, gguf_file, revision)
        model_id, revision = str(path.parent), None
        options |= gguf_options(path)
    model = load_checkpoint(
        model_id,
        revision=revision,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        trust_remote_code=trust_remote_code,
        **options,
    )
    if gguf_file is not None:
        clear_gguf_marks(model)
    if "device_map" not in options:
        nn.Module.to(model, where)
    _warn_of_emulation(model)
    return model


def _warn_of_emulation(model: "PreTrainedModel") -> None:
    """Warn if half precision is slower than float32: on an x86 processor that emulates it."""
    native: Callable[[], bool] = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    emulated = platform.machine() in {"x86_64", "AMD64"} and not native()
    if model.device.type == "cpu" and model.dtype.itemsize < 4 and emulated:
        log.warning(
            "model: this CPU emulates %s, which takes a multiple of float32's time. "
            "Set --data.dtype float32 to avoid it.",
            str(model.dtype).removeprefix("torch."),
        )


def model_folder(
    model_id: str, revision: str | None, *, gguf_file: str | None = None
) -> Path | None:
    """The local folder of a model's files; None if there is none (loading will raise)."""
    from transformers.utils.hub import cached_file

    name = gguf_file or "config.json"
    try:
        found = cached_file(model_id, name, revision=revision)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found).parents[len(Path(name).parts) - 1]


def hub_commit(model_id: str, revision: str | None, *, gguf_file: str | None = None) -> str | None:
    """The commit that a revision of a Hub id resolves to; None for a folder."""
    if Path(model_id).is_dir():
        return None
    folder = model_folder(model_id, revision, gguf_file=gguf_file)
    return None if folder is None else folder.name


def load_unembedding(folder: str, *, dtype: str, device: str) -> Unembedding:
    """The final norm and head of a model, without reading its blocks.

    The family's own class is created without blocks, so that its own code finds and names the rest.
    Compare the digest with that of the whole model: not every family may support this.

    Args:
        folder: the model's files.
        dtype: float32, bfloat16 or float16.
        device: auto (a GPU if there is one) or a torch device.

    Raises:
        UnsupportedModelError: norm or head are not in the files.
        Exception: any error of the family's code that is caused by having no blocks.
    """
    model = load_without_blocks(folder, dtype=getattr(torch, dtype))
    model.eval().requires_grad_(False)
    found = find_unembedding(model, find_decoder(model)[0])
    for part in found.modules:
        part.to(resolve_device(device))
    return found


def resolve_device(device: str) -> torch.device:
    """Resolve a device; `auto` is a GPU if there is one.

    Raises:
        RecipeError: no such device on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as cause:
        text = first_line(cause)
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
        # bitsandbytes logs a cast to half precision at every product of every block.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )
