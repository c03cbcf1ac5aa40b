"""Runs shallow copies of a model: its decoder without the blocks, its head on a given state.

Keeps nothing between runs.
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from lspade_train.errors import UnsupportedModelError
from lspade_train.models.plan import Plan
from lspade_train.models.shadow import with_blocks, without_checkpointing
from lspade_train.models.structure import Signature

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COLLECTED = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Configuration flags that make transformers collect outputs, with hooks it leaves on the model."""


class Recorder:
    """One model's decoder and blocks, run with other functions in place of the blocks.

    Args:
        model: the whole model.
        decoder: its decoder.
        blocks: the decoder's blocks.
    """

    def __init__(self, model: "PreTrainedModel", decoder: nn.Module, blocks: nn.ModuleList) -> None:
        self.model, self.decoder, self.blocks = model, decoder, blocks
        self._takes_positions = "position_ids" in inspect.signature(decoder.forward).parameters
        self._cache_name = cache_name(decoder.forward)

    def plan(
        self,
        signature: Signature,
        input_ids: Int[Tensor, "rows tokens"],
        mask: Int[Tensor, "rows seen"],
        positions: Int[Tensor, "rows tokens"],
        cache: DynamicCache | None,
    ) -> Plan:
        """Record the arguments that the decoder passes to each block, without running the blocks.

        Raises:
            UnsupportedModelError: the decoder does not call its blocks one by one.
        """
        seen: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append((hidden, args, kwargs))
            return signature.as_output(hidden)

        self._decode([record] * len(self.blocks), input_ids, mask, positions, cache)
        if len(seen) != len(self.blocks):
            raise _not_run(self.decoder)
        calls = tuple((args, kwargs) for _, args, kwargs in seen)
        return Plan(seen[0][0], calls, signature.per_row)

    def signature(self) -> Signature:
        """How the decoder calls its blocks, found by running the first one on 2 and on 3 rows.

        Raises:
            UnsupportedModelError: the decoder does not call its blocks one by one.
        """
        first: Callable[..., Any] = without_checkpointing(self.blocks[0]).forward
        outputs: list[Any] = []
        arguments: list[dict[str | int, Any]] = []

        def run_first(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            outputs.append(first(hidden, *args, **kwargs))
            arguments.append({**dict(enumerate(args)), **kwargs})
            return outputs[-1]

        def pass_on(*_: Any, **__: Any) -> Any:
            return outputs[-1]

        for rows in (2, 3):
            # Some of the tokens are padding, so that all masks are created.
            ids = torch.ones(rows, 5, dtype=torch.long, device=self._device)
            mask = torch.ones_like(ids)
            mask[1:, -1] = 0
            forwards = [run_first] + [pass_on] * (len(self.blocks) - 1)
            self._decode(forwards, ids, mask, mask.cumsum(-1) - 1, None)
        if len(outputs) != 2:
            raise _not_run(self.decoder)
        two, three = arguments
        per_row = {
            name: three[name].shape[0] - value.shape[0]
            for name, value in two.items()
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] > 1
        }
        size = len(outputs[0]) if isinstance(outputs[0], tuple) else None
        return Signature(size, {name: count for name, count in per_row.items() if count != 1})

    def unembed(
        self, signature: Signature, hidden: Float[Tensor, "rows tokens d"]
    ) -> Float[Tensor, "rows tokens vocab"]:
        """The whole model's logits if its last block returned `hidden`.

        Raises:
            UnsupportedModelError: the model does not call its blocks one by one.
        """
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self._device)
        reached: list[bool] = []

        def pass_on(state: Tensor, *_: Any, **__: Any) -> Any:
            return signature.as_output(state)

        def last(*_: Any, **__: Any) -> Any:
            reached.append(True)
            return signature.as_output(hidden)

        forwards = [pass_on] * (len(self.blocks) - 1) + [last]
        stage = with_blocks(self.model, self.blocks, forwards, hooks=True)
        logits = self.logits(stage, ids, torch.ones_like(ids))
        if not reached:
            raise _not_run(self.model)
        return logits

    def logits(
        self,
        model: nn.Module,
        input_ids: Int[Tensor, "rows tokens"],
        mask: Int[Tensor, "rows tokens"],
    ) -> Float[Tensor, "rows tokens vocab"]:
        """The logits of a full forward of `model`: the model itself, or a copy of it."""
        extra = self._extra((mask.cumsum(-1) - 1).clamp(min=0))
        return model(
            input_ids=input_ids, attention_mask=mask, use_cache=False, return_dict=True, **extra
        ).logits

    def _decode(
        self,
        forwards: list[Callable[..., Any]],
        input_ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: DynamicCache | None,
    ) -> None:
        stage = with_blocks(self.decoder, self.blocks, forwards, hooks=False)
        # Always pass the mask: without one, position ids with a gap are taken for two packed
        # sequences, and the start token is silently masked out.
        stage(
            input_ids=input_ids,
            attention_mask=mask,
            use_cache=cache is not None,
            **{self._cache_name: cache},
            **self._extra(positions),
        )

    @property
    def _device(self) -> torch.device:
        return cast(Tensor, self.model.get_input_embeddings().weight).device

    def _extra(self, positions: Tensor) -> dict[str, Any]:
        config = self.model.config.get_text_config(decoder=True)
        extra: dict[str, Any] = {n: False for n in COLLECTED if getattr(config, n, False)}
        return extra | ({"position_ids": positions} if self._takes_positions else {})


def cache_name(forward: Callable[..., Any]) -> str:
    """The decoder's name for its key-value cache: transformers 5.24 started renaming it."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def _not_run(decoder: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(decoder).__name__} does not run its own blocks: its forward was replaced by a "
        "function that is bound to something else.\n"
        "Expected a decoder-only model as transformers loads it; undo the replacement."
    )
