"""A pool of buffers that are reused once no tensor uses them. Independent of rows."""

import math
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor


class BufferPool:
    """Provides memory for reads, and reuses it once it has been released.

    Fresh memory has to be mapped by the system, page by page, which takes longer than reading into
    it. Every tensor over a buffer, and every view of one, keeps the buffer's loan alive: as long as
    one of them exists, the memory is not reused.
    """

    KEPT = 8
    """Most buffers kept: hidden, target and final of two blocks, and of a batch between them."""
    LARGEST = 64 * 2**20
    """Bytes of the largest buffer that is kept."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        size = math.prod(shape) * dtype.itemsize
        if not 0 < size <= self.LARGEST:
            return torch.empty(shape, dtype=dtype)
        loan = _Loan(self._find(size), self._free)
        return torch.from_numpy(np.asarray(loan)[:size]).view(dtype).view(shape)

    def _find(self, size: int) -> np.ndarray:
        for place, buffer in enumerate(self._free):
            if buffer.nbytes >= size:
                return self._free.pop(place)
        return np.empty(size, dtype=np.uint8)


class _Loan:
    """Owner of a buffer while tensors use it: their underlying arrays reference this object."""

    def __init__(self, buffer: np.ndarray, free: list[np.ndarray]) -> None:
        self.__array_interface__: dict[str, Any] = buffer.__array_interface__
        weakref.finalize(self, _take_back, buffer, free).atexit = False


def _take_back(buffer: np.ndarray, free: list[np.ndarray]) -> None:
    if len(free) < BufferPool.KEPT:
        free.append(buffer)
