"""Where a model keeps its decoder and its blocks, and how its blocks are called.

Knows nothing of plans or of what runs between the blocks.
"""

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lspade_train.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_decoder(model: "PreTrainedModel") -> tuple[nn.Module, nn.ModuleList]:
    """The decoder and its blocks; in a multimodal model, those of its text tower.

    Raises:
        UnsupportedModelError: the model is no decoder-only one.
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


class Stage:
    """A decoder's blocks, which others may stand in for while the decoder runs."""

    def __init__(self, blocks: nn.ModuleList, call: Callable[[int], object]) -> None:
        """Keep the blocks; `call(rows)` runs the decoder on a few padded tokens."""
        self.blocks = blocks
        self.lock = threading.RLock()  # the blocks are the model's: one recording at a time
        self._call = call

    @cached_property
    def signature(self) -> Signature:
        """Found by running the first block on 2 and on 3 rows, the others standing still."""
        first: Callable[..., Any] = self.blocks[0].forward
        outputs: list[Any] = []
        arguments: list[dict[str | int, Any]] = []

        def watch(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            outputs.append(first(hidden, *args, **kwargs))
            arguments.append({**dict(enumerate(args)), **kwargs})
            return outputs[-1]

        def stand_still(*_: Any, **__: Any) -> Any:
            return outputs[-1]

        with self.replaced([watch] + [stand_still] * (len(self.blocks) - 1)):
            for rows in (2, 3):
                self._call(rows)
        two, three = arguments
        per_row = {
            name: three[name].shape[0] - value.shape[0]
            for name, value in two.items()
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] > 1
        }
        size = len(outputs[0]) if isinstance(outputs[0], tuple) else None
        return Signature(size, {name: count for name, count in per_row.items() if count != 1})

    def as_output(self, hidden: Tensor) -> Any:
        """A state as the blocks return it."""
        size = self.signature.outputs
        return hidden if size is None else (hidden, *[None] * (size - 1))

    @contextmanager
    def replaced(self, forwards: Sequence[Callable[..., Any]]) -> Generator[None]:
        """Let `forwards` stand in for the blocks."""
        with self.lock:
            # accelerate's hooks are instance attributes named `forward` too: put them back.
            kept = [block.__dict__.get("forward") for block in self.blocks]
            try:
                for block, forward in zip(self.blocks, forwards, strict=True):
                    block.__dict__["forward"] = forward
                yield
            finally:
                for block, forward in zip(self.blocks, kept, strict=True):
                    if forward is None:
                        del block.__dict__["forward"]
                    else:
                        block.__dict__["forward"] = forward
