"""Prompts to left-padded batches within a token budget. Knows nothing of exits.

The answer is then every row's last column, whatever its length. The start token is the prompt's
first token: BOS where the tokenizer puts one, else the first token of the text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lspade_train.errors import TaskError
from lspade_train.models import ModelAdapter
from lspade_train.models.tokenization import resolve_choices, tokenize

MAX_ROWS = 256  # logits of short prompts are the largest tensor: rows x V in fp32

Prompt = str | Sequence[int]
Choices = Sequence[str] | Sequence[int]


@dataclass(frozen=True)
class Query:
    """One prompt, ready for the model.

    Attributes:
        index: its place in the user's list.
        ids: token ids, start token first.
        choices: label -> token id; None: any token may be the answer.
        group: subgroup of the task that the prompt belongs to; None: none, or not known.
    """

    index: int
    ids: tuple[int, ...]
    choices: dict[str, int] | None
    group: str | None = None


@dataclass(frozen=True)
class Batch:
    """Left-padded rows.

    Attributes:
        queries: one per row.
        ids: token ids, (rows, tokens).
        mask: 1 for real tokens, (rows, tokens).
        choice_ids: tokens of each row's choices, (rows, choices); None where there are none.
        choice_mask: False where a row has fewer choices than others, (rows, choices).
    """

    queries: tuple[Query, ...]
    ids: Int[Tensor, "rows tokens"]
    mask: Int[Tensor, "rows tokens"]
    choice_ids: Int[Tensor, "rows choices"] | None
    choice_mask: Bool[Tensor, "rows choices"] | None

    @property
    def starts(self) -> Int[Tensor, " rows"]:
        """First real token of each row."""
        return self.ids.gather(1, self.mask.argmax(-1, keepdim=True)).squeeze(1)

    @property
    def positions(self) -> Int[Tensor, " rows"]:
        """Index of each row's answer among its real tokens."""
        return self.mask.sum(-1) - 1


def encode(
    prompts: Sequence[Prompt],
    choices: Choices | Sequence[Choices | None] | None,
    adapter: ModelAdapter,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    new_tokens: int = 0,
) -> list[Query]:
    """Token ids and choices of every prompt, checked against the model.

    Args:
        prompts: texts, or token ids with the start token first.
        choices: the same for all prompts, one list per prompt, or None. A choice is a text that
            is one token behind its prompt, or a token id.
        adapter: the model.
        tokenizer: needed for texts.
        new_tokens: tokens to be generated, which the context must hold too.

    Raises:
        TaskError: an empty prompt, one over the context, or a choice that is not one token.
    """
    _refuse_text(prompts, choices)
    per_prompt = _choices_of_each(prompts, choices)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    tokenized = tokenize(_needed(tokenizer), texts) if texts else iter(())
    queries: list[Query] = []
    for index, (prompt, labels) in enumerate(zip(prompts, per_prompt, strict=True)):
        name = "The prompt" if len(prompts) == 1 else f"Prompt {index + 1} of {len(prompts)}"
        ids = tuple(next(tokenized) if isinstance(prompt, str) else map(int, prompt))
        _check_ids(name, () if prompt == "" else ids, adapter, new_tokens)
        found = None if labels is None else _resolve(name, prompt, labels, tokenizer)
        queries.append(Query(index, ids, found))
    return queries


def batches(queries: Sequence[Query], tokens: int, device: torch.device) -> Iterator[Batch]:
    """Batches of similar length, longest first, of at most `tokens` padded tokens.

    A prompt over the budget goes alone. Prompts with and without choices never share a batch.
    """
    ordered = sorted(queries, key=lambda query: (query.choices is None, -len(query.ids)))
    group: list[Query] = []
    for query in ordered:
        if group and not _fits(group, query, tokens):
            yield collate(group, device)
            group = []
        group.append(query)
    if group:
        yield collate(group, device)


def collate(queries: Sequence[Query], device: torch.device) -> Batch:
    """Pad the queries on the left into one batch."""
    width = max(len(query.ids) for query in queries)
    ids = torch.tensor([[0] * (width - len(q.ids)) + list(q.ids) for q in queries])
    mask = torch.tensor([[0] * (width - len(q.ids)) + [1] * len(q.ids) for q in queries])
    choice_ids = choice_mask = None
    if queries[0].choices is not None:
        tokens = [list((query.choices or {}).values()) for query in queries]
        most = max(map(len, tokens))
        choice_ids = torch.tensor([row + row[:1] * (most - len(row)) for row in tokens]).to(device)
        sizes = torch.tensor([len(row) for row in tokens])
        choice_mask = (torch.arange(most) < sizes[:, None]).to(device)
    return Batch(tuple(queries), ids.to(device), mask.to(device), choice_ids, choice_mask)


def _fits(group: Sequence[Query], query: Query, tokens: int) -> bool:
    same_kind = (group[0].choices is None) == (query.choices is None)
    rows = len(group) + 1
    return same_kind and rows <= MAX_ROWS and rows * len(group[0].ids) <= tokens


def _refuse_text(prompts: object, choices: object) -> None:
    """A text is a sequence, too: of its characters."""
    if isinstance(prompts, str):
        raise TaskError(f"The prompts are one text; expected a list of them: [{prompts!r:.40}].")
    if isinstance(choices, str):
        raise TaskError(
            f"The choices are one text; expected a list of texts: {list(choices)!r:.40}."
        )
    if isinstance(choices, Sequence):
        inner = [choice for choice in choices if choice is not None]
        if len({isinstance(choice, str | int) for choice in inner}) > 1:
            raise TaskError(
                "Choices are texts or ids for all prompts, or a list for each; got both."
            )


def _choices_of_each(
    prompts: Sequence[Prompt], choices: Choices | Sequence[Choices | None] | None
) -> Sequence[Choices | None]:
    if choices is None:
        return [None] * len(prompts)
    if choices and isinstance(choices[0], str | int):
        return [choices] * len(prompts)  # type: ignore[list-item]
    if len(choices) != len(prompts):
        raise TaskError(
            f"{len(choices)} lists of choices for {len(prompts)} prompts; expected one list for "
            "all or one list each."
        )
    return choices  # type: ignore[return-value]


def _check_ids(name: str, ids: tuple[int, ...], adapter: ModelAdapter, new_tokens: int) -> None:
    if not ids:
        raise TaskError(f"{name} is empty; expected text or token ids to answer.")
    if not all(0 <= token < adapter.vocab_size for token in ids):
        raise TaskError(
            f"{name} has a token id outside 0..{adapter.vocab_size - 1}; "
            "tokenize it with the model's own tokenizer."
        )
    limit = adapter.max_length
    if limit is not None and len(ids) + new_tokens > limit:
        more = f" and {new_tokens} new ones" if new_tokens else ""
        raise TaskError(
            f"{name} has {len(ids)} tokens{more}; the model's context holds {limit}. Shorten it."
        )


def _resolve(
    name: str, prompt: Prompt, labels: Choices, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, int]:
    if len(set(labels)) != len(labels) or len(labels) < 2:
        raise TaskError(f"{name} has choices {list(labels)}; expected two or more, each once.")
    if isinstance(labels[0], int):
        # Ids are their own labels: two tokens may decode to one text.
        return {str(token): token for token in labels}  # type: ignore[misc]
    known = _needed(tokenizer)
    text = (
        prompt if isinstance(prompt, str) else known.decode(list(prompt), skip_special_tokens=True)
    )
    try:
        found = resolve_choices(known, str(text), labels)  # type: ignore[arg-type]
    except TaskError as cause:
        raise TaskError(f"{name}: {str(cause).splitlines()[0]}") from cause
    return dict(zip(labels, found, strict=True))  # type: ignore[arg-type]


def _needed(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise TaskError(
            "Prompts and choices in text need a tokenizer: ExitRuntime(..., tokenizer=...), "
            "or give token ids."
        )
    return tokenizer
