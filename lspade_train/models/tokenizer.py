"""The model's tokenizer: loading it, and its digest. Knows nothing of tasks."""

import hashlib
import json
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lspade_train.errors import UnsupportedModelError


def load_tokenizer(
    model_id: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hub id or a folder.

    Raises:
        UnsupportedModelError: none can be loaded, or it needs code that is not trusted.
    """
    try:
        return AutoTokenizer.from_pretrained(
            model_id, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as cause:
        if "trust_remote_code" in str(cause):
            raise UnsupportedModelError(
                f"The tokenizer of {model_id!r} needs code from its repository, which is not run "
                "unless it is trusted.\nRead that code, then set data.trust_remote_code to true."
            ) from cause
        text = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise UnsupportedModelError(
            f"No tokenizer could be loaded from {model_id!r}: {text}\n"
            "Expected a Hub id that you can reach or a folder with tokenizer.json; "
            "check data.model_id."
        ) from cause


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that decides the token ids of a prompt, as hex."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state: dict[str, Any] = json.loads(backend.to_str())
        # Settings of the last call, not of the tokenizer.
        state.pop("truncation", None)
        state.pop("padding", None)
    else:
        state = {"vocab": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    state["chat_template"] = tokenizer.chat_template
    state["bos_token"] = tokenizer.bos_token
    text = json.dumps(state, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
