"""Where a model keeps its decoder and its blocks, and how its blocks are called.

Independent of plans and of what runs between the blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lspade_train.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unwrapped(model: Any) -> "PreTrainedModel":
    """The model inside `DataParallel`, `DistributedDataParallel` or `torch.compile`.

    Raises:
        UnsupportedModelError: it is not a transformers model.
    """
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.Module) and hasattr(model, "config") and hasattr(model, "get_decoder"):
        return model  # type: ignore[return-value]
    raise UnsupportedModelError(
        f"Got a {type(model).__name__}; expected a decoder-only transformers model, such as "
        "AutoModelForCausalLM.from_pretrained returns."
    )


def find_decoder(model: "PreTrainedModel") -> tuple[nn.Module, nn.ModuleList]:
    """The decoder and its blocks; in a multimodal model, those of its text tower.

    Raises:
        UnsupportedModelError: the model is not decoder-only.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder: its answer is the decoder's first "
            "token, so that start token and answer are one and SPADE has nothing to leave out.\n"
            "Set data.model_id to a decoder-only model such as Llama, Qwen or GPT-2."
        )
    decoder = model.get_decoder()
    layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    # Llama-4 returns the text model with its head: the decoder is one level further in.
    for candidate in (decoder, getattr(decoder, "model", None)):
        for child in candidate.children() if isinstance(candidate, nn.Module) else ():
            if isinstance(child, nn.ModuleList) and len(child) == layers:
                return candidate, child  # type: ignore[return-value]
    raise UnsupportedModelError(
        f"No list of {layers} blocks in {type(decoder).__name__} ({model.config.model_type}); "
        "expected a decoder-only model. Set data.model_id to one."
    )


@dataclass(frozen=True)
class Signature:
    """How a family calls its blocks, found from two calls that differ only in the number of rows.

    Attributes:
        outputs: length of the tuple that a block returns; None if it returns the state alone.
        per_row: for arguments (by name or index) whose first dimension is not simply the row, its
            entries per row: BLOOM's ALiBi has one per head; MPT's has none, and looks like rows if
            a batch has as many rows as the model has heads.
    """

    outputs: int | None
    per_row: Mapping[str | int, int]

    def as_output(self, hidden: Tensor) -> Any:
        """A state in the form that the blocks return."""
        return hidden if self.outputs is None else (hidden, *[None] * (self.outputs - 1))


def refuse_dropout(model: nn.Module) -> None:
    """Raise if dropout is active: only a deterministic model can be run block by block.

    Raises:
        UnsupportedModelError: a dropout module is in training mode.
    """
    for name, module in model.named_modules():
        if not module.training:
            continue
        drops = "drop" in type(module).__name__.lower()  # a dropout module, whose rate is `p`
        rates = [v for k, v in vars(module).items() if "drop" in k or (drops and k == "p")]
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            raise UnsupportedModelError(
                f"{type(model).__name__} is in training mode and drops values at random "
                f"({name or 'itself'}), so that no two of its answers agree.\n"
                "Call model.eval() first: expected a decoder-only model with one answer."
            )
