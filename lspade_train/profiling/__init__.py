"""What a policy gains on this machine. What it costs in answers is `calibration`'s to say."""

from lspade_train.profiling.forward import Profile, ProfileRow, profile
from lspade_train.profiling.generation import (
    GenerationRow,
    generation_table,
    profile_generation,
)

__all__ = [
    "GenerationRow",
    "Profile",
    "ProfileRow",
    "generation_table",
    "profile",
    "profile_generation",
]
