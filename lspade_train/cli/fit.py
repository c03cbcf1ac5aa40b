"""`fit`: train the heads, from a recipe to a heads folder."""

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

from lspade_train.cli.parsing import Parsed, command_parser, parse, refusals_named

log = logging.getLogger(__name__)

FIT = """\
Train one linear head per layer by distillation and export them to checkpoints/NAME/.
With --model.target both the heads folder also gets a tuned lens, in tuned_lens/, from the same fit.
The frozen model runs once: its hidden states and SPADE targets are cached on disk and reused
(see lspade-train cache). --trainer.KEY is Lightning's Trainer: epochs, devices, precision, logger.
Metrics go to CSV, and to Weights & Biases where a key or WANDB_MODE is set.
A run that was stopped is resumed with --ckpt_path last, from its last whole epoch or, after SIGTERM
(exit code 143), its last whole step. A job that a scheduler may requeue sets it from the start.

  lspade-train fit --config recipes/arc.yaml
  lspade-train fit --config arc --trainer.max_epochs 5 --ckpt_path last"""

LOST = "Run it again with --ckpt_path last: it resumes from the last whole epoch."


def fit(arguments: list[str]) -> None:
    """Train and export."""
    parser = command_parser("fit", FIT, with_trainer=True)
    parser.add_argument(
        "--ckpt_path", type=str, default=None,
        help="checkpoint to resume from; last: this fit's own, or a new start where it has none",
    )  # fmt: skip
    parsed = parse(parser, arguments)

    from lspade_train.artifacts.folder import heads_folder
    from lspade_train.cli.trainer import open_loggers
    from lspade_train.errors import ArtifactError
    from lspade_train.io.layout import TUNED_LENS
    from lspade_train.io.storage import require_writable
    from lspade_train.tasks import require_splits
    from lspade_train.training.callbacks import finished_groups, forget_groups
    from lspade_train.training.layerwise import ALL_LAYERS, LayerGroup

    folder = heads_folder(parsed.recipe)
    if parsed.recipe.model.target == "final":
        folder /= TUNED_LENS
    require_writable(folder, ArtifactError)
    over_choices = parsed.recipe.model.scope == "choices"
    require_splits(parsed.recipe.data, ("train", "validation"), choices=over_choices)
    count, asked = parsed.recipe.model.layer_groups, parsed.options.ckpt_path
    loggers = open_loggers(parsed, folder)
    if count == 1:
        _fit_group(parsed, folder, loggers, ALL_LAYERS, asked)
    else:
        _require_last(asked)
        done = finished_groups(folder, parsed.recipe) if asked else 0
        if not done:
            forget_groups(folder)
        # The last group again where all are done but were not put together.
        for number in range(min(done, count - 1), count):
            log.info("layer group %d of %d", number + 1, count)
            _fit_group(parsed, folder, loggers, LayerGroup(number, count), asked)
    log.info("heads: %s", folder)
    log.info("next:  lspade-train evaluate --config %s", parsed.recipes[-1])


def _fit_group(parsed: Parsed, folder: Path, loggers: Any, group: Any, asked: str | None) -> None:
    """Train one group of layers; the last one exports them all."""
    from lspade_train.artifacts.export import ExportHeads
    from lspade_train.cli.trainer import WarnAtChance, early_end_named, open_modules, open_trainer
    from lspade_train.training.callbacks import LAST, LastCheckpoint, group_folder
    from lspade_train.training.module import check_rank

    last = group_folder(folder, group) / LAST
    checkpoint = _checkpoint(asked, last)
    module, data = open_modules(parsed, group=group)
    check_rank(parsed.recipe.model, data.hidden_size)  # before a cache is built for it
    callbacks: list[Any] = [ExportHeads(folder, parsed.recipe, group)]
    if not group.number:
        callbacks.append(WarnAtChance())
    if parsed.trainer.get("enable_checkpointing") is not False:
        callbacks.append(LastCheckpoint(last.parent))
    with refusals_named():
        trainer = open_trainer(parsed, loggers, callbacks)
        if trainer.world_size == 1:
            # What is wrong is said before a logger has made the folder of a run.
            data.trainer = trainer
            data.setup("fit")
        try:
            with early_end_named(trainer, LOST):
                trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        except KeyboardInterrupt as stop:
            if last.exists():
                stop.args = (f"resume it with: {_resumed(parsed.arguments)}",)
            raise


def _resumed(arguments: Sequence[str]) -> str:
    """The command that resumes this fit."""
    words = list(arguments)
    if "--ckpt_path" in words:
        place = words.index("--ckpt_path")
        del words[place : place + 2]
    words = [word for word in words if not word.startswith("--ckpt_path=")]
    return shlex.join(["lspade-train", "fit", *words, "--ckpt_path", "last"])


def _require_last(asked: str | None) -> None:
    """Groups of layers have a checkpoint each, and finished ones beside them."""
    if asked not in (None, "last"):
        from lspade_train.errors import RecipeError

        raise RecipeError(
            f"--ckpt_path is {asked}, and model.layer_groups is over 1; expected: last.\n"
            "Resume with --ckpt_path last, or start again without it."
        )


def _checkpoint(asked: str | None, last: Path) -> str | None:
    """The checkpoint to resume from, checked to be one."""
    if asked is None or (asked == "last" and not last.exists()):
        return None
    path = last if asked == "last" else Path(asked)
    if not _is_checkpoint(path):
        from lspade_train.errors import RecipeError

        what = "is damaged or not a checkpoint" if path.exists() else "does not exist"
        raise RecipeError(f"{path} {what}. Look in {last.parent}.")
    return str(path)


def _is_checkpoint(path: Path) -> bool:
    """Whether Lightning can resume from it. Mapped, not read; code in it is not run."""
    import torch

    if not is_zipfile(path):
        return False
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, UnpicklingError):
        return False
    return isinstance(found, dict) and {"state_dict", "loops", "optimizer_states"} <= found.keys()
