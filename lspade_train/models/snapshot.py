"""A model's state at one moment, to detect changes. Independent of what is cached.

Weak references and numbers only: a snapshot keeps neither a model nor its weights alive.
"""

# pyright: reportPrivateUsage=false
# PyTorch has no public names for a module's tables of children, weights and hooks.

import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 8
"""Values of each tensor to compare. Fused optimizers and writes through `.data` change weights
without incrementing `Tensor._version`, so only the values reveal it."""

CONFIGURED = ("_attn_implementation", "logit_scale", "logits_scaling", "final_logit_softcapping")
"""Settings of a configuration that are read when a model is first used."""

_SAMPLED = (SAMPLES,)
_PLAIN_TENSORS = (nn.Parameter, Tensor)

_OWN_NAMES = frozenset(vars(nn.Module()))


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A model at one moment.

    Attributes:
        references: references to its modules, to `forward`s set on them, and to its tensors.
        settings: modes, switches of adapters, configured values, and hooks outside the blocks,
            which a replay of blocks does not run.
        hooks: all hooks.
        places: memory address of each tensor.
        versions: PyTorch's counters of in-place changes; None for inference tensors.
        values: a few values of every tensor.
    """

    references: list[Any]
    settings: tuple[Any, ...]
    hooks: list[tuple[int, ...]]
    places: list[int]
    versions: list[int] | None
    values: list[Tensor]

    def same_structure(self, other: "Snapshot") -> bool:
        """Whether modules, modes, adapters and the addresses of all weights are the same."""
        return (
            self.settings == other.settings
            and self.places == other.places
            and len(self.references) == len(other.references)
            and all(map(is_, self.references, other.references))
        )

    def same(self, other: "Snapshot") -> bool:
        """Whether weights and hooks are the same, too."""
        return (
            self.hooks == other.hooks
            and self.versions == other.versions
            and self.same_structure(other)
            and len(self.values) == len(other.values)
            and all(map(torch.equal, self.values, other.values))
        )


@torch.no_grad()
def snapshot(model: nn.Module) -> Snapshot:
    """Take a snapshot of every module and tensor: some 0.5 ms for 30 blocks on a CPU."""
    modules: list[nn.Module] = []
    outside: list[nn.Module] = []
    _walk(model, modules, outside)
    tensors = [t for m in modules for t in m._parameters.values() if t is not None]
    for module in modules:
        if module._buffers:
            derived = module._non_persistent_buffers_set  # some models update them in forward
            tensors += [b for n, b in module._buffers.items() if b is not None and n not in derived]
    # accelerate loads an offloaded tensor for one forward, then creates a new placeholder.
    offloaded = sum(tensor.is_meta for tensor in tensors)
    if offloaded:
        tensors = [tensor for tensor in tensors if not tensor.is_meta]
    forwards = [vars(module)["forward"] for module in modules if "forward" in vars(module)]
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    above = _hooks([module for module in outside if module is not embedding])
    switches = [_switches(module) for module in modules if _is_foreign(type(module))]
    return Snapshot(
        references=[weakref.ref(each) for each in (*modules, *forwards, *tensors)],
        settings=([m.training for m in modules], above, switches, _configured(model), offloaded),
        hooks=_hooks(modules),
        places=[tensor.data_ptr() for tensor in tensors],
        versions=_versions(tensors),
        values=_values(tensors),
    )


def _walk(module: nn.Module, found: list[nn.Module], outside: list[nn.Module] | None) -> None:
    """All modules in order, and those that are not in a list of blocks."""
    found.append(module)
    if outside is not None:
        outside.append(module)
    below = None if isinstance(module, nn.ModuleList) else outside
    for child in module._modules.values():
        if child is not None:
            _walk(child, found, below)


def _hooks(modules: Sequence[nn.Module]) -> list[tuple[int, ...]]:
    """The ids of their hooks, which are unique in PyTorch."""
    tables = (table for m in modules for table in (m._forward_hooks, m._forward_pre_hooks))
    return [tuple(table) for table in tables if table]


def _is_foreign(kind: type[nn.Module]) -> bool:
    """Whether a class is not from PyTorch or transformers, such as LoRA layers with switches."""
    known = _FOREIGN.get(kind)
    if known is None:
        known = _FOREIGN[kind] = not kind.__module__.startswith(("torch.", "transformers."))
    return known


_FOREIGN: "weakref.WeakKeyDictionary[type[nn.Module], bool]" = weakref.WeakKeyDictionary()


def _switches(module: nn.Module) -> list[tuple[str, Any]]:
    """Plain values among a module's attributes: active adapters, their scales, merged ones."""
    return [(name, _plain(value)) for name, value in vars(module).items() if name not in _OWN_NAMES]


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return [(str(name), _plain(item)) for name, item in value.items()]
    return None


def _configured(model: nn.Module) -> list[Any]:
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    return [getattr(text, name, None) for name in CONFIGURED]


def _versions(tensors: Sequence[Tensor]) -> list[int] | None:
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # inference tensors have no version counter
        return None


def _values(tensors: Sequence[Tensor]) -> list[Tensor]:
    # This takes most of a snapshot's time, hence the few calls per tensor.
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        # Other classes are quantised tensors, which may not support this.
        if type(tensor) in _PLAIN_TENSORS and tensor.is_contiguous():
            step = tensor.numel() // SAMPLES
            few = tensor.as_strided(_SAMPLED, (step,)) if step else tensor.reshape(-1)
            groups[tensor.dtype].append(few)
    return [torch.cat(part) for group in groups.values() for part in _by_device(group)]


def _by_device(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Group tensors by device; nearly always there is only one."""
    devices = {tensor.device for tensor in tensors}
    return [[t for t in tensors if t.device == device] for device in sorted(devices, key=str)]
