"""Rows to tokenised prompts with one-token answers."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from lspade_train.errors import TaskError
from lspade_train.models.tokenization import choose_prefix, shared_start, tokenize
from lspade_train.recipe import DataConfig
from lspade_train.tasks.base import Encoded, Example, Question, Rows
from lspade_train.tasks.prompts import Prompter
from lspade_train.tasks.registry import find_task
from lspade_train.tasks.rows import labels_of, shot_questions, to_questions
from lspade_train.tasks.text import encode_text

# Prompts that end in the same tokens meet an answer in the same way: merges are that local.
BORDER = 4

log = logging.getLogger(__name__)


def encode(
    config: DataConfig, rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """Tokenise a split.

    Args:
        config: the recipe's data section.
        rows: a split loaded with it.
        tokenizer: the model's.
        max_length: tokens that the model reads.

    Raises:
        TaskError: a prompt is longer than `max_length` (with `overlong: error`), none is left, an
            answer is not one token behind its prompt, or the template or chat settings do not fit.
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
            rows.split, encoded.skipped, encoded.skipped + len(encoded.examples),
        )  # fmt: skip
    return encoded


@dataclass(frozen=True)
class Rendered:
    """A split as text.

    Args:
        questions: one per row.
        prompts: their prompts, each up to where `prefix` and an answer would follow.
        prefix: text between prompt and answer that every label was resolved with.
        token_of: answer string -> its token.
    """

    questions: list[Question]
    prompts: list[str]
    prefix: str
    token_of: dict[str, int]

    @property
    def digest(self) -> str:
        """SHA-256 of all that the model reads, as hex."""
        digest = hashlib.sha256()
        for text in (self.prefix, *self.prompts):
            digest.update(hashlib.sha256(text.encode(errors="surrogatepass")).digest())
        return digest.hexdigest()


def render(config: DataConfig, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Write the prompts of a split of questions.

    Raises:
        TaskError: the template or chat settings do not fit, or an answer is not one token.
    """
    task = find_task(config.task)
    questions = to_questions(config, rows)
    prompter = Prompter(config.prompt, task.template, tokenizer, shot_questions(config, rows))
    # Every label of the task, also those that this split has no use for: all splits of a task
    # must settle on the same prefix.
    answers = [answer for q in questions for answer in (*q.labels, q.answer) if answer is not None]
    labels = tuple(dict.fromkeys([*labels_of(config, task), *answers]))
    prefix, ids = choose_prefix(
        tokenizer,
        lambda prefix: prompter(questions[0], prefix),
        labels,
        config.prompt.answer_prefix,
    )
    prompts = [prompter(question, prefix) for question in questions]
    return Rendered(questions, prompts, prefix, dict(zip(labels, ids, strict=True)))


def _encode_questions(
    config: DataConfig, rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    text = render(config, rows, tokenizer)
    tokens = list(tokenize(tokenizer, text.prompts))
    kept = _fitting(tokens, config, rows, max_length)
    _check_borders(tokenizer, text, tokens)
    examples = [_example(i, text.questions[i], tokens[i], text.token_of) for i in kept]
    return Encoded(examples, skipped=len(tokens) - len(kept), prefix=text.prefix)


def _example(row: int, question: Question, ids: list[int], token_of: dict[str, int]) -> Example:
    answer = question.answer
    return Example(
        input_ids=np.array(ids, dtype=np.int32),
        positions=np.array([len(ids) - 1], dtype=np.int64),
        answer_ids=None if answer is None else np.array([token_of[answer]], dtype=np.int64),
        choice_ids=tuple(token_of[label] for label in question.labels),
        row=row,
        group=question.group,
    )


def _fitting(
    tokens: Sequence[list[int]], config: DataConfig, rows: Rows, max_length: int
) -> list[int]:
    """Indices of the prompts that the model can read."""
    long = [i for i, ids in enumerate(tokens) if len(ids) > max_length]
    if long and (config.overlong == "error" or len(long) == len(tokens)):
        raise TaskError(
            f"{len(long)} of {len(tokens)} prompts of the {rows.split} split are longer than the "
            f"model's context of {max_length} tokens; the first is row {long[0] + 1} with "
            f"{len(tokens[long[0]])}.\n"
            + (
                "Leave such rows out with --data.overlong skip."
                if config.overlong == "error"
                else "Shorten --data.prompt.template or lower --data.prompt.shots."
            )
        )
    left_out = set(long)
    return [i for i in range(len(tokens)) if i not in left_out]


def _check_borders(
    tokenizer: PreTrainedTokenizerBase, text: Rendered, tokens: Sequence[list[int]]
) -> None:
    """Check that the answers are the same tokens behind every prompt, not only the first.

    One prompt is tried for each way that prompts end.
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
        if ids != [*tokens[i], text.token_of[answer]]:
            pieces = tokenizer.convert_ids_to_tokens(ids[shared_start(tokens[i], ids) :])
            raise TaskError(
                f"{text.prefix + answer!r} is not the same one token behind the prompt of row "
                f"{i + 1} as behind that of row 1: the prompt continues as {pieces}.\n"
                "End every prompt alike (--data.prompt.template), or choose other text before the "
                "answer (--data.prompt.answer_prefix)."
            )
