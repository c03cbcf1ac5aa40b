"""Checks a model's name before anything heavy is imported: a folder, an id, or neither.

The Hub is queried only once, since its client would retry for minutes if it does not answer.
"""

import logging
import os
import re
import ssl
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from lspade_train.errors import UnsupportedModelError

ENDPOINT = "https://huggingface.co"
SECONDS = 10
OFFLINE = "HF_HUB_OFFLINE"
HUB_ID = re.compile(r"(\w(?:[\w.-]*\w)?/)?\w(?:[\w.-]*\w)?", re.ASCII)
LONGEST = 96
"""Most characters in either part of an id."""
UNKNOWN, CLOSED = 404, 401  # without a token, the Hub answers 401 for unknown names

log = logging.getLogger(__name__)


def settle_hub(model: str, data: str | None, *, key: str = "data.model_id") -> None:
    """Refuse a model that does not exist; use only cached copies if the Hub does not answer.

    Makes no request if both are existing paths, or if `HF_HUB_OFFLINE` is set.

    Args:
        model: folder or Hub id.
        data: path or Hub id of the data; None: a task's own, on the Hub.
        key: setting that named the model, for the message.

    Raises:
        UnsupportedModelError: no such folder, and neither the Hub nor its cache has that id.
    """
    is_here = _exists(model)
    if not is_here and not is_hub_id(model):
        raise _no_model(model, "no such folder, and no id that the Hub could have", key)
    offline = os.environ.get(OFFLINE, "").upper() in {"1", "ON", "YES", "TRUE"}
    needs_hub = data is None or (not _exists(data) and is_hub_id(data))
    if is_here and (offline or not needs_hub):
        return
    endpoint = os.environ.get("HF_ENDPOINT") or ENDPOINT
    place = endpoint if is_here else f"{endpoint}/api/models/{model}"  # no local path leaves
    status, why = (None, f"{OFFLINE} is set") if offline else answer(place)
    if not is_here and not _is_cached(model):
        if status is None:
            nowhere = f"no such folder, not in the Hub's cache, and the Hub is out of reach ({why})"
            raise _no_model(model, nowhere, key)
        if status == UNKNOWN or (status == CLOSED and not _has_token()):
            nowhere = "no such folder, and the Hub has none that you can read"
            raise _no_model(model, nowhere, key, "; for a private one: hf auth login")
    if status is None and not offline:
        log.warning("The Hub cannot be reached (%s): only what is cached here is used.", why)
        _stay_offline()


def is_hub_id(name: str) -> bool:
    """Whether a name is a valid Hub id: `name` or `owner/name`, of allowed characters."""
    parts = name.split("/")
    fits = HUB_ID.fullmatch(name) and not {"--", ".."} & {a + b for a, b in pairwise(name)}
    return bool(fits) and max(map(len, parts)) <= LONGEST


def _no_model(name: str, why: str, key: str, more: str = "") -> UnsupportedModelError:
    return UnsupportedModelError(f"No model {name!r}: {why}{near_model(name)}\nCheck {key}{more}.")


def answer(address: str) -> tuple[int | None, str]:
    """The HTTP status of an address, None if there is no answer, and the reason."""
    try:
        with urlopen(Request(address, method="HEAD"), timeout=SECONDS) as found:
            return found.status, ""
    except HTTPError as error:
        return error.code, ""
    except URLError as error:
        # Certificates are left to the client, which may use others than Python.
        return (0, "") if isinstance(error.reason, ssl.SSLError) else (None, _said(error.reason))
    except (OSError, ValueError, HTTPException) as error:
        return None, _said(error)


def near_model(name: str) -> str:
    """`; did you mean x?` for a folder, or an id in the Hub's cache, with a similar name."""
    places = (Path(name).parent, Path(), Path("checkpoints"))
    folders = {str(file.parent) for place in places for file in place.glob("*/config.json")}
    nearest = get_close_matches(name, sorted({*folders, *_cached()} - {name}), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else "."


def _exists(name: str) -> bool:
    return "://" in name or Path(name).expanduser().exists()


def _is_cached(name: str) -> bool:
    return name in set(_cached())


def _cached() -> Iterable[str]:
    """The ids in the Hub client's cache."""
    home = Path(os.environ.get("HF_HOME") or Path("~/.cache/huggingface").expanduser())
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    return (place.name[8:].replace("--", "/") for place in cache.glob("models--*"))


def _has_token() -> bool:
    home = Path(os.environ.get("HF_HOME") or Path("~/.cache/huggingface").expanduser())
    given = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    return any(map(os.environ.get, given)) or (home / "token").exists()


def _stay_offline() -> None:
    os.environ[OFFLINE] = "1"
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:  # it has already read the environment
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def _said(reason: object) -> str:
    return getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
