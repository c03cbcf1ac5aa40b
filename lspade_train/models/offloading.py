"""Weights that accelerate keeps in memory or on disk until their module runs (`device_map`)."""

# pyright: reportPrivateUsage=false
# PyTorch has no public names for a module's tables of children, weights and hooks.

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lspade_train.models.shadow import shadow


def stored(model: nn.Module) -> Iterator[Tensor]:
    """The values of a model's state, in the order of names, including offloaded ones."""
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            path, _, own = name.rpartition(".")
            hook = _hook(model.get_submodule(path)) if value.is_meta else None
            yield value if hook is None else hook.weights_map[own]


def loaded(module: nn.Module) -> nn.Module:
    """The module, or, if its weights are offloaded, a copy with its weights on their device.

    For modules whose weights are used without their forward; the module itself is not modified.
    """
    hook = _hook(module)
    children = {n: c if c is None else loaded(c) for n, c in module._modules.items()}
    if hook is None and all(child is module._modules[name] for name, child in children.items()):
        return module
    copy = shadow(module, _modules=children)
    if hook is not None:
        vars(copy)["_parameters"] = parameters = dict(module._parameters)
        for name in [name for name, value in parameters.items() if value is not None]:
            value = hook.weights_map[name].to(hook.execution_device)
            parameters[name] = nn.Parameter(value, requires_grad=False)
        for name in ("forward", "_old_forward", "_hf_hook"):  # nothing to load or to offload
            vars(copy).pop(name, None)
    return copy


def _hook(module: nn.Module) -> Any:
    """The hook that loads a module's weights when it runs; None if they are not offloaded."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    return next((one for one in hooks if getattr(one, "offload", False)), None)
