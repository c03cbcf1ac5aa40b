"""Answers of several tokens: where they part from each other, step by step.

Labels are told apart at the first token in which they differ, as constrained decoding does. Labels
that begin alike are one option at first, and part in a later step. Knows nothing of texts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Paths = Mapping[str, tuple[int, ...]]
"""Label -> its tokens."""


@dataclass(frozen=True)
class Fork:
    """A place at which labels part.

    Attributes:
        shared: tokens that all of them begin with; they follow the prompt.
        options: next token -> the labels that go on with it, and their tokens behind it.
    """

    shared: tuple[int, ...]
    options: dict[int, Paths]

    @classmethod
    def of(cls, paths: Paths) -> "Fork":
        """Where two or more labels, none of which begins another, part for the first time."""
        first, *others = paths.values()
        depth = min(shared_start(first, other) for other in others)
        options: dict[int, dict[str, tuple[int, ...]]] = {}
        for label, path in paths.items():
            options.setdefault(path[depth], {})[label] = path[depth + 1 :]
        return cls(first[:depth], {**options})

    @property
    def walked(self) -> bool:
        """Whether some labels part in a later step only."""
        return any(len(labels) > 1 for labels in self.options.values())

    def behind(self, token: int) -> "Fork | None":
        """Where the labels part that go on with `token`; None for a single one."""
        labels = self.options[token]
        return Fork.of(labels) if len(labels) > 1 else None


def conflict(labels: Sequence[str], paths: Paths) -> str | None:
    """What is wrong with two labels that no token tells apart; None where there are none."""
    found: dict[tuple[int, ...], str] = {}
    for label in labels:
        other = found.setdefault(paths[label], label)
        if other != label or labels.count(label) > 1:
            what = "token" if len(paths[label]) == 1 else "tokens"
            return f"{label!r} is the same {what} as {other!r}"
    for path, label in found.items():
        begun = next((found[path[:n]] for n in range(1, len(path)) if path[:n] in found), None)
        if begun is not None:
            return f"{begun!r} is the beginning of {label!r}"
    return None


def shared_start(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens that two sequences begin with in common."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
