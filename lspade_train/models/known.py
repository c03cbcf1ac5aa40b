"""Caches what was computed about a model, as long as the model does not change.

Nothing is set on the model, and it is only referenced weakly: the cache is freed with the model.
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
"""Start tokens whose keys and values are cached (LRU). A model with BOS has only one; without BOS,
each distinct first token of a prompt is one (0.5 MB each for Llama-2-7B)."""

PREFIX_BYTES = 1 << 30
"""Bytes of cached keys and values of shared prefixes (LRU); the newest is kept at any size (0.5 MB
per token for Llama-2-7B, 23 kB for SmolLM2-135M)."""


Kept = OrderedDict[tuple[Any, ...], DynamicCache]


@dataclass(eq=False)
class Known:
    """What was computed about a model in one state.

    Attributes:
        snapshot: the state.
        signature: how its blocks are called; None until needed.
        identity: digests; None until needed.
        prefix: why prefixes of prompts cannot be shared; "" if they can, None until needed.
        checked: load-time checks that it has passed: with eager (False) or compiled blocks (True).
        notes: results that other modules cache here, by their own keys.
        lock: held while a check or the signature is computed.
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
        """Keys and values of a prefix, cached separately for each precision of autocast."""
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
    """The cache entry for `model` in its state `now`, without what a change has invalidated.

    Args:
        model: the model.
        now: its snapshot.
        keeps_identity: whether its weights move and change their last bits in the first run, like
            bitsandbytes' weights, although it is still the model that was loaded.
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
