"""Identifies a frozen model, without reading all of its weights."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lspade_train.io.storage import json_digest
from lspade_train.io.tensors import tensor_digest
from lspade_train.models.offloading import stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RUNS, RUN = 64, 2048  # a run of consecutive values is one page or two of a memory-mapped file
VOLATILE = {"transformers_version", "architectures", "dtype"}
"""Configuration keys that do not identify a model. The dtype is a separate entry."""


def model_identity(model: "PreTrainedModel", unembedding: str) -> dict[str, str]:
    """Digests of configuration, weights and unembedding, with dtype and quantisation.

    Weights are parameters and, if quantised, their scales. They are sampled: 64 runs of 2,048
    values spread over every tensor, which covers tensors of up to 131,072 values completely. A LoRA
    merge or fine-tuning changes nearly every value of the matrices it touches, and is detected even
    if bfloat16 rounds away all but one change in 10,000; an edit of a few rows of a large matrix
    may be missed. Values are rounded to bfloat16 first, so that a checkpoint loaded in float32 and
    in bfloat16 has the same digest.

    Args:
        model: the frozen model.
        unembedding: digest of its norm and head.
    """
    config = {
        name: value
        for name, value in model.config.to_dict().items()
        if not name.startswith("_") and name not in VOLATILE
    }
    if quantization(model) is None:
        config.pop("quantization_config", None)
    return {
        "quantization": quantization(model) or "none",
        "model_config": json_digest(_jsonable(config)),
        "model_weights": tensor_digest(*map(_sample, stored(model))),
        "unembedding": unembedding,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def quantization(model: "PreTrainedModel") -> str | None:
    """How the blocks' weights are quantised, such as `bitsandbytes int8`; None if they are not.

    The libraries leave norm and unembedding unquantised by default; the load-time check tests it.
    """
    settings = getattr(model.config, "quantization_config", None)
    if settings is None:
        return None
    known = settings if isinstance(settings, dict) else settings.to_dict()
    method = known["quant_method"]
    if known.get("dequantize"):
        return None  # dequantised while loading, but the settings remain
    bits = {"load_in_8bit": " int8", "load_in_4bit": " int4"}
    width = "".join(text for key, text in bits.items() if known.get(key))
    return getattr(method, "value", str(method)) + width


def _sample(value: Tensor) -> Tensor:
    flat = _plain(value).reshape(-1)
    if len(flat) > RUNS * RUN:
        step = len(flat) // RUNS
        flat = flat[: step * RUNS].reshape(RUNS, step)[:, :RUN]
    return (flat.bfloat16() if flat.is_floating_point() else flat).cpu()


def _plain(value: Tensor) -> Tensor:
    """A plain tensor: quantised tensor classes are dequantised."""
    known = type(value) in (Tensor, nn.Parameter)
    return value.detach() if known or not hasattr(value, "dequantize") else value.dequantize()


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value if isinstance(value, str | int | bool | None) else repr(value)
