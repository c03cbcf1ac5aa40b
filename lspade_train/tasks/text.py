"""Next token at sampled positions of a corpus: heads for a general language model.

The corpus is JSONL with `data.text.column`, plain text whose texts are separated by a blank line,
or a Hub data set. A corpus without a validation split is cut by a hash of each text
(`data.validation_fraction`, `data.test_fraction`), so a text and its duplicates stay in one split.
"""

from lspade_train.tasks.base import Task

TEXT = Task(
    name="text",
    dataset=None,
    subset=None,
    columns=(),
    template="",
    labels=(),
    to_question=None,
)
