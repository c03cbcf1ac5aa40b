"""`fit`: train the heads, from a recipe to a heads folder."""

import logging
import time
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

from lspade_train.cli.again import another, resumed
from lspade_train.cli.parsing import Parsed, command_parser, find_model, parse, refusals_named

log = logging.getLogger(__name__)

FIT = """\
Train one linear head per layer by distillation and export them to checkpoints/NAME/.
With --model.target both a tuned lens is trained in the same run and saved in tuned_lens/ there.
The frozen model runs once: its hidden states and SPADE targets are cached on disk and reused
(see lspade-train cache). --trainer.KEY sets arguments of Lightning's Trainer: accelerator (default
auto: a GPU if there is one), devices, max_epochs, precision, logger.
Metrics go to CSV, and to Weights & Biases if a key or WANDB_MODE is set.
An interrupted run is resumed with --ckpt_path last, from its last complete epoch or, after SIGTERM
(exit code 143), its last complete step. For jobs that may be requeued, always pass it.

  lspade-train fit --config recipes/arc.yaml
  lspade-train fit --config arc --trainer.max_epochs 5 --ckpt_path last"""

LOST = "Run it again with --ckpt_path last: it resumes from the last complete epoch."


def fit(arguments: list[str]) -> None:
    """Train and export."""
    began = time.monotonic()
    parser = command_parser("fit", FIT, with_trainer=True)
    parser.add_argument(
        "--ckpt_path", type=str, default=None,
        help="checkpoint to resume from; last: the latest of this run, or a new start if there is "
        "none",
    )  # fmt: skip
    parsed = parse(parser, arguments, early=_check_places)

    from lspade_train.cli.ending import print_fitted
    from lspade_train.cli.trainer import open_loggers
    from lspade_train.io.layout import WEIGHTS
    from lspade_train.io.parallel import ranks
    from lspade_train.training.callbacks import LAST, finished_groups, forget_groups, group_folder
    from lspade_train.training.layerwise import ALL_LAYERS, LayerGroup

    folder = _heads_folder(parsed)
    count, asked = parsed.recipe.model.layer_groups, parsed.options.ckpt_path
    loggers = open_loggers(parsed, folder)
    if count == 1:
        _fit_group(parsed, folder, loggers, ALL_LAYERS, asked)
    else:
        done = finished_groups(folder, parsed.recipe) if asked else 0
        first = group_folder(folder, LayerGroup(0, count))
        resumes = asked and (first / LAST).exists() and not (first / WEIGHTS).exists()
        if not done and not resumes:
            forget_groups(folder)
        # Run the last group again if all are fitted but were not joined.
        for number in range(min(done, count - 1), count):
            log.info("layer group %d of %d", number + 1, count)
            _fit_group(parsed, folder, loggers, LayerGroup(number, count), asked)
    if not ranks()[0] and not parsed.trainer.get("fast_dev_run"):  # a fast_dev_run exports nothing
        after = another("calibrate", [*parsed.arguments, *_heads_option(folder)])
        print_fitted(parsed.recipe, folder, time.monotonic() - began, after)


def _check_places(parsed: Parsed) -> None:
    """Check that the model exists, the heads folder is writable, and the data is complete."""
    _find_checkpoint(parsed)
    find_model(parsed)

    from lspade_train.errors import ArtifactError
    from lspade_train.io.storage import require_writable
    from lspade_train.tasks import require_splits

    require_writable(_heads_folder(parsed), ArtifactError)
    over_choices = parsed.recipe.model.scope == "choices"
    require_splits(parsed.recipe.data, ("train", "validation"), choices=over_choices)


def _heads_option(folder: Path) -> list[str]:
    """`--heads`, which other commands need for a tuned lens without L-SPADE heads beside it."""
    from lspade_train.io.layout import TUNED_LENS, WEIGHTS

    alone = folder.name == TUNED_LENS and not (folder.parent / WEIGHTS).exists()
    return ["--heads", str(folder)] if alone else []


def _heads_folder(parsed: Parsed) -> Path:
    from lspade_train.io.layout import TUNED_LENS
    from lspade_train.recipe import heads_folder

    folder = heads_folder(parsed.recipe)
    return folder / TUNED_LENS if parsed.recipe.model.target == "final" else folder


def _fit_group(parsed: Parsed, folder: Path, loggers: Any, group: Any, asked: str | None) -> None:
    """Train one group of layers; the last one exports them all."""
    from lspade_train.artifacts.export import ExportHeads
    from lspade_train.cli.trainer import WarnAtChance, early_end_named, open_modules, open_trainer
    from lspade_train.training.callbacks import LAST, LastCheckpoint, group_folder
    from lspade_train.training.module import check_rank

    last = group_folder(folder, group) / LAST
    checkpoint, before = _checkpoint(asked, last), _written_at(last)
    module, data = open_modules(parsed, group=group)
    check_rank(parsed.recipe.model, data.hidden_size)  # before building a cache
    callbacks: list[Any] = [ExportHeads(folder, parsed.recipe, group)]
    if not group.number:
        callbacks.append(WarnAtChance())
    if parsed.trainer.get("enable_checkpointing") is not False:
        callbacks.append(LastCheckpoint(last.parent))
    with refusals_named():
        trainer = open_trainer(parsed, loggers, callbacks)
        if trainer.world_size == 1:
            # Report errors before a logger creates the folder of a run.
            data.trainer = trainer
            data.setup("fit")
        try:
            with early_end_named(trainer, LOST):
                trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        except KeyboardInterrupt as stop:
            # Do not resume from a checkpoint of an earlier fit, which may have other settings.
            own = bool(asked) or group.number > 0 or _written_at(last) != before
            command = resumed(parsed.arguments, from_checkpoint=own)
            stop.args = (f"resume it with: {command}",)
            raise


def _written_at(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _find_checkpoint(parsed: Parsed) -> None:
    """Check that the checkpoint to resume from exists. Its content is checked later, with torch."""
    from lspade_train.errors import RecipeError
    from lspade_train.recipe import heads_folder

    asked = parsed.options.ckpt_path
    if asked in (None, "last"):
        return
    if parsed.recipe.model.layer_groups > 1:  # each group has its own checkpoint, or is finished
        raise RecipeError(
            f"--ckpt_path is {asked}, and model.layer_groups is over 1; expected: last.\n"
            "Resume with --ckpt_path last, or start again without it."
        )
    if not Path(asked).exists():
        raise RecipeError(
            f"{asked} does not exist. This fit's own, in {heads_folder(parsed.recipe)}, is "
            "--ckpt_path last."
        )


def _checkpoint(asked: str | None, last: Path) -> str | None:
    """The checkpoint to resume from, after checking that it is one."""
    if asked is None or (asked == "last" and not last.exists()):
        return None
    path = last if asked == "last" else Path(asked)
    if not _is_checkpoint(path):
        from lspade_train.errors import RecipeError

        raise RecipeError(f"{path} is damaged or not a checkpoint. Look in {last.parent}.")
    return str(path)


def _is_checkpoint(path: Path) -> bool:
    """Whether Lightning can resume from it. Memory-mapped; code in it is not executed."""
    import torch

    if not is_zipfile(path):
        return False
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, UnpicklingError):
        return False
    return isinstance(found, dict) and {"state_dict", "loops", "optimizer_states"} <= found.keys()
