"""ARC, the AI2 Reasoning Challenge (Clark et al. 2018): grade-school science, 3 to 5 options."""

from lspade_train.tasks.base import MULTIPLE_CHOICE, Question, Record, Task, multiple_choice


def to_question(row: Record, labels: tuple[str, ...]) -> Question:
    """The correct option is found by its index in the row's own labels, which may be 1 to 4."""
    names: list[str] = row["choices"]["label"]
    key: str | None = row["answerKey"]
    if key and key not in names:
        raise ValueError(f"answerKey {key!r} is none of the row's choices ({', '.join(names)})")
    right = names.index(key) if key else None
    return multiple_choice(row["question"], row["choices"]["text"], right, labels)


def _arc(name: str, subset: str) -> Task:
    return Task(
        name=name,
        dataset="allenai/ai2_arc",
        subset=subset,
        columns=("question", "choices", "answerKey"),
        template=MULTIPLE_CHOICE,
        labels=("A", "B", "C", "D", "E"),
        to_question=to_question,
    )


ARC_EASY = _arc("arc_easy", "ARC-Easy")
ARC_CHALLENGE = _arc("arc_challenge", "ARC-Challenge")
