"""Tokenises prompts, and finds the tokens of answers in a prompt's context.

Independent of tasks and data sets: the runtime resolves its choices here, too.
"""

from collections.abc import Callable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from lspade_train.errors import TaskError
from lspade_train.io.text import require_text
from lspade_train.models.labels import Fork, conflict, shared_start

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
    """Token ids of each text, for a model to continue.

    If the tokenizer has BOS, it comes first exactly once, even if a chat template has written it
    into the text. Tokens that a tokenizer would append, such as EOS, are omitted.

    Args:
        tokenizer: the model's tokenizer.
        texts: any number of texts; they are tokenised a thousand at a time.
        special: False omits BOS.
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
) -> dict[str, tuple[int, ...]]:
    """The tokens of each label after `prompt + prefix`.

    Args:
        tokenizer: the model's tokenizer.
        prompt: text that ends where the answer begins.
        labels: answer strings to choose from.
        prefix: text between prompt and answer; None means a space or nothing (`choose_prefix`).

    Raises:
        TaskError: a label is not tokenised separately there, or is not distinct from another.
    """
    return choose_prefix(tokenizer, lambda _: prompt, [labels], prefix)[1]


def choose_prefix(
    tokenizer: PreTrainedTokenizerBase,
    render: Callable[[str], str],
    lists: Sequence[Sequence[str]],
    prefix: str | None,
) -> tuple[str, dict[str, tuple[int, ...]]]:
    """The prefix to use and the labels' tokens after it.

    A space and the empty string are tried (in reverse order if the prompt ends in white space). The
    first with which every label is one token is used; else the first with which every label is
    decided in one step; else the first that works.

    Args:
        tokenizer: the model's tokenizer.
        render: prefix -> prompt; solved examples in the prompt are written with the prefix.
        lists: lists of answers to choose from; a free answer is a list of its own.
        prefix: the only prefix to try; None tries a space and the empty string.

    Raises:
        TaskError: with every prefix, a label is not tokenised separately or is not distinct from
            another of its list, or a free answer is not one token.
    """
    if prefix is not None:
        candidates = (prefix,)
    else:
        candidates = ("", " ") if render("")[-1:].isspace() else (" ", "")
    problems: list[str] = []
    found: list[tuple[int, str, dict[str, tuple[int, ...]]]] = []
    for candidate in candidates:
        paths = label_tokens(tokenizer, render(candidate), lists, candidate)
        if isinstance(paths, str):
            problems.append(paths)
            continue
        found.append((_steps(lists, paths), candidate, paths))
        if found[-1][0] == 0:
            break
    if found:
        return min(found, key=lambda one: one[0])[1:]
    raise TaskError(
        f"An answer must have tokens of its own behind the prompt: {', '.join(problems)}.\n"
        "Choose other answers (--data.prompt.labels), or other text before them "
        "(--data.prompt.answer_prefix)."
    )


def label_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, lists: Sequence[Sequence[str]], prefix: str
) -> dict[str, tuple[int, ...]] | str:
    """The labels' tokens after `prompt + prefix`, or an error message for the first that fails.

    Whole texts are compared, since a tokenizer may merge across the boundary or split a word
    differently at the start of a text.
    """
    labels = list(dict.fromkeys(label for labels in lists for label in labels))
    before, *after = tokenize(tokenizer, [prompt, *(prompt + prefix + label for label in labels)])
    paths: dict[str, tuple[int, ...]] = {}
    for label, ids in zip(labels, after, strict=True):
        text = prefix + label
        same = shared_start(before, ids)
        pieces = tokenizer.convert_ids_to_tokens(ids[same:])
        if same < len(before):
            return f"{text!r} merges with the end of the prompt into {pieces}"
        if not pieces:
            return f"{text!r} is 0 tokens"
        if tokenizer.unk_token_id in ids[same:]:
            return f"{text!r} is the unknown token {pieces}"
        paths[label] = tuple(ids[same:])
    return _fault(tokenizer, lists, paths, prefix) or paths


def _fault(
    tokenizer: PreTrainedTokenizerBase,
    lists: Sequence[Sequence[str]],
    paths: dict[str, tuple[int, ...]],
    prefix: str,
) -> str | None:
    """Error message for the first list whose labels cannot be decided."""
    for labels in lists:
        if len(labels) > 1:
            found = conflict(labels, paths)
        else:
            free = next((label for label in labels if len(paths[label]) > 1), None)
            found = None if free is None else _too_long(tokenizer, prefix + free, paths[free])
        if found is not None:
            return found
    return None


def _too_long(tokenizer: PreTrainedTokenizerBase, text: str, path: Sequence[int]) -> str:
    pieces = tokenizer.convert_ids_to_tokens(list(path))
    return f"{text!r} is {len(path)} tokens {pieces}, and an answer without choices is one"


def _steps(lists: Sequence[Sequence[str]], paths: dict[str, tuple[int, ...]]) -> int:
    """0 if every label is one token, 1 if each is decided in one step, else 2."""
    if all(len(path) == 1 for path in paths.values()):
        return 0
    chosen = ({label: paths[label] for label in labels} for labels in lists if len(labels) > 1)
    return 2 if any(Fork.of(one).walked for one in chosen) else 1


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
