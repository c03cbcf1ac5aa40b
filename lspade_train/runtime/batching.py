"""Prompts to padded batches within a token budget. Knows nothing of exits.

Padded on the left, so that the answer is every row's last column, whatever its length. Rows after
a shared prefix are padded on the right: a gap between prefix and row would count as distance for
sliding windows and ALiBi. The start token is the prompt's first token: BOS where the tokenizer puts
one, else the first token of the text.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lspade_train.errors import TaskError
from lspade_train.models import ModelAdapter, length_batches, prefix_refusal, shared_groups
from lspade_train.models.labels import Fork, Paths, conflict
from lspade_train.models.tokenization import resolve_choices, shared_start, tokenize

MAX_ROWS = 256  # logits of short prompts are the largest tensor: rows x V in fp32

Prompt = str | Sequence[int]
Choices = Sequence[str] | Sequence[int] | Mapping[str, Sequence[int]]
"""Texts, token ids, or label -> its tokens."""


@dataclass(frozen=True)
class Query:
    """One prompt, ready for the model.

    Attributes:
        index: its place in the user's list.
        ids: token ids, start token first, up to where the choices part.
        choices: label -> token id; None: any token may be the answer. Labels that continue with the
            same token stand under the first of them.
        fork: where labels of several tokens part; None where each choice is one token.
        group: subgroup of the task that the prompt belongs to; None: none, or not known.
    """

    index: int
    ids: tuple[int, ...]
    choices: dict[str, int] | None
    fork: Fork | None = None
    group: str | None = None

    @classmethod
    def at(cls, index: int, ids: Sequence[int], fork: Fork) -> "Query":
        """The query that decides which of a fork's options follows `ids`."""
        choices = {next(iter(labels)): token for token, labels in fork.options.items()}
        return cls(index, (*ids, *fork.shared), choices, fork)

    def behind(self, token: int) -> "Query | None":
        """The next step, where `token` leaves several labels to decide among."""
        fork = None if self.fork is None else self.fork.behind(token)
        if fork is None:
            return None
        return replace(Query.at(self.index, (*self.ids, token), fork), group=self.group)


@dataclass(frozen=True)
class Batch:
    """Padded rows.

    Attributes:
        queries: one per row.
        shared: leading tokens that all rows have in common and that are run once for all.
        ids: token ids, (rows, tokens).
        mask: 1 for real tokens, (rows, tokens).
        choice_ids: tokens of each row's choices, (rows, choices); None where there are none.
        choice_mask: False where a row has fewer choices than others, (rows, choices).
    """

    queries: tuple[Query, ...]
    shared: int
    ids: Int[Tensor, "rows tokens"]
    mask: Int[Tensor, "rows tokens"]
    choice_ids: Int[Tensor, "rows choices"] | None
    choice_mask: Bool[Tensor, "rows choices"] | None

    @property
    def starts(self) -> Int[Tensor, " rows"]:
        """First real token of each row."""
        return self.ids.gather(1, self.mask.argmax(-1, keepdim=True)).squeeze(1)

    @property
    def ends(self) -> Int[Tensor, " rows"]:
        """Column of each row's answer after the shared tokens."""
        if self.shared:
            return self.positions - self.shared
        return torch.full((len(self.queries),), self.ids.shape[1] - 1, device=self.ids.device)

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
        choices: the same for all prompts, one list per prompt, or None. A choice is a text, or a
            token id; or they are label -> its tokens.
        adapter: the model.
        tokenizer: needed for texts.
        new_tokens: tokens to be generated, which the context must hold too.

    Raises:
        TaskError: an empty prompt, one over the context, or choices that no token tells apart.
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
        if labels is None:
            queries.append(Query(index, ids, None))
            continue
        paths = _resolve(name, prompt, labels, tokenizer)
        _check_ids(name, ids, adapter, max(map(len, paths.values())) - 1)
        _check_choices(name, paths, adapter.vocab_size)
        queries.append(Query.at(index, ids, Fork.of(paths)))
    return queries


def encode_prefix(
    prefix: Prompt, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase | None
) -> list[int]:
    """Token ids of what every prompt begins with.

    Raises:
        TaskError: a prompt does not begin with it.
    """
    for number, prompt in enumerate(prompts, 1):
        if isinstance(prefix, str) != isinstance(prompt, str):
            raise TaskError("Prefix and prompts are of two kinds; expected texts, or token ids.")
        if prompt[: len(prefix)] != prefix and list(prompt[: len(prefix)]) != list(prefix):
            raise TaskError(
                f"Prompt {number} of {len(prompts)} does not begin with the prefix; expected whole "
                "prompts, the prefix included."
            )
    return list(next(tokenize(_needed(tokenizer), [prefix])) if isinstance(prefix, str) else prefix)


def shared_batches(
    queries: Sequence[Query],
    tokens: int,
    adapter: ModelAdapter,
    prefix: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Batches of prompts that begin alike, whose common beginning is then run once.

    Args:
        queries: the prompts.
        tokens: padded tokens per batch.
        adapter: the model.
        prefix: what all of them begin with, to be kept for later calls; None: what is worth it is
            found, from these prompts alone.
    """
    if prefix is None:
        groups = shared_groups(adapter, [query.ids for query in queries])
    else:
        starts = (min(shared_start(prefix, query.ids), len(query.ids) - 1) for query in queries)
        longest = max((len(query.ids) for query in queries), default=0)
        shared = 0 if prefix_refusal(adapter, longest) else min(starts, default=0)
        groups = [(shared, list(range(len(queries))))]
    for shared, members in groups:
        yield from batches([queries[i] for i in members], tokens, adapter.device, shared)


def batches(
    queries: Sequence[Query], tokens: int, device: torch.device, shared: int = 0
) -> Iterator[Batch]:
    """Batches of similar length, longest first, of at most `tokens` padded tokens.

    A prompt over the budget goes alone. Prompts with and without choices never share a batch.
    """
    for free in (False, True):
        kind = [query for query in queries if (query.choices is None) == free]
        lengths = [len(query.ids) for query in kind]
        for batch in length_batches(lengths, tokens, shared=shared, most=MAX_ROWS):
            yield collate([kind[i] for i in batch], device, shared)


def collate(queries: Sequence[Query], device: torch.device, shared: int = 0) -> Batch:
    """Pad the queries into one batch: on the left, or on the right after shared tokens."""
    width = max(len(query.ids) for query in queries)

    def padded(row: Sequence[int]) -> list[int]:
        padding = [0] * (width - len(row))
        return [*row, *padding] if shared else [*padding, *row]

    ids = torch.tensor([padded(query.ids) for query in queries])
    mask = torch.tensor([padded([1] * len(query.ids)) for query in queries])
    choice_ids = choice_mask = None
    if queries[0].choices is not None:
        tokens = [list((query.choices or {}).values()) for query in queries]
        most = max(map(len, tokens))
        choice_ids = torch.tensor([row + row[:1] * (most - len(row)) for row in tokens]).to(device)
        sizes = torch.tensor([len(row) for row in tokens])
        choice_mask = (torch.arange(most) < sizes[:, None]).to(device)
    return Batch(tuple(queries), shared, ids.to(device), mask.to(device), choice_ids, choice_mask)


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
    if isinstance(choices, Mapping) or (choices and isinstance(choices[0], str | int)):
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
) -> Paths:
    if len(set(labels)) != len(labels) or len(labels) < 2:
        raise TaskError(f"{name} has choices {list(labels)}; expected two or more, each once.")
    if isinstance(labels, Mapping):
        return _checked(name, {label: tuple(map(int, path)) for label, path in labels.items()})
    if isinstance(labels[0], int):
        # Ids are their own labels: two tokens may decode to one text.
        return {str(token): (token,) for token in labels}  # type: ignore[misc]
    known = _needed(tokenizer)
    text = (
        prompt if isinstance(prompt, str) else known.decode(list(prompt), skip_special_tokens=True)
    )
    try:
        return resolve_choices(known, str(text), labels)  # type: ignore[arg-type]
    except TaskError as cause:
        raise TaskError(f"{name}: {str(cause).splitlines()[0]}") from cause


def _check_choices(name: str, paths: Paths, vocab: int) -> None:
    """Refuse choices outside the vocabulary, which would end a process that uses a GPU."""
    wrong = next((t for path in paths.values() for t in path if not 0 <= t < vocab), None)
    if wrong is not None:
        raise TaskError(
            f"{name} has a choice of token id {wrong}, outside the model's vocabulary, "
            f"0..{vocab - 1}. Tokenize with the tokenizer that belongs to this model."
        )


def _checked(name: str, paths: Paths) -> Paths:
    """Labels given as tokens, each with some, and none of which begins another."""
    bare = next((f"{label!r} has no tokens" for label, path in paths.items() if not path), None)
    fault = bare or conflict([*paths], paths)
    if fault is not None:
        raise TaskError(f"{name}: {fault}; expected tokens that tell its choices apart.")
    return paths


def _needed(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise TaskError(
            "Prompts and choices in text need a tokenizer: ExitRuntime(..., tokenizer=...), "
            "or give token ids."
        )
    return tokenizer
