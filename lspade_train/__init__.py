"""L-SPADE probes: small linear heads that tell a frozen language model when it may stop early."""

from lspade_train.adapters import ModelAdapter
from lspade_train.heads import LSpadeHeads
from lspade_train.spade import spade_logits

__all__ = ["LSpadeHeads", "ModelAdapter", "spade_logits"]
__version__ = "0.1.0"
