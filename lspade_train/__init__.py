"""L-SPADE probes: small linear heads that tell a frozen language model when it may stop early."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lspade_train.adapters import ModelAdapter
    from lspade_train.heads import LSpadeHeads
    from lspade_train.policy import ExitPolicy
    from lspade_train.runtime import ExitRuntime
    from lspade_train.spade import spade_logits

__version__ = "0.1.0"

_HOMES = {
    "ExitPolicy": "policy",
    "ExitRuntime": "runtime",
    "LSpadeHeads": "heads",
    "ModelAdapter": "adapters",
    "spade_logits": "spade",
}
__all__ = ["ExitPolicy", "ExitRuntime", "LSpadeHeads", "ModelAdapter", "spade_logits"]


def __getattr__(name: str) -> Any:
    """Import on first use: `lspade-train --help` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lspade_train.requirements import check_versions

    check_versions()
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
