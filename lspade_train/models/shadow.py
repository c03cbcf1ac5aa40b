"""Shallow copies of modules, to replace a model's blocks without modifying the model.

A shadow has the class, weights and settings of its module but a separate attribute table: setting
attributes affects neither the model nor other threads that run it.
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
    """A shallow copy of `module` with some attributes or submodules replaced."""
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
    """A shadow of `root` in which `forwards` replace its blocks.

    Args:
        root: contains `blocks`, directly or further down.
        blocks: the decoder's blocks.
        forwards: one function per block, called like the block.
        hooks: also run the forward hooks above the blocks; those of the blocks never run.
    """
    none: dict[str, Any] = {name: {} for name in HOOKS}
    stand_ins = {
        name: shadow(block, forward=forward, **none)
        for (name, block), forward in zip(blocks.named_children(), forwards, strict=True)
    }
    found: nn.Module = shadow(blocks, _modules=stand_ins)
    for parent, name in reversed(_path_to(root, blocks)):
        kept = {} if hooks else {"_forward_hooks": {}}
        found = shadow(parent, _modules={**parent._modules, name: found}, **kept)
        if getattr(found, "gradient_checkpointing", False):
            vars(found)["gradient_checkpointing"] = False
    return found


def without_checkpointing(block: nn.Module) -> nn.Module:
    """The block, or a shadow of it without gradient checkpointing.

    While a block uses checkpointing, transformers removes its key-value cache.
    """
    if block.training and getattr(block, "gradient_checkpointing", False):
        return shadow(block, gradient_checkpointing=False)
    return block


def _path_to(root: nn.Module, target: nn.Module) -> list[tuple[nn.Module, str]]:
    """Each module from `root` down to `target`'s parent, with the name of the next one."""
    for name, child in root.named_children():
        if child is target:
            return [(root, name)]
        if further := _path_to(child, target):
            return [(root, name), *further]
    return []


def _rebound(value: "MethodType | partial[Any]", old: nn.Module, new: nn.Module) -> Any:
    if isinstance(value, MethodType):
        return MethodType(value.__func__, new) if value.__self__ is old else value
    if not any(argument is old for argument in value.args):
        return value
    args = (new if argument is old else argument for argument in value.args)
    return partial(value.func, *args, **value.keywords)
