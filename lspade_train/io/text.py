"""Text from and for users: byte-order marks, undecodable bytes, JSON, times, sizes.

Independent of tasks and recipes. Imports nothing heavy.
"""

import codecs
import io
import json
import math
import re
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TextIO

from lspade_train.errors import LSpadeError

# UTF-32 first: its little-endian mark begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
SURROGATE = re.compile(r"[\ud800-\udfff]")
UNDECODABLE = "lspade-undecodable"

# Undecodable bytes become a lone surrogate, in any encoding, which marks the line as not text.
codecs.register_error(UNDECODABLE, lambda error: ("\udcff", getattr(error, "end", 0)))


def encoding_of(head: bytes) -> str:
    """The encoding that a byte-order mark indicates; UTF-8 if there is none."""
    return next((name for mark, name in MARKS if head.startswith(mark)), "utf-8")


def read_text(path: Path, error: type[LSpadeError]) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark.

    Raises:
        error: the file cannot be read, or is in another encoding.
    """
    try:
        content = path.read_bytes()
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}.") from cause
    encoding = encoding_of(content)
    try:
        return content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as cause:
        line = content[: cause.start].count(b"\n") + 1
        name = encoding.removesuffix("-sig").upper()
        raise error(
            f"{path}, line {line} is not {name} text (byte 0x{content[cause.start]:02x}). "
            "Save the file as UTF-8."
        ) from cause


def lines_of(binary: BinaryIO) -> TextIO:
    """The lines of a stream, decoded as they arrive.

    A byte that cannot be decoded becomes a lone surrogate, so that it affects only its own line,
    which `require_text` refuses.
    """
    peek = getattr(binary, "peek", None)
    head: bytes = peek(4)[:4] if peek else b""
    return io.TextIOWrapper(binary, encoding=encoding_of(head), errors=UNDECODABLE)


def require_text(text: str) -> None:
    """Refuse lone surrogates, which no encoding allows and no tokenizer accepts.

    Raises:
        ValueError: the text has one.
    """
    found = SURROGATE.search(text)
    if found and found[0] == "\udcff":
        raise ValueError("holds bytes that are not text in the file's encoding")
    if found:
        raise ValueError(f"holds half of a surrogate pair (\\u{ord(found[0]):x})")


def parse_object(line: str) -> dict[str, Any]:
    """A JSON object with finite numbers and without lone surrogates.

    Raises:
        ValueError: the line is not such an object.
    """
    require_text(line)
    try:
        value = json.loads(line, parse_constant=_not_json, parse_float=_finite)
    except RecursionError as cause:
        raise ValueError("nested too deeply") from cause
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    if "\\u" in line:  # an escape may be a lone surrogate
        require_text(json.dumps(value, ensure_ascii=False))
    return value


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits:.20} is too large a number")
    return value


def duration(seconds: float) -> str:
    """A time in words, such as `12 s`, `3 min 20 s` or `1 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def byte_size(count: float) -> str:
    """A size in words, such as `26.1 kB` or `1.03 GB`; three digits."""
    units = ("B", "kB", "MB", "GB", "TB")
    place = 0
    while count >= 999.5 and place < len(units) - 1:
        count, place = count / 1000, place + 1
    return f"{count:.3g} {units[place]}"
