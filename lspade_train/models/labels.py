"""Labels of several tokens: the steps at which they diverge.

Labels are told apart at the first token in which they differ, as in constrained decoding. Labels
that begin alike are one option at first, and diverge in a later step. Independent of texts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Paths = Mapping[str, tuple[int, ...]]
"""Label -> its tokens."""


@dataclass(frozen=True)
class Fork:
    """A step at which labels diverge.

    Attributes:
        shared: tokens that all of them begin with; they follow the prompt.
        options: next token -> the labels that continue with it, and their remaining tokens.
    """

    shared: tuple[int, ...]
    options: dict[int, Paths]

    @classmethod
    def of(cls, paths: Paths) -> "Fork":
        """The first step at which labels diverge; none may be a prefix of another."""
        first, *others = paths.values()
        depth = min(shared_start(first, other) for other in others)
        options: dict[int, dict[str, tuple[int, ...]]] = {}
        for label, path in paths.items():
            options.setdefault(path[depth], {})[label] = path[depth + 1 :]
        return cls(first[:depth], {**options})

    @property
    def walked(self) -> bool:
        """Whether some labels diverge only in a later step."""
        return any(len(labels) > 1 for labels in self.options.values())

    def behind(self, token: int) -> "Fork | None":
        """The next step for the labels that continue with `token`; None for a single label."""
        labels = self.options[token]
        return Fork.of(labels) if len(labels) > 1 else None


def conflict(labels: Sequence[str], paths: Paths) -> str | None:
    """Message about two labels that no token tells apart; None if there are none."""
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
    """Length of the common prefix of two token sequences."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
