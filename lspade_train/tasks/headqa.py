"""HEAD-QA (Vilares and Gomez-Rodriguez 2019): exams of Spanish healthcare, English or Spanish.

Five options in train, four in validation and test. Some questions refer to an image, which the
prompt does not show. Results are broken down by category, such as nursing.
"""

from lspade_train.tasks.base import MULTIPLE_CHOICE, Question, Record, Task, multiple_choice


def to_question(row: Record, labels: tuple[str, ...]) -> Question:
    """The correct option is the one whose id is `ra`."""
    numbers = [answer["aid"] for answer in row["answers"]]
    right = row["ra"]
    if right is not None and right not in numbers:
        raise ValueError(f"right answer ra={right} is none of the options {numbers}")
    return multiple_choice(
        row["qtext"].strip(),
        [answer["atext"].strip() for answer in row["answers"]],
        None if right is None else numbers.index(right),
        labels,
        group=row["category"] or "",
    )


HEADQA = Task(
    name="headqa",
    dataset="EleutherAI/headqa",
    subset="en",
    columns=("qtext", "answers", "ra", "category"),
    template=MULTIPLE_CHOICE,
    labels=("A", "B", "C", "D", "E"),
    to_question=to_question,
)
