"""What several commands share: `--heads`, and opening the model for the runtime."""

from pathlib import Path
from typing import Any

from lspade_train.cli.parsing import Parsed


def heads_option(parser: Any) -> None:
    """`--heads`: where the heads are."""
    parser.add_argument(
        "--heads", type=str | None, default=None, help="heads folder or URL; null: checkpoints/NAME"
    )


def heads_given(parsed: Parsed, *, written_by: str | None = None) -> Path:
    """The folder that `--heads` names: a URL's is its mirror, which no command writes into.

    Args:
        parsed: the command line.
        written_by: the command, if it writes into the folder.

    Raises:
        HubError: a URL that cannot be read, or that would be written.
        ArtifactError: a folder that would be written and cannot be.
    """
    from lspade_train.artifacts.folder import heads_folder
    from lspade_train.errors import ArtifactError, HubError
    from lspade_train.io.fetch import local_folder
    from lspade_train.io.remote import is_remote
    from lspade_train.io.storage import require_writable

    given = parsed.options.heads
    if given is None or not is_remote(given):
        folder = heads_folder(parsed.recipe) if given is None else Path(given)
        if written_by is not None and folder.exists():
            require_writable(folder, ArtifactError)
        return folder
    if written_by is not None:
        raise HubError(
            f"{written_by} writes into the heads folder, and {given} is not on this machine.\n"
            f"Bring it here (lspade-train pull {given} --to DIR), give --heads DIR, and push it."
        )
    return local_folder(given)


def runtime_model(parsed: Parsed, folder: Path) -> tuple[Any, Any]:
    """The model without the data module: predict does not load Lightning."""
    from lspade_train.models import ModelAdapter
    from lspade_train.probes.heads import LSpadeHeads

    recipe = parsed.recipe
    heads = LSpadeHeads.from_pretrained(folder)
    adapter = ModelAdapter.from_pretrained(
        recipe.data.model_id,
        revision=recipe.data.revision,
        dtype=recipe.data.dtype,
        device=recipe.data.device,
        device_map=recipe.data.device_map,
        quantization=recipe.data.quantization,
        trust_remote_code=recipe.data.trust_remote_code,
        gguf_file=recipe.data.gguf_file,
    )
    return heads, adapter
