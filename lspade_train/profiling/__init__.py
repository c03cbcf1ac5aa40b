"""Measures what a policy saves on this machine; its effect on answers is measured elsewhere."""

from lspade_train.profiling.forward import Profile, ProfileRow, profile
from lspade_train.profiling.generation import (
    GenerationRow,
    generation_table,
    profile_generation,
)
from lspade_train.profiling.pieces import measure_seconds
from lspade_train.profiling.prediction import Confirmation, confirm
from lspade_train.profiling.shapes import prompts_of, untouched

__all__ = [
    "Confirmation",
    "GenerationRow",
    "Profile",
    "ProfileRow",
    "confirm",
    "generation_table",
    "measure_seconds",
    "profile",
    "profile_generation",
    "prompts_of",
    "untouched",
]
