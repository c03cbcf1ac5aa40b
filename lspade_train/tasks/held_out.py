"""Rows held out from every selection, determined by content alone, not by order or number.

If a data set has no labelled test split, one half of its validation rows is used to choose a policy
and the other half to evaluate it.
"""

import hashlib
from collections.abc import Sequence

from lspade_train.io.storage import json_digest
from lspade_train.tasks.base import Record

SEED = 20250717
SHARE = 0.5
"""Expected fraction of rows that are held out."""


def held_out(records: Sequence[Record]) -> list[bool]:
    """Which rows are held out: those whose seeded SHA-256 is in the lower half.

    Duplicates of a row are on the same side.
    """
    return [_draw(record) < SHARE for record in records]


def _draw(record: Record) -> float:
    """A number from 0 to 1, determined by the row's content."""
    digest = hashlib.sha256(f"{SEED}:{json_digest(record)}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64
