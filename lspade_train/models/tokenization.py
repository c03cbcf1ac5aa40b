"""Prompts to token ids, and answers to the single tokens they are in a prompt's context.

Knows nothing of tasks or data sets: the runtime resolves its choices here too.
"""

from collections.abc import Callable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from lspade_train.errors import TaskError
from lspade_train.io.text import require_text

BATCH = 1000


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text: BOS, or nothing."""
    plain = _ids(tokenizer, ["a"])[0]
    whole: list[int] = tokenizer(["a"])["input_ids"][0]
    starts = range(len(whole) - len(plain) + 1)
    return whole[: next(i for i in starts if whole[i : i + len(plain)] == plain)]


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool = True
) -> Iterator[list[int]]:
    """Token ids of each text, as a model reads a text that it is to continue.

    BOS comes first exactly once where the tokenizer has one, also when a chat template has
    written it into the text. What a tokenizer would put behind the text, such as EOS, is left out.

    Args:
        tokenizer: the model's.
        texts: any number; they are tokenised a thousand at a time.
        special: False leaves BOS out.
    """
    start = leading_ids(tokenizer) if special else []
    for first in range(0, len(texts), BATCH):
        for ids in _ids(tokenizer, texts[first : first + BATCH]):
            yield ids if ids[: len(start)] == start else start + ids


def resolve_choices(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    labels: Sequence[str],
    prefix: str | None = None,
) -> tuple[int, ...]:
    """The one token that each label is when it follows `prompt + prefix`.

    Args:
        tokenizer: the model's.
        prompt: text that ends where the answer begins.
        labels: answer strings.
        prefix: text between prompt and answer; None takes the first that works of a space and
            nothing (nothing and a space where the prompt ends in white space).

    Raises:
        TaskError: a label is not a token of its own there; names it and its pieces.
    """
    return choose_prefix(tokenizer, lambda _: prompt, labels, prefix)[1]


def choose_prefix(
    tokenizer: PreTrainedTokenizerBase,
    render: Callable[[str], str],
    labels: Sequence[str],
    prefix: str | None,
) -> tuple[str, tuple[int, ...]]:
    """The prefix to use and the labels' tokens behind it.

    Args:
        tokenizer: the model's.
        render: prefix -> prompt; solved examples in the prompt are written with the prefix.
        labels: answer strings.
        prefix: the only one to try; None tries a space and nothing.

    Raises:
        TaskError: a label is not a token of its own with any of them.
    """
    if prefix is not None:
        candidates = (prefix,)
    else:
        candidates = ("", " ") if render("")[-1:].isspace() else (" ", "")
    problems: list[str] = []
    for candidate in candidates:
        found = single_tokens(tokenizer, render(candidate), labels, candidate)
        if not isinstance(found, str):
            return candidate, found
        problems.append(found)
    raise TaskError(
        f"An answer must be one token, and its own, behind the prompt: {', '.join(problems)}.\n"
        "Choose answers that are (--data.prompt.labels), or other text before them "
        "(--data.prompt.answer_prefix)."
    )


def single_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, labels: Sequence[str], prefix: str
) -> tuple[int, ...] | str:
    """The labels' tokens behind `prompt + prefix`, or what is wrong with the first that fails.

    Whole texts are compared, since a tokenizer may merge across the border or split a word
    differently at the start of a text.
    """
    texts = [prompt, *(prompt + prefix + label for label in labels)]
    before, *after = tokenize(tokenizer, texts)
    found: dict[int, str] = {}
    for label, ids in zip(labels, after, strict=True):
        text = prefix + label
        same = shared_start(before, ids)
        pieces = tokenizer.convert_ids_to_tokens(ids[same:])
        if same < len(before):
            return f"{text!r} merges with the end of the prompt into {pieces}"
        if len(pieces) != 1:
            return f"{text!r} is {len(pieces)} tokens {pieces}"
        if ids[-1] == tokenizer.unk_token_id:
            return f"{text!r} is the unknown token {pieces}"
        if ids[-1] in found:
            return f"{text!r} is the same token as {found[ids[-1]]!r}"
        found[ids[-1]] = text
    return tuple(found)


def shared_start(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens that two sequences begin with in common."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    for text in texts:
        try:
            require_text(text)
        except ValueError as error:
            raise TaskError(f"A text {error}, which no tokenizer reads: {text!a:.60}.") from error
    # verbose=False: lengths are checked against the model's own context, with an error.
    return tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
