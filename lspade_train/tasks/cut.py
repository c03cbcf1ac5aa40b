"""Splits the training rows into train, validation and test by a hash of each row's text.

A row's split depends only on its own text and on the two fractions: adding rows moves no other row,
duplicates of a question stay in one split, and all commands agree.
"""

import hashlib
from collections.abc import Mapping

from lspade_train.recipe import DataConfig
from lspade_train.tasks.base import SPLITS, Split


def cut_sides(config: DataConfig, present: Mapping[str, object]) -> dict[Split, float]:
    """The splits to cut from the training rows, each with its fraction of them.

    Data without a validation split is cut; an existing test split is kept.

    Args:
        config: the recipe's data section.
        present: the splits that the data has.

    Returns:
        test, validation and train with their fractions; {} if nothing is cut.
    """
    if "train" not in present or "validation" in present:
        return {}
    test = 0.0 if "test" in present else config.test_fraction
    shares: dict[Split, float] = {"test": test, "validation": config.validation_fraction}
    shares["train"] = 1.0 - sum(shares.values())
    return {split: shares[split] for split in SPLITS if shares[split] > 0}


def side_of(text: str, shares: Mapping[Split, float]) -> Split:
    """The split of a text: uniform in its SHA-256, test lowest, train highest."""
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
    test = shares.get("test", 0.0)
    if place < test:
        return "test"
    return "validation" if place < test + shares.get("validation", 0.0) else "train"
