"""Applies a block, either eagerly or through `torch.compile`.

One compiled function serves all blocks of the same structure; the blocks are not modified.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from lspade_train.errors import RecipeError
from lspade_train.io.storage import first_line
from lspade_train.models.plan import BlockStart

Apply = Callable[[nn.Module, Tensor, Sequence[Any], Mapping[str, Any]], Tensor]
"""Maps a block, its hidden state and its other arguments to the next hidden state."""

VARIANTS = 64
"""Most compiled variants of a block: kinds of block x with or without mask x one row or many x one
token or many. Any others run uncompiled."""

NEEDS = {
    "InvalidCxxCompiler": "a C++ compiler: install g++, or point CXX to one",
    "TritonMissing": "Triton: pip install triton",
}
"""What is missing, by the name of torch's internal error."""


def apply_block(
    block: nn.Module, hidden: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    """The block's output state, whether it returns the state alone or in a tuple."""
    output = block(hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def compiled_apply() -> Apply:
    """`apply_block`, compiled on demand for each kind of block, with dynamic rows and tokens."""
    fast = torch.compile(apply_block, dynamic=True)

    def apply(
        block: nn.Module, hidden: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Tensor:
        caches = (value for value in (*args, *kwargs.values()) if isinstance(value, Cache))
        if not all(isinstance(cache, BlockStart) for cache in caches):
            # A growing cache holds every block's keys, so each block would be compiled separately.
            return apply_block(block, hidden, args, kwargs)
        from torch._dynamo.exc import TorchDynamoException

        try:
            with _SETTINGS:
                return fast(block, hidden, args, kwargs)
        except TorchDynamoException as cause:
            raise _refused(block, cause) from cause

    return apply


class _Settings:
    """Sets the compiler's settings while any thread runs a compiled block, then restores them.

    Sizes that happen to be equal are not specialised, more than eight variants are allowed, and
    hooks set on a module are noticed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = 0
        self._held = ExitStack()

    def __enter__(self) -> None:
        import torch._dynamo.config as dynamo
        import torch.fx.experimental._config as shapes

        with self._lock:
            self._threads += 1
            if self._threads == 1:
                own = {"recompile_limit": VARIANTS, "skip_nnmodule_hook_guards": False}
                self._held.enter_context(shapes.patch(use_duck_shape=False))  # type: ignore[attr-defined]
                self._held.enter_context(dynamo.patch(own))  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._threads -= 1
            if not self._threads:
                self._held.close()


_SETTINGS = _Settings()


def _refused(block: nn.Module, cause: Exception) -> RecipeError:
    inner = getattr(cause, "inner_exception", cause)
    if (needs := NEEDS.get(type(inner).__name__)) is not None:
        return RecipeError(f"data.compile needs {needs}.\nOr set it to false.")
    text = first_line(inner)
    return RecipeError(
        f"torch.compile fails on {type(block).__name__}: {type(inner).__name__}: {text[:200]}\n"
        "Expected a block that it can compile; set data.compile to false."
    )
