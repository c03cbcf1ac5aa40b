"""Shallow copies of modules, so that other code can stand in for a model's blocks unseen.

A shadow has the class, weights and settings of its module and an attribute table of its own: what
is set on it reaches neither the model nor another thread that runs it.
"""

# pyright: reportPrivateUsage=false
# PyTorch has no public names for a module's tables of children, weights and hooks.

from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def shadow(module: nn.Module, **attributes: Any) -> nn.Module:
    """A shallow copy of `module` with some attributes of its own; submodules may be replaced."""
    copy = object.__new__(type(module))
    own = vars(copy)
    own.update(vars(module))
    own.pop("_compiled_call_impl", None)  # compiled around the original
    for name, value in vars(module).items():
        # Wrappers such as accelerate's keep a `forward` bound to the module they wrap.
        if isinstance(value, MethodType | partial):
            own[name] = _rebound(value, module, copy)
    own.update(attributes)
    return copy


def with_blocks(
    root: nn.Module,
    blocks: nn.ModuleList,
    forwards: Sequence[Callable[..., Any]],
    *,
    hooks: bool,
) -> nn.Module:
    """`root` as it is, but that its blocks do what `forwards` say.

    Args:
        root: holds `blocks`, directly or further down.
        blocks: the decoder's blocks.
        forwards: one function per block, called as the block is.
        hooks: run the forward hooks above the blocks, too; those of the blocks never run.
    """
    none: dict[str, Any] = {name: {} for name in HOOKS}
    stand_ins = {
        name: shadow(block, forward=forward, **none)
        for (name, block), forward in zip(blocks.named_children(), forwards, strict=True)
    }
    found: nn.Module = shadow(blocks, _modules=stand_ins)
    for parent, name in reversed(_way(root, blocks)):
        kept = {} if hooks else {"_forward_hooks": {}}
        found = shadow(parent, _modules={**parent._modules, name: found}, **kept)
        if getattr(found, "gradient_checkpointing", False):
            vars(found)["gradient_checkpointing"] = False
    return found


def without_checkpointing(block: nn.Module) -> nn.Module:
    """The block, or a shadow of it that keeps its cache where it would recompute its activations.

    While a block checkpoints, transformers takes its key-value cache away from it.
    """
    if block.training and getattr(block, "gradient_checkpointing", False):
        return shadow(block, gradient_checkpointing=False)
    return block


def _way(root: nn.Module, target: nn.Module) -> list[tuple[nn.Module, str]]:
    """Each module from `root` down to `target`'s parent, with the name of the next one."""
    for name, child in root.named_children():
        if child is target:
            return [(root, name)]
        if further := _way(child, target):
            return [(root, name), *further]
    return []


def _rebound(value: "MethodType | partial[Any]", old: nn.Module, new: nn.Module) -> Any:
    if isinstance(value, MethodType):
        return MethodType(value.__func__, new) if value.__self__ is old else value
    if not any(argument is old for argument in value.args):
        return value
    args = (new if argument is old else argument for argument in value.args)
    return partial(value.func, *args, **value.keywords)
