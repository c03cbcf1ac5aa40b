"""Which prompts are run together: those of one length, and those that begin alike.

What prompts have in common at their beginning need not be run for each of them. Knows nothing of
how a model runs it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = Sequence[int] | NDArray[Any]

LEAST_TOKENS = 16
"""Shorter beginnings are not worth a cut in every prompt."""

LEAST_SAVED = 512
"""What a prefix costs besides its tokens, in tokens: a run of its own reads all weights once more,
and its batches are filled with fewer kinds of prompts."""

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rotary angles that are others for long prompts than for short ones."""

PADDING = 256
"""Tokens of padding after which another batch, which reads all weights once more, costs less."""

SEEN = 8
"""Shared tokens that fill a batch as one token of a row's own does: only their keys and values are
there for each row, in one block at a time."""


def shared_prefixes(
    prompts: Sequence[Tokens], own: Sequence[int] | None = None
) -> list[tuple[int, list[int]]]:
    """Prompts that begin alike, and how many tokens they have in common.

    A function of these prompts alone, whatever was run before.

    Args:
        prompts: token ids.
        own: first token of each prompt that must not be shared, such as the first answer position;
            None: the last one.

    Returns:
        (shared tokens, indices of the prompts); those that share too little to be worth it come
        last, with 0.
    """
    starts = [
        np.asarray(prompt[: len(prompt) - 1 if own is None else own[i]], dtype=">i4")
        for i, prompt in enumerate(prompts)
    ]
    order = sorted(range(len(prompts)), key=lambda i: (starts[i].tobytes(), i))
    chosen = _best_runs([_in_common(starts[i], starts[j]) for i, j in pairwise(order)])
    found = [(shared, sorted(order[first : last + 1])) for shared, first, last in chosen]
    together = {i for _, members in found for i in members}
    alone = [i for i in range(len(prompts)) if i not in together]
    return [*found, (0, alone)] if alone else found


@dataclass
class _Run:
    """Neighbours in sorted order that begin alike: where they begin, and what is in the run.

    Attributes:
        shared: tokens that all of them have in common.
        first: place of the first one.
        saved: most tokens that are saved by prefixes of parts of the run.
        parts: those prefixes: shared tokens, first and last place.
    """

    shared: int
    first: int
    saved: int = 0
    parts: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])

    def close(self, last: int) -> None:
        """See whether one prefix for the whole run saves more than those of its parts."""
        saved = self.shared * (last - self.first) - LEAST_SAVED
        if self.shared >= LEAST_TOKENS and saved > self.saved:
            self.saved, self.parts = saved, [(self.shared, self.first, last)]


def _best_runs(common: Sequence[int]) -> list[tuple[int, int, int]]:
    """Disjoint runs whose prefixes save most, of `common[i]` tokens between places i and i + 1.

    A longer prefix has fewer prompts: every run is weighed against the best of its parts.
    """
    root = _Run(0, 0)
    opened = [root]
    for place, shared in enumerate([*common, 0]):
        while opened[-1].shared > shared:
            done = opened.pop()
            done.close(place)
            if opened[-1].shared < shared:
                opened.append(_Run(shared, done.first))
            opened[-1].saved += done.saved
            opened[-1].parts += done.parts
        if opened[-1].shared < shared:
            opened.append(_Run(shared, place))
    return root.parts


def length_batches(
    lengths: Sequence[int], tokens: int, *, shared: int = 0, most: int | None = None
) -> Iterator[list[int]]:
    """Indices of prompts of about equal length, longest first.

    Args:
        lengths: of the prompts, in tokens.
        tokens: padded tokens of a batch; a prompt over that goes alone.
        shared: leading tokens that all prompts have in common and that are run apart.
        most: prompts of a batch; None: any number.
    """
    batch: list[int] = []
    longest = padding = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        full = (len(batch) + 1) * (longest - shared + shared // SEEN) > tokens
        if batch and (full or len(batch) == most or padding > PADDING):
            yield batch
            batch, padding = [], 0
        longest = longest if batch else lengths[index]
        padding += longest - lengths[index]
        batch.append(index)
    if batch:
        yield batch


def rotation_limit(config: Any) -> int | None:
    """Longest prompt whose rotary angles are those of short ones; None: all of them.

    Args:
        config: the decoder's configuration.
    """
    settings = getattr(config, "rope_parameters", None) or {}
    # One for all layers, or one for each kind of them.
    each = [s for s in (settings, *settings.values()) if isinstance(s, dict)]
    most = getattr(config, "max_position_embeddings", None) or 2**31
    limits = [
        min(s.get("original_max_position_embeddings") or most, most)
        for s in each
        if s.get("rope_type") in LENGTH_DEPENDENT
    ]
    return min(limits, default=None)


def _in_common(one: NDArray[Any], other: NDArray[Any]) -> int:
    width = min(len(one), len(other))
    same = one[:width] == other[:width]
    return width if same.all() else int(same.argmin())
