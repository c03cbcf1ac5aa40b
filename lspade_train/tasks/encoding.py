"""Turns rows into tokenised prompts: one for each step in which a row's answer is decided."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from lspade_train.errors import TaskError
from lspade_train.models.labels import Fork, Paths, shared_start
from lspade_train.models.tokenization import choose_prefix, tokenize
from lspade_train.recipe import DataConfig
from lspade_train.tasks.base import Encoded, Example, Question, Rows
from lspade_train.tasks.prompts import Prompter
from lspade_train.tasks.registry import find_task
from lspade_train.tasks.rows import labels_of, shot_questions, to_questions
from lspade_train.tasks.text_pieces import encode_text

# Tokenizer merges are local: an answer's tokens depend only on the last tokens of the prompt.
BORDER = 4

log = logging.getLogger(__name__)


def encode(
    config: DataConfig, rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """Tokenise a split.

    Args:
        config: the recipe's data section.
        rows: a split loaded with it.
        tokenizer: the model's tokenizer.
        max_length: the model's context length in tokens.

    Raises:
        TaskError: a prompt is longer than `max_length` (with `overlong: error`), none is left,
            answers are not distinct in their tokens, a row whose answer takes several steps has no
            answer, or the template or chat settings do not fit.
    """
    if find_task(config.task).to_question is None:
        encoded = encode_text(config.text, rows, tokenizer, max_length)
    else:
        encoded = _encode_questions(config, rows, tokenizer, max_length)
    if not encoded.examples:
        raise TaskError(
            f"No prompt of the {rows.split} split is left ({encoded.skipped} skipped as too long "
            f"or too short; the model reads {max_length} tokens). Use other data or a shorter "
            "--data.prompt.template."
        )
    if encoded.skipped:
        log.warning(
            "%s: %d of %d rows skipped: too long for the model, or too short for a position",
            rows.split, encoded.skipped, len(rows.records),
        )  # fmt: skip
    if encoded.labels:
        log.info("%s: %s", rows.split, encoded.labels)
    return encoded


@dataclass(frozen=True)
class Rendered:
    """A split as text.

    Args:
        questions: one per row.
        prompts: their prompts, each ending where `prefix` and an answer would follow.
        prefix: text between prompt and answer that every label was resolved with.
        paths: answer string -> its tokens.
    """

    questions: list[Question]
    prompts: list[str]
    prefix: str
    paths: Paths

    @property
    def digest(self) -> str:
        """SHA-256 of the model's complete input, as hex."""
        digest = hashlib.sha256()
        for text in (self.prefix, *self.prompts):
            digest.update(hashlib.sha256(text.encode(errors="surrogatepass")).digest())
        return digest.hexdigest()


def render(config: DataConfig, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Render the prompts of a split of questions.

    Raises:
        TaskError: the template or chat settings do not fit, or answers are not distinct.
    """
    task = find_task(config.task)
    questions = to_questions(config, rows)
    prompter = Prompter(config.prompt, task.template, tokenizer, shot_questions(config, rows))
    # Every label of the task, even if this split does not use it: all splits of a task must agree
    # on the prefix.
    free = [(q.answer,) for q in questions if q.answer is not None and not q.labels]
    lists = dict.fromkeys([labels_of(config, task), *(q.labels for q in questions), *free])
    prefix, paths = choose_prefix(
        tokenizer,
        lambda prefix: prompter(questions[0], prefix),
        [labels for labels in lists if labels],
        config.prompt.answer_prefix,
    )
    prompts = [prompter(question, prefix) for question in questions]
    return Rendered(questions, prompts, prefix, paths)


def _encode_questions(
    config: DataConfig, rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    text = render(config, rows, tokenizer)
    tokens = list(tokenize(tokenizer, text.prompts))
    _check_borders(tokenizer, text, tokens)
    lists = dict.fromkeys(question.labels for question in text.questions)
    forks = {ls: Fork.of({label: text.paths[label] for label in ls}) for ls in lists if ls}
    steps = [
        list(_steps(row, question, tokens[row], text.paths, forks.get(question.labels)))
        for row, question in enumerate(text.questions)
    ]
    kept = _fitting([len(of_row[-1].input_ids) for of_row in steps], config, rows, max_length)
    examples = [example for row in kept for example in steps[row]]
    note = _note(tokenizer, text.paths, [*forks.values()], len(kept), len(examples))
    return Encoded(examples, skipped=len(tokens) - len(kept), prefix=text.prefix, labels=note)


def _steps(
    row: int, question: Question, ids: list[int], paths: Paths, fork: Fork | None
) -> Iterator[Example]:
    """The model's input at each step of the correct answer.

    Raises:
        TaskError: the correct answer is not known.
    """
    answer = question.answer
    if fork is None:
        yield _example(row, question, ids, (), None if answer is None else paths[answer][0])
    elif answer is None and fork.walked:
        token, labels = next((t, ls) for t, ls in fork.options.items() if len(ls) > 1)
        raise TaskError(
            f"Row {row + 1} has no answer, and its choices {', '.join(map(repr, labels))} begin "
            f"with the same token ({token}): which steps its answer takes is not known.\n"
            "Give the row an answer, or choices whose first tokens differ (--data.prompt.labels)."
        )
    while fork is not None:
        ids = [*ids, *fork.shared]
        gold = next((t for t, labels in fork.options.items() if answer in labels), None)
        yield _example(row, question, ids, tuple(fork.options), gold)
        if gold is None:
            return
        ids = [*ids, gold]
        fork = fork.behind(gold)


def _example(
    row: int, question: Question, ids: list[int], choices: tuple[int, ...], gold: int | None
) -> Example:
    return Example(
        input_ids=np.array(ids, dtype=np.int32),
        positions=np.array([len(ids) - 1], dtype=np.int64),
        answer_ids=None if gold is None else np.array([gold], dtype=np.int64),
        choice_ids=choices,
        row=row,
        group=question.group,
    )


def _note(
    tokenizer: PreTrainedTokenizerBase,
    paths: Paths,
    forks: Sequence[Fork],
    rows: int,
    steps: int,
) -> str:
    """How labels of several tokens are decided, in words; "" if each is one token."""
    longest = max(paths, key=lambda label: len(paths[label]), default="")
    if not forks or len(paths[longest]) == 1:
        return ""
    pieces = tokenizer.convert_ids_to_tokens(list(paths[longest]))
    if not any(fork.walked for fork in forks):
        return (
            "labels of several tokens are decided at the first in which they differ "
            f"({longest!r} is {pieces})"
        )
    return (
        f"labels that begin alike are decided step by step ({longest!r} is {pieces}): {rows:,} "
        f"rows take {steps:,} steps, each of which is a row of the cache and of all results"
    )


def _fitting(lengths: Sequence[int], config: DataConfig, rows: Rows, max_length: int) -> list[int]:
    """Indices of the rows whose prompts fit into the model's context."""
    long = [i for i, length in enumerate(lengths) if length > max_length]
    if long and (config.overlong == "error" or len(long) == len(lengths)):
        raise TaskError(
            f"{len(long)} of {len(lengths)} prompts of the {rows.split} split are longer than the "
            f"model's context of {max_length} tokens; the first is row {long[0] + 1} with "
            f"{lengths[long[0]]}.\n"
            + (
                "Leave such rows out with --data.overlong skip."
                if config.overlong == "error"
                else "Shorten --data.prompt.template or lower --data.prompt.shots."
            )
        )
    left_out = set(long)
    return [i for i in range(len(lengths)) if i not in left_out]


def _check_borders(
    tokenizer: PreTrainedTokenizerBase, text: Rendered, tokens: Sequence[list[int]]
) -> None:
    """Check that the answers have the same tokens after every prompt, not only the first.

    One prompt is tried for each distinct ending.
    """
    ends: dict[tuple[object, ...], int] = {}
    for i, (question, ids) in enumerate(zip(text.questions, tokens, strict=True)):
        ends.setdefault((*ids[-BORDER:], question.labels or question.answer), i)
    cases = [
        (i, answer)
        for i in ends.values()
        for answer in text.questions[i].labels or (text.questions[i].answer,)
        if answer is not None
    ]
    texts = [text.prompts[i] + text.prefix + answer for i, answer in cases]
    for (i, answer), ids in zip(cases, tokenize(tokenizer, texts), strict=True):
        if ids != [*tokens[i], *text.paths[answer]]:
            pieces = tokenizer.convert_ids_to_tokens(ids[shared_start(tokens[i], ids) :])
            raise TaskError(
                f"{text.prefix + answer!r} has other tokens after the prompt of row {i + 1} than "
                f"after that of row 1: {pieces}.\n"
                "End every prompt in the same way (--data.prompt.template), or choose other text "
                "before the answer (--data.prompt.answer_prefix)."
            )
