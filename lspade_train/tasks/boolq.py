"""BoolQ (Clark et al. 2019): yes/no questions on a passage. It has no public test split."""

from lspade_train.tasks.base import Question, Record, Task


def to_question(row: Record, labels: tuple[str, ...]) -> Question:
    """The first label means yes, the second no."""
    answer = row["answer"]
    if len(labels) != 2:
        raise ValueError(f"{len(labels)} labels, 2 are needed: yes, no (--data.prompt.labels)")
    if answer is not None and not isinstance(answer, bool):
        raise ValueError(f"answer {answer!r} is neither true nor false")
    return Question(
        fields={"passage": row["passage"], "question": row["question"]},
        labels=labels,
        answer=None if answer is None else labels[0 if answer else 1],
    )


BOOLQ = Task(
    name="boolq",
    dataset="google/boolq",
    subset=None,
    columns=("passage", "question", "answer"),
    template="{passage}\nQuestion: {question}?\nAnswer:",
    labels=("yes", "no"),
    to_question=to_question,
)
