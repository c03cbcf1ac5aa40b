"""How a block is applied: as it is, or through `torch.compile`.

One compiled function serves every block of equal structure; the blocks themselves stay as they are.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from lspade_train.errors import RecipeError
from lspade_train.models.plan import BlockStart

Apply = Callable[[nn.Module, Tensor, Sequence[Any], Mapping[str, Any]], Tensor]
"""Block, its hidden state, and its further arguments, to the next hidden state."""

VARIANTS = 64
"""Compiled variants of a block at most: kinds of block x with and without mask x one row or many x
one token or many. The rest runs uncompiled."""

NEEDS = {
    "InvalidCxxCompiler": "a C++ compiler: install g++, or point CXX to one",
    "TritonMissing": "Triton: pip install triton",
}
"""What is missing, by the name of the error that torch raises deep inside."""


def apply_block(
    block: nn.Module, hidden: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    """The block's hidden state, whether it returns that alone or in a tuple."""
    output = block(hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def compiled_apply() -> Apply:
    """`apply_block`, compiled for any number of rows and tokens as it meets new kinds of block."""
    fast = torch.compile(apply_block, dynamic=True)

    def apply(
        block: nn.Module, hidden: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Tensor:
        caches = (value for value in (*args, *kwargs.values()) if isinstance(value, Cache))
        if not all(isinstance(cache, BlockStart) for cache in caches):
            # A cache that grows holds every block's keys: it would be compiled block by block.
            return apply_block(block, hidden, args, kwargs)
        from torch._dynamo.exc import TorchDynamoException

        try:
            with _SETTINGS:
                return fast(block, hidden, args, kwargs)
        except TorchDynamoException as cause:
            raise _refused(block, cause) from cause

    return apply


class _Settings:
    """The compiler's settings while any thread runs a compiled block; the process's own otherwise.

    Sizes that happen to be equal are compiled as others are, eight variants are not the end, and a
    hook set on a module is noticed.
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
    text = (str(inner).strip().splitlines() or [""])[0]
    return RecipeError(
        f"torch.compile fails on {type(block).__name__}: {type(inner).__name__}: {text[:200]}\n"
        "Expected a block that it can compile; set data.compile to false."
    )
