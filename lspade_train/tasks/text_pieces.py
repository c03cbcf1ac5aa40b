"""Cuts running text into tokenised pieces, and samples positions at which to predict."""

import numpy as np
from transformers import PreTrainedTokenizerBase

from lspade_train.errors import TaskError
from lspade_train.models.tokenization import leading_ids, tokenize
from lspade_train.recipe import TextConfig
from lspade_train.tasks.base import Encoded, Example, Rows

SEED = 20250717


def encode_text(
    config: TextConfig, rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """Cut each text into pieces of `length` tokens, each with its own BOS, and sample positions.

    The sampled positions depend only on the indices of the row and the piece.

    Raises:
        TaskError: settings out of range, or no text is long enough for one position.
    """
    _check(config, max_length)
    start = leading_ids(tokenizer)
    examples: list[Example] = []
    skipped = 0
    texts = [record[config.column] for record in rows.records]
    for number, ids in enumerate(tokenize(tokenizer, texts, special=False)):
        before = len(examples)
        step = config.length - len(start)
        for piece, begin in enumerate(range(0, len(ids), step)):
            # One token more than the piece: the answer at the last position.
            window = np.array(start + ids[begin : begin + step + 1], dtype=np.int64)
            available = np.arange(config.first_position, len(window) - 1)
            if len(available):
                positions = _draw(available, config.positions_per_sequence, number, piece)
                examples.append(
                    Example(
                        input_ids=window[: config.length].astype(np.int32),
                        positions=positions,
                        answer_ids=window[positions + 1],
                        choice_ids=(),
                        row=number,
                    )
                )
        skipped += len(examples) == before
    if not examples:
        raise TaskError(
            f"No text of the {rows.split} split has more than {config.first_position + 1} tokens. "
            "Use longer texts, or an earlier --data.text.first_position."
        )
    return Encoded(examples, skipped, prefix="")


def _draw(available: np.ndarray, count: int | None, row: int, piece: int) -> np.ndarray:
    if count is None or count >= len(available):
        return available
    chosen = np.random.default_rng([SEED, row, piece]).choice(available, count, replace=False)
    return np.sort(chosen)


def _check(config: TextConfig, max_length: int) -> None:
    if not 2 <= config.length <= max_length:
        raise TaskError(
            f"Sequences of {config.length} tokens do not fit the model, which reads 2 to "
            f"{max_length}. Set --data.text.length."
        )
    if not 0 <= config.first_position < config.length:
        raise TaskError(
            f"First position {config.first_position} is not in a sequence of {config.length} "
            "tokens. Set --data.text.first_position."
        )
    if config.positions_per_sequence is not None and config.positions_per_sequence < 1:
        raise TaskError(
            f"{config.positions_per_sequence} positions per sequence; 1 or more are needed, or "
            "null for all. Set --data.text.positions_per_sequence."
        )
