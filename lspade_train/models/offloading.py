"""Weights that accelerate keeps in memory or on disk until their module runs (`device_map`)."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def stored(model: nn.Module) -> Iterator[Tensor]:
    """The values of a model's state, in the order of names, from wherever they are kept."""
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            path, _, own = name.rpartition(".")
            hook = _hook(model.get_submodule(path)) if value.is_meta else None
            yield value if hook is None else hook.weights_map[own]


def keep_loaded(module: nn.Module) -> None:
    """Bring a module's weights to its device for good: here they are used without its forward."""
    for part in module.modules():
        hook = _hook(part)
        if hook is None:
            continue
        from accelerate.utils import set_module_tensor_to_device

        for name, _ in part.named_parameters(recurse=False):
            value = hook.weights_map[name]
            set_module_tensor_to_device(part, name, hook.execution_device, value=value)
        hook.offload = False


def _hook(module: nn.Module) -> Any:
    """What brings a module's weights when it runs; None where they are there."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    return next((one for one in hooks if getattr(one, "offload", False)), None)
