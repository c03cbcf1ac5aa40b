"""How a block is applied: as it is, or through `torch.compile`.

One compiled function serves every block of equal structure, and the blocks themselves stay as
they are: a compiled block would trace the recorders that stand in for it while a plan is made.
"""

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
            with _settings():
                return fast(block, hidden, args, kwargs)
        except TorchDynamoException as cause:
            raise _refused(block, cause) from cause

    return apply


def _settings() -> ExitStack:
    """Compile for sizes that happen to be equal as for others; do not stop at eight variants."""
    import torch._dynamo.config as dynamo
    import torch.fx.experimental._config as shapes

    held = ExitStack()
    held.enter_context(shapes.patch(use_duck_shape=False))  # type: ignore[attr-defined]
    held.enter_context(dynamo.patch(recompile_limit=VARIANTS))  # type: ignore[attr-defined]
    return held


def _refused(block: nn.Module, cause: Exception) -> RecipeError:
    inner = getattr(cause, "inner_exception", cause)
    if (needs := NEEDS.get(type(inner).__name__)) is not None:
        return RecipeError(f"data.compile needs {needs}.\nOr set it to false.")
    text = (str(inner).strip().splitlines() or [""])[0]
    return RecipeError(
        f"torch.compile fails on {type(block).__name__}: {type(inner).__name__}: {text[:200]}\n"
        "Expected a block that it can compile; set data.compile to false."
    )
