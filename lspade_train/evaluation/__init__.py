"""Experiments on cached states: lenses, exits, equal compute, transfer, ablations."""

from lspade_train.evaluation.exits import (
    PAPER_THRESHOLDS,
    measure_exits,
    measure_policy,
    sweep_thresholds,
)
from lspade_train.evaluation.iso_compute import iso_compute
from lspade_train.evaluation.readings import Readings, read_lenses
from lspade_train.evaluation.summary import FORMAT_VERSION, plain, summarise

__all__ = [
    "FORMAT_VERSION",
    "PAPER_THRESHOLDS",
    "Readings",
    "iso_compute",
    "measure_exits",
    "measure_policy",
    "plain",
    "read_lenses",
    "summarise",
    "sweep_thresholds",
]
