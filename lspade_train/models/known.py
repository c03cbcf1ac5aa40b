"""What was found out about a model, kept beside it for as long as it stays as it is.

Nothing is written on the model and nothing here holds it: this goes when the model goes.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from lspade_train.models.snapshot import Snapshot
from lspade_train.models.structure import Signature

START_TOKENS = 128
"""Start tokens whose keys and values are kept, the least recently used dropped first. A model with
BOS has one; without, each distinct first token of a prompt is one (0.5 MB each for Llama-2-7B)."""

PREFIX_BYTES = 1 << 30
"""Keys and values of shared prefixes that are kept, the least recently used dropped first; the
newest is kept whatever its size (0.5 MB a token for Llama-2-7B, 23 kB for SmolLM2-135M)."""


Kept = OrderedDict[tuple[Any, ...], DynamicCache]


@dataclass(eq=False)
class Known:
    """What was found out about a model in one state of it.

    Attributes:
        snapshot: the state.
        signature: how its blocks are called; None until it is needed.
        identity: digests; None until they are needed.
        prefix: why no beginning of a prompt may be run once for all; "" where it may, None until
            it is needed.
        checked: the load-time checks that it has passed: of plain blocks (False), of compiled ones.
        notes: what others have found out about it, by a name of theirs.
        lock: held while a check or the signature is being worked out.
    """

    snapshot: Snapshot
    signature: Signature | None = None
    identity: dict[str, str] | None = None
    prefix: str | None = None
    checked: set[bool] = field(default_factory=set[bool])
    notes: dict[str, Any] = field(default_factory=dict[str, Any])
    lock: Any = field(default_factory=threading.RLock)
    _starts: Kept = field(default_factory=OrderedDict)
    _prefixes: Kept = field(default_factory=OrderedDict)

    def start(
        self, tokens: tuple[int, ...], device: torch.device, make: Callable[[], DynamicCache]
    ) -> DynamicCache:
        """Keys and values of a beginning, made once per precision of autocast while it is kept."""
        kind = device.type
        auto = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (*tokens, auto)
        kept = self._starts if len(tokens) == 1 else self._prefixes
        with self.lock:
            if key not in kept:
                kept[key] = make()
            kept.move_to_end(key)
            while len(self._starts) > START_TOKENS:
                self._starts.popitem(last=False)
            while (
                len(self._prefixes) > 1 and sum(map(_bytes, self._prefixes.values())) > PREFIX_BYTES
            ):
                self._prefixes.popitem(last=False)
            return kept[key]


def _bytes(cache: DynamicCache) -> int:
    layers: list[Any] = cache.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


_KNOWN: "weakref.WeakKeyDictionary[nn.Module, Known]" = weakref.WeakKeyDictionary()
_GUARD = threading.Lock()


def known_of(model: nn.Module, now: Snapshot, *, keeps_identity: bool) -> Known:
    """What is known of `model` as it is `now`; what a change has made untrue is forgotten.

    Args:
        model: the model.
        now: its snapshot.
        keeps_identity: its weights change their place and their last bits when it first runs, as
            bitsandbytes' do: it is then still the model that was loaded.
    """
    with _GUARD:
        before = _KNOWN.get(model)
        if before is not None and before.snapshot.same(now):
            return before
        after = Known(now)
        if before is not None and before.snapshot.same_structure(now):
            after.signature, after.checked = before.signature, before.checked
        if before is not None and keeps_identity:
            after.identity = before.identity
        _KNOWN[model] = after
        return after
