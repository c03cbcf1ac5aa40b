"""Rows that no choice looks at, told by their content alone: neither order nor number matters.

Where a data set has no labelled test split, one half of its validation rows chooses a policy and
the other half measures it.
"""

import hashlib
from collections.abc import Sequence

from lspade_train.io.storage import json_digest
from lspade_train.tasks.base import Record

SEED = 20250717
SHARE = 0.5
"""Of the rows, on average, that are held out."""


def held_out(records: Sequence[Record]) -> list[bool]:
    """Which rows are held out: those whose seeded SHA-256 falls into the lower half.

    Copies of a row fall on the same side.
    """
    return [_draw(record) < SHARE for record in records]


def _draw(record: Record) -> float:
    """A number from 0 to 1 that the row's content decides."""
    digest = hashlib.sha256(f"{SEED}:{json_digest(record)}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64
