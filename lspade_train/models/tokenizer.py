"""Loading the model's tokenizer, and its digest. Independent of tasks."""

import hashlib
import json
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lspade_train.errors import UnsupportedModelError
from lspade_train.models.checkpoint import load_failure
from lspade_train.models.gguf import find_gguf


def load_tokenizer(
    model_id: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hub id or a folder.

    Args:
        model_id: Hub id or folder.
        revision: commit, tag or branch on the Hub.
        trust_remote_code: run code from the model's repository.
        gguf_file: name of the GGUF file that contains the tokenizer.

    Raises:
        UnsupportedModelError: it cannot be loaded, or it needs remote code that is not trusted.
        RecipeError: the packages that read a GGUF file are not installed.
    """
    place = model_id
    options: dict[str, str] = {}
    if gguf_file is not None:
        path = find_gguf(model_id, gguf_file, revision)
        place, revision, options = str(path.parent), None, {"gguf_file": str(path)}
    try:
        return AutoTokenizer.from_pretrained(
            place, revision=revision, trust_remote_code=trust_remote_code, **options
        )
    except Exception as cause:  # transformers raises many kinds of errors for broken files
        if "trust_remote_code" in str(cause):
            raise UnsupportedModelError(
                f"The tokenizer of {model_id!r} needs code from its repository, which is not run "
                "unless it is trusted.\nRead that code, then set data.trust_remote_code to true."
            ) from cause
        message = load_failure("tokenizer", place, cause, options.get("gguf_file"))
        raise UnsupportedModelError(message) from cause


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that determines the token ids of a prompt, as hex."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state: dict[str, Any] = json.loads(backend.to_str())
        # These are settings of the last call, not of the tokenizer.
        state.pop("truncation", None)
        state.pop("padding", None)
    else:
        state = {"vocab": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    state["chat_template"] = tokenizer.chat_template
    state["bos_token"] = tokenizer.bos_token
    text = json.dumps(state, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
