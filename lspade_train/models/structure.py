"""Where a model keeps its decoder and its blocks, and how its blocks are called.

Knows nothing of plans or of what runs between the blocks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lspade_train.errors import UnsupportedModelError
from lspade_train.models.shadow import with_blocks, without_checkpointing

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
        UnsupportedModelError: the model is not a decoder-only one.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder: its answer is the decoder's first "
            "token, so that start token and answer are one and SPADE has nothing to leave out.\n"
            "Set data.model_id to a decoder-only model such as Llama, Qwen or GPT-2."
        )
    decoder = model.get_decoder()
    layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    # Llama-4 hands out the text model with its head: the decoder is one step further in.
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
    """How a family calls its blocks, as seen in two calls that differ in their rows only.

    Attributes:
        outputs: length of the tuple that a block returns; None where it returns the state alone.
        per_row: for arguments (by name or place) whose first dimension is not simply the row, its
            entries per row: BLOOM's ALiBi has one per head, MPT's has none and looks like rows
            where a batch has as many rows as the model has heads.
    """

    outputs: int | None
    per_row: Mapping[str | int, int]

    def as_output(self, hidden: Tensor) -> Any:
        """A state as the blocks return it."""
        return hidden if self.outputs is None else (hidden, *[None] * (self.outputs - 1))


def refuse_dropout(model: nn.Module) -> None:
    """Only a model that gives the same answer twice can be driven block by block.

    Raises:
        UnsupportedModelError: a module is in training mode and drops values at random.
    """
    for name, module in model.named_modules():
        if not module.training:
            continue
        drops = "drop" in type(module).__name__.lower()  # a module for it, whose rate is `p`
        rates = [v for k, v in vars(module).items() if "drop" in k or (drops and k == "p")]
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            raise UnsupportedModelError(
                f"{type(model).__name__} is in training mode and drops values at random "
                f"({name or 'itself'}), so that no two of its answers agree.\n"
                "Call model.eval() first: expected a decoder-only model with one answer."
            )


def find_signature(
    decoder: nn.Module, blocks: nn.ModuleList, call: Callable[[nn.Module, int], object]
) -> Signature:
    """How a decoder calls its blocks, found by running the first one on 2 and on 3 rows.

    Args:
        decoder: holds `blocks`.
        blocks: its blocks.
        call: runs a decoder on so many rows of padded tokens.

    Raises:
        UnsupportedModelError: it does not run these blocks.
    """
    first: Callable[..., Any] = without_checkpointing(blocks[0]).forward
    outputs: list[Any] = []
    arguments: list[dict[str | int, Any]] = []

    def run_first(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        outputs.append(first(hidden, *args, **kwargs))
        arguments.append({**dict(enumerate(args)), **kwargs})
        return outputs[-1]

    def pass_on(*_: Any, **__: Any) -> Any:
        return outputs[-1]

    stage = with_blocks(decoder, blocks, [run_first] + [pass_on] * (len(blocks) - 1), hooks=False)
    for rows in (2, 3):
        call(stage, rows)
    if len(outputs) != 2:
        raise not_run(decoder)
    two, three = arguments
    per_row = {
        name: three[name].shape[0] - value.shape[0]
        for name, value in two.items()
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] > 1
    }
    size = len(outputs[0]) if isinstance(outputs[0], tuple) else None
    return Signature(size, {name: count for name, count in per_row.items() if count != 1})


def not_run(decoder: nn.Module) -> UnsupportedModelError:
    """For a decoder whose `forward` does not go through the blocks that it holds."""
    return UnsupportedModelError(
        f"{type(decoder).__name__} does not run its own blocks: its forward was replaced by a "
        "function that is bound to something else.\n"
        "Expected a decoder-only model as transformers loads it; undo the replacement."
    )
