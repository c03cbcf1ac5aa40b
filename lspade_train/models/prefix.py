"""Which prompts are run together: those of similar length, and those with a common prefix.

A common prefix need not be run for each prompt. Independent of how a model runs it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = Sequence[int] | NDArray[Any]

LEAST_TOKENS = 16
"""Shorter prefixes are not worth splitting the prompts."""

LEAST_SAVED = 512
"""Overhead of a prefix, in tokens: a separate run reads all weights once more, and batches can only
be filled with prompts of the same prefix."""

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Types of rotary embeddings whose angles differ between long and short prompts."""

PADDING = 256
"""Tokens of padding above which a separate batch, which reads all weights again, is cheaper."""

SEEN = 8
"""Shared tokens that count as one token of a row's own when filling a batch: only their keys and
values are present for each row, in one block at a time."""


def shared_prefixes(
    prompts: Sequence[Tokens], own: Sequence[int] | None = None
) -> list[tuple[int, list[int]]]:
    """Group prompts by common prefix.

    The groups depend on these prompts only, not on what was run before.

    Args:
        prompts: token ids.
        own: index of each prompt's first token that must not be shared, such as the first answer
            position; None: the last token.

    Returns:
        (shared tokens, indices of the prompts) for each group; prompts that share too little to be
        worth it come last, with 0.
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
    """Neighbours in sorted order with a common prefix.

    Attributes:
        shared: number of tokens that all of them have in common.
        first: index of the first one.
        saved: most tokens that can be saved by prefixes of parts of the run.
        parts: those prefixes: shared tokens, first and last index.
    """

    shared: int
    first: int
    saved: int = 0
    parts: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])

    def close(self, last: int) -> None:
        """Use one prefix for the whole run if it saves more than those of its parts."""
        saved = self.shared * (last - self.first) - LEAST_SAVED
        if self.shared >= LEAST_TOKENS and saved > self.saved:
            self.saved, self.parts = saved, [(self.shared, self.first, last)]


def _best_runs(common: Sequence[int]) -> list[tuple[int, int, int]]:
    """Disjoint runs whose prefixes save most, where prompts i and i + 1 share `common[i]` tokens.

    Longer prefixes have fewer prompts, so every run is compared with the best of its parts.
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
        lengths: lengths of the prompts, in tokens.
        tokens: padded tokens per batch; a longer prompt is a batch of its own.
        shared: number of common leading tokens, which are run separately.
        most: most prompts in a batch; None: any number.
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
    """Longest prompt with the same rotary angles as short ones; None if all have the same.

    Args:
        config: the decoder's configuration.
    """
    settings = getattr(config, "rope_parameters", None) or {}
    # One setting for all layers, or one for each kind of layer.
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
