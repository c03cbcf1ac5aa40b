"""Safetensors files that are complete or absent, with a tag that identifies their purpose."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lspade_train.errors import LSpadeError
from lspade_train.io.storage import (
    atomic_path,
    first_line,
    join_lines,
    json_digest,
    read_failure,
    regular_size,
)

TAG_END = ", content sha256:"
UNREADABLE = (
    OSError,
    SafetensorError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    OverflowError,
)
"""Errors of safetensors and torch for files of another format."""


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    tag: str = "",
    error: type[LSpadeError] = LSpadeError,
) -> None:
    """Write a safetensors file, atomically; equal content gives equal bytes.

    Args:
        path: the file.
        tensors: tensors by name.
        tag: what the file was made for; see `file_tag`. Stored with a digest of the tensors in one
            string, since safetensors writes several metadata entries in random order.
        error: type of error to raise.

    Raises:
        error: the file cannot be written.
    """
    with atomic_path(path, error) as temporary:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata=_tagged(tag, contiguous) if tag else None)


def file_tag(path: Path) -> str | None:
    """The tag of a complete, undamaged safetensors file; None if there is no such file or tag.

    Reads the whole file to detect damage, even a single flipped bit.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tag = metadata.get("tag", "").rpartition(TAG_END)[0]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tag if tag and metadata == _tagged(tag, tensors) else None
    except UNREADABLE:
        return None


def _tagged(tag: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    names = sorted(tensors)
    content = tensor_digest(*(tensors[name] for name in names))
    return {"tag": f"{tag}{TAG_END}{json_digest([names, content])}"}


def read_tensors(path: Path, error: type[LSpadeError], remedy: str = "") -> dict[str, Tensor]:
    """Map a safetensors file into memory; pages are read when they are touched.

    Args:
        path: the file.
        error: type of error to raise.
        remedy: second line of the message: what the user should do next.

    Raises:
        error: the file is missing, unreadable, or its header does not describe its bytes.
    """
    try:
        regular_size(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as cause:
        raise error(join_lines(read_failure(path, cause), remedy)) from cause
    except UNREADABLE as cause:
        text = f"{path} is not a complete safetensors file ({first_line(cause)})."
        raise error(join_lines(text, remedy)) from cause


def tensor_digest(*tensors: Tensor | None) -> str:
    """SHA-256 over shapes, dtypes and bytes, as hex."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            digest.update(b"none")
            continue
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{tuple(flat.shape)}{flat.dtype}".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
