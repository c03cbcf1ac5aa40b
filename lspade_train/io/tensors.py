"""Safetensors files that are complete or absent, with a tag that identifies their purpose."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lspade_train.errors import LSpadeError
from lspade_train.io.storage import (
    atomic_file,
    first_line,
    join_lines,
    read_failure,
    regular_size,
)

TAG_END = ", content xxh3:"
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


DTYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Their names in a safetensors file, in the order in which safetensors stores them: wide types
first, so that every tensor is aligned."""


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    tag: str = "",
    error: type[LSpadeError] = LSpadeError,
) -> str:
    """Write a safetensors file, atomically; equal content gives equal bytes.

    Not with `safetensors.torch.save_file`, which writes a tensor at once: see `storage.CHUNK`.

    Args:
        path: the file.
        tensors: tensors by name.
        tag: what the file was made for; see `file_tag`. Stored with a digest of the tensors in one
            string, since safetensors writes several metadata entries in random order.
        error: type of error to raise.

    Returns:
        SHA-256 of the file's bytes, as hex.

    Raises:
        error: the file cannot be written.
    """
    digest = hashlib.sha256()
    with atomic_file(path, error) as file:
        for part in _content(tensors, tag):
            digest.update(part)
            file.write(part)
    return digest.hexdigest()


def file_digest_of(tensors: Mapping[str, Tensor], tag: str = "") -> str:
    """SHA-256 of the file that `write_tensors` would write, as hex."""
    digest = hashlib.sha256()
    for part in _content(tensors, tag):
        digest.update(part)
    return digest.hexdigest()


def _content(tensors: Mapping[str, Tensor], tag: str) -> Iterator[memoryview]:
    """The bytes of a safetensors file, equal to those of `safetensors.torch.save`."""
    host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    order = [*DTYPES]
    names = sorted(host, key=lambda name: (order.index(host[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": _tagged(tag, host)} if tag else {}
    end = 0
    for name in names:
        start, end = end, end + host[name].nbytes
        kind, shape = DTYPES[host[name].dtype], [*host[name].shape]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in names:
        yield _bytes(host[name])


def _bytes(tensor: Tensor) -> memoryview:
    """A view of a contiguous tensor's bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


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
    # Not SHA-256: it is to detect damage, not forgery, and is 4 times faster.
    content = xxhash.xxh3_128()
    for name in sorted(tensors):
        content.update(name.encode())
        _update(content, tensors[name])
    return {"tag": f"{tag}{TAG_END}{content.hexdigest()}"}


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
        _update(digest, tensor)
    return digest.hexdigest()


def _update(digest: Any, tensor: Tensor) -> None:
    flat = tensor.detach().cpu().contiguous()
    digest.update(f"{tuple(flat.shape)}{flat.dtype}".encode())
    digest.update(_bytes(flat))
