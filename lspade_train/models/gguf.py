"""GGUF files as base models: finding the file, and the options to load it.

transformers dequantises the weights while loading, so the result is an ordinary model.
"""

import importlib.util
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lspade_train.errors import RecipeError, UnsupportedModelError
from lspade_train.io.storage import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEEDED = ("gguf", "accelerate")


def find_gguf(model_id: str, gguf_file: str, revision: str | None = None) -> Path:
    """The GGUF file of a folder or of a repository on the Hub, downloaded if necessary.

    Args:
        model_id: Hub id or folder.
        gguf_file: name of the file in it.
        revision: commit, tag or branch on the Hub.

    Raises:
        RecipeError: the packages that read it are not installed.
        UnsupportedModelError: no such file.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(
            f"data.gguf_file is {gguf_file!r}, which needs {' and '.join(missing)}.\n"
            "Install with: pip install 'lspade-train[gguf]', or set it to null."
        )
    folder = Path(model_id)
    if folder.is_dir():
        path = folder / gguf_file
        if path.is_file():
            return path.absolute()
        raise UnsupportedModelError(
            f"{model_id} has no file {gguf_file!r}; {_near(folder, gguf_file)}\n"
            "Set data.gguf_file to one that is there."
        )
    from transformers.utils.hub import cached_file

    try:
        return Path(str(cached_file(model_id, gguf_file, revision=revision)))
    except (OSError, ValueError) as cause:
        text = first_line(cause)
        raise UnsupportedModelError(
            f"No file {gguf_file!r} was found in {model_id!r}: {text}\n"
            "Expected a folder or a Hub id that you can reach with that file in it; "
            "check data.model_id and data.gguf_file."
        ) from cause


def gguf_options(path: Path) -> dict[str, Any]:
    """Options for transformers to load a GGUF file.

    Always dequantised: packed weights need kernels that may not be installed, and a packed head is
    not a matrix.
    """
    from transformers import GgufConfig

    # The full path: transformers would prefer a file of that name in the current folder.
    return {"gguf_file": str(path), "quantization_config": GgufConfig(dequantize=True)}


def clear_gguf_marks(model: "PreTrainedModel") -> None:
    """Mark a dequantised model as an ordinary one: transformers still calls it quantised."""
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer = None  # type: ignore[assignment]


def _near(folder: Path, gguf_file: str) -> str:
    names = sorted(path.name for path in folder.glob("*.gguf"))
    near = get_close_matches(gguf_file, names, n=3, cutoff=0.3) or names[:3]
    return f"near it: {', '.join(near)}." if near else "there is no GGUF file in it."
