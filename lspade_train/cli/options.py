"""Shared by several commands: `--heads`, and opening what the runtime needs."""

from pathlib import Path
from typing import Any

from lspade_train.cli.again import another
from lspade_train.cli.parsing import Parsed, find_model


def heads_option(parser: Any) -> None:
    """Add `--heads`, the heads folder."""
    parser.add_argument(
        "--heads",
        type=str | None,
        default=None,
        help="heads folder or URL; default: checkpoints/NAME",
    )


def heads_given(parsed: Parsed, *, written_by: str | None = None) -> Path:
    """The folder given by `--heads`; for a URL or a Hub id its local copy, not to be written to.

    Args:
        parsed: the command line.
        written_by: the command, if it writes into the folder.

    Raises:
        HubError: a URL or a Hub id that cannot be read, or that the command would write to.
        ArtifactError: the command would write to the folder, which is not writable.
    """
    from lspade_train.errors import ArtifactError, HubError
    from lspade_train.io.fetch import local_folder
    from lspade_train.io.storage import require_writable
    from lspade_train.recipe import heads_folder

    given = parsed.options.heads
    if given is None or Path(given).is_dir():
        folder = heads_folder(parsed.recipe) if given is None else Path(given)
        if written_by is not None and folder.exists():
            require_writable(folder, ArtifactError)
        return folder
    if written_by is not None:
        raise HubError(
            f"{written_by} writes into the heads folder, but {given} is remote.\n"
            f"Pull it (lspade-train pull {given} --to DIR), use --heads DIR, then push the result."
        )
    return local_folder(given)


def find_heads(parsed: Parsed, *, tuned_lens: bool = False) -> None:
    """Refuse a recipe whose model or heads do not exist; loads neither.

    Args:
        parsed: the command line.
        tuned_lens: a tuned lens without L-SPADE heads beside it will do, if the recipe trains one.
    """
    find_model(parsed)

    from lspade_train.errors import ArtifactError
    from lspade_train.io.fetch import local_folder
    from lspade_train.io.layout import CONFIG, TUNED_LENS
    from lspade_train.io.remote import is_remote
    from lspade_train.recipe import heads_folder

    folder, given = heads_folder(parsed.recipe), parsed.options.heads
    if given is not None and not is_remote(given):
        local_folder(given)
    lens = folder / TUNED_LENS
    if tuned_lens and parsed.recipe.model.target == "final":
        folder = lens
    if given is None and not (folder / CONFIG).exists():
        if (lens / CONFIG).exists():
            raise ArtifactError(
                f"{folder} holds a tuned lens and no L-SPADE heads.\nUse the tuned lens with "
                f"--heads {lens}, or fit L-SPADE heads, too, with --model.target spade."
            )
        raise ArtifactError(
            f"No heads in {folder}: this recipe was not fitted here.\nFit it: "
            f"{another('fit', parsed.arguments, without=parsed.own)}"
        )


def runtime_parts(parsed: Parsed, folder: Path) -> tuple[Any, Any, Any]:
    """Heads, model and tokenizer, without the data module, so that Lightning is not imported."""
    from lspade_train.models.open import open_model
    from lspade_train.probes.heads import LSpadeHeads

    heads = LSpadeHeads.from_pretrained(folder)
    return heads, *open_model(parsed.recipe.data)
