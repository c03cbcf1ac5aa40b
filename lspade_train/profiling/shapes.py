"""Inputs for timing: batches of one shape, and the original model as a baseline.

The original model is a second, unmodified load of the same weights: changes to the runtime's own
model, such as `requires_grad_(False)`, may affect the speed of its forward.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from lspade_train import tasks
from lspade_train.errors import UnsupportedModelError
from lspade_train.models import ModelAdapter
from lspade_train.models.loading import load_model
from lspade_train.recipe import DataConfig
from lspade_train.runtime.batching import Batch, Query, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def untouched(config: DataConfig) -> "PreTrainedModel":
    """The recipe's model as loaded by transformers: the baseline.

    Raises:
        UnsupportedModelError: no model can be loaded.
    """
    return load_model(
        config.model_id,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        device_map=config.device_map,
        quantization=config.quantization,
        trust_remote_code=config.trust_remote_code,
        gguf_file=config.gguf_file,
    )


def check_baseline(plain: "PreTrainedModel", adapter: ModelAdapter) -> None:
    """Refuse a baseline that is the runtime's own model, or a different model.

    Raises:
        UnsupportedModelError: it is one of these.
    """
    remedy = "Load the same model again: AutoModelForCausalLM.from_pretrained(...)."
    mine, theirs = dict(adapter.model.named_parameters()), dict(plain.named_parameters())
    places = [{p.data_ptr() for p in part.values()} - {0} for part in (mine, theirs)]
    if places[0] & places[1]:
        raise UnsupportedModelError(
            f"The baseline is the runtime's own model, which has been modified.\n{remedy}"
        )
    shapes = [{name: p.shape for name, p in part.items()} for part in (mine, theirs)]
    if shapes[0] != shapes[1] or plain.dtype != adapter.model.dtype:
        raise UnsupportedModelError(
            f"The baseline is another model than the runtime's (other parameters).\n{remedy}"
        )


def forward_of(plain: "PreTrainedModel", batch: Batch) -> Callable[[], object]:
    """The original model's forward, which unembeds the answer position only."""

    def forward() -> object:
        with torch.no_grad():
            return plain(
                input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=1
            )

    return forward


def prompts_of(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    may_exit: Callable[[str], bool],
) -> tuple[list[list[int]], list[int]]:
    """Validation prompts of groups that may exit, as token ids, and the first one's choices."""
    rows = tasks.load_rows(config, "validation")
    examples = tasks.encode(config, rows, tokenizer, max_length or 2**31).examples
    timed = [[*map(int, e.input_ids)] for e in examples if may_exit(e.group)]
    return timed, [*map(int, examples[0].choice_ids)]


def batch_of(
    adapter: ModelAdapter,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    rows: int,
    choices: Sequence[int],
) -> Batch:
    """Prompts of exactly that length: the start token, then the last tokens available."""
    if not prompts:
        seeded = torch.Generator().manual_seed(0)
        found = torch.randint(adapter.vocab_size, (rows, tokens), generator=seeded).tolist()
    else:
        every = [[*text[1:]] or [*text] for text in prompts]
        found = []
        for row in range(rows):
            text: list[int] = []
            back = row  # ends with the row's own prompt, padded with those before it
            while len(text) < tokens - 1:
                text = every[back % len(every)] + text
                back -= 1
            found.append([prompts[row % len(prompts)][0], *text[1 - tokens :]])
    named = {str(token): token for token in choices} or None
    return collate([Query(i, tuple(ids), named) for i, ids in enumerate(found)], adapter.device)
