"""What tells one frozen model from another, without reading all of its weights."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lspade_train.io.storage import json_digest, tensor_digest
from lspade_train.models.offloading import stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOLATILE = {"transformers_version", "dtype"}  # of the configuration; the dtype has its own entry


def model_identity(model: "PreTrainedModel", unembedding: str) -> dict[str, str]:
    """Digests of configuration, weights and unembedding, with dtype and quantisation.

    Weights are parameters and, where they are quantised, the scales beside them.

    The weights are sampled (64 values of every tensor): a fine-tuned or merged model differs in
    nearly all of them, and 140 GB need not be read.

    Args:
        model: the frozen model.
        unembedding: digest of its norm and head.
    """
    config = {
        name: value
        for name, value in model.config.to_dict().items()
        if not name.startswith("_") and name not in VOLATILE
    }
    return {
        "quantization": quantization(model) or "none",
        "model_config": json_digest(_jsonable(config)),
        "model_weights": tensor_digest(*map(_sample, stored(model))),
        "unembedding": unembedding,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def quantization(model: "PreTrainedModel") -> str | None:
    """How the blocks' weights are quantised, such as `bitsandbytes int8`; None where they aren't.

    Norms and unembedding stay as they are by the libraries' defaults; the check proves it.
    """
    settings = getattr(model.config, "quantization_config", None)
    if settings is None:
        return None
    known = settings if isinstance(settings, dict) else settings.to_dict()
    method = known["quant_method"]
    bits = {"load_in_8bit": " int8", "load_in_4bit": " int4"}
    width = "".join(text for key, text in bits.items() if known.get(key))
    return getattr(method, "value", str(method)) + width


def _sample(value: Tensor) -> Tensor:
    flat = _plain(value).reshape(-1)
    stride = max(len(flat) // 64, 1)
    return flat[::stride][:64].cpu()


def _plain(value: Tensor) -> Tensor:
    """A tensor of numbers: quantised tensor classes give back what they stand for."""
    known = type(value) in (Tensor, nn.Parameter)
    return value.detach() if known or not hasattr(value, "dequantize") else value.dequantize()


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value if isinstance(value, str | int | bool | None) else repr(value)
