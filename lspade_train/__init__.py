"""Early exit for frozen language models, by small linear heads (L-SPADE)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lspade_train.artifacts.folder import push_to_hub
    from lspade_train.models import ModelAdapter
    from lspade_train.policies.drafting import Drafting
    from lspade_train.policies.policy import ExitPolicy
    from lspade_train.policies.selection import calibrate
    from lspade_train.probes.heads import LSpadeHeads
    from lspade_train.probes.spade import spade_logits
    from lspade_train.profiling import measure_seconds
    from lspade_train.recipe import DataConfig, HeadConfig
    from lspade_train.runtime import Audit, ExitRuntime
    from lspade_train.training.datamodule import HiddenStateDataModule
    from lspade_train.training.module import LSpadeModule

__version__ = "0.1.0"

_MODULES = {
    "Audit": "runtime",
    "DataConfig": "recipe",
    "Drafting": "policies.drafting",
    "ExitPolicy": "policies.policy",
    "ExitRuntime": "runtime",
    "HeadConfig": "recipe",
    "HiddenStateDataModule": "training.datamodule",
    "LSpadeHeads": "probes.heads",
    "LSpadeModule": "training.module",
    "ModelAdapter": "models",
    "calibrate": "policies.selection",
    "measure_seconds": "profiling.pieces",
    "push_to_hub": "artifacts.folder",
    "spade_logits": "probes.spade",
}
__all__ = [
    "Audit",
    "DataConfig",
    "Drafting",
    "ExitPolicy",
    "ExitRuntime",
    "HeadConfig",
    "HiddenStateDataModule",
    "LSpadeHeads",
    "LSpadeModule",
    "ModelAdapter",
    "calibrate",
    "measure_seconds",
    "push_to_hub",
    "spade_logits",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `lspade-train --help` does not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lspade_train.requirements import check_versions

    check_versions()
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
