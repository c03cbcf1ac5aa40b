"""`fit`, `validate` and `test`: Lightning's loops around the heads."""

import logging
from copy import deepcopy
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

from lspade_train.cli.answer import heads_option
from lspade_train.cli.parsing import Parsed, command_parser, parse, refusals_named

log = logging.getLogger(__name__)

FIT = """\
Train one linear head per layer by distillation and export them to checkpoints/NAME/.
The frozen model runs once: its hidden states and SPADE targets are cached on disk and reused
(see lspade-train cache). --trainer.KEY is Lightning's Trainer: epochs, devices, precision, logger.
Metrics go to CSV, and to Weights & Biases where a key or WANDB_MODE is set.
A run that was stopped goes on with --ckpt_path last, from its last whole epoch or, after SIGTERM
(exit code 143), its last whole step. A job that a scheduler may requeue gives it from the start."""

LOST = "Run it again with --ckpt_path last: it goes on from the last whole epoch."

CHECK = "Loss, KL, agreement and accuracy by layer of fitted heads on the {split} split."


def fit(arguments: list[str]) -> None:
    """Train and export."""
    parser = command_parser("fit", FIT, with_trainer=True)
    parser.add_argument(
        "--ckpt_path", type=str, default=None,
        help="checkpoint to go on from; last: this fit's own, or a new start where it has none",
    )  # fmt: skip
    parsed = parse(parser, arguments)

    from lspade_train.artifact import heads_folder
    from lspade_train.callbacks import finished_groups, forget_groups
    from lspade_train.errors import ArtifactError
    from lspade_train.layerwise import ALL_LAYERS, LayerGroup
    from lspade_train.storage import require_writable

    folder = heads_folder(parsed.recipe)
    if parsed.recipe.model.target == "final":
        folder /= "tuned_lens"
    require_writable(folder, ArtifactError)
    count, asked = parsed.recipe.model.layer_groups, parsed.options.ckpt_path
    loggers = _loggers(parsed, folder)
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
    log.info("next:  lspade-train evaluate --config RECIPE.yaml")


def _fit_group(parsed: Parsed, folder: Path, loggers: Any, group: Any, asked: str | None) -> None:
    """Train one group of layers; the last one exports them all."""
    from lspade_train.callbacks import LAST, ExportHeads, LastCheckpoint, group_folder
    from lspade_train.cli.ending import early_end_named

    last = group_folder(folder, group) / LAST
    checkpoint = _checkpoint(asked, last)
    module, data = _modules(parsed, group=group)
    callbacks: list[Any] = [ExportHeads(folder, parsed.recipe, group)]
    if parsed.trainer.get("enable_checkpointing") is not False:
        callbacks.append(LastCheckpoint(last.parent))
    with refusals_named():
        trainer = _trainer(parsed, loggers, callbacks)
        if trainer.world_size == 1:
            # What is wrong is said before a logger has made the folder of a run.
            data.trainer = trainer
            data.setup("fit")
        try:
            with early_end_named(trainer, LOST):
                trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        except KeyboardInterrupt:
            if last.exists():
                log.info("go on with --ckpt_path last (%s)", last)
            raise


def validate(arguments: list[str]) -> None:
    """Metrics on the validation split."""
    _check("validate", "validation", arguments)


def test(arguments: list[str]) -> None:
    """Metrics on the test split."""
    _check("test", "test", arguments)


def _check(command: str, split: str, arguments: list[str]) -> None:
    parser = command_parser(command, CHECK.format(split=split), with_trainer=True)
    heads_option(parser)
    parsed = parse(parser, arguments)

    from lspade_train.artifact import heads_folder
    from lspade_train.cli.ending import early_end_named
    from lspade_train.heads import LSpadeHeads, check_same_model

    folder = heads_folder(parsed.recipe)
    heads = LSpadeHeads.from_pretrained(parsed.options.heads or folder)
    module, data = _modules(parsed, heads)
    check_same_model(heads.metadata.get("base_model", {}), data.frozen.facts.identity)
    with refusals_named():
        trainer = _trainer(parsed, _loggers(parsed, folder), [])
        with early_end_named(trainer, "Run the same command again."):
            getattr(trainer, command)(module, data)


def _require_last(asked: str | None) -> None:
    """Groups of layers have a checkpoint each, and finished ones beside them."""
    if asked not in (None, "last"):
        from lspade_train.errors import RecipeError

        raise RecipeError(
            f"--ckpt_path is {asked}, and model.layer_groups is over 1; expected: last.\n"
            "Go on with --ckpt_path last, or without it from the start."
        )


def _checkpoint(asked: str | None, last: Path) -> str | None:
    """The checkpoint to go on from, checked to be one."""
    if asked is None or (asked == "last" and not last.exists()):
        return None
    path = last if asked == "last" else Path(asked)
    if not _is_checkpoint(path):
        from lspade_train.errors import RecipeError

        what = "is damaged or no checkpoint" if path.exists() else "does not exist"
        raise RecipeError(f"{path} {what}. Look in {last.parent}.")
    return str(path)


def _is_checkpoint(path: Path) -> bool:
    """Whether Lightning can go on from it. Mapped, not read; code in it is not run."""
    import torch

    if not is_zipfile(path):
        return False
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, UnpicklingError):
        return False
    return isinstance(found, dict) and {"state_dict", "loops", "optimizer_states"} <= found.keys()


def _modules(parsed: Parsed, heads: Any = None, **options: Any) -> tuple[Any, Any]:
    from lightning.pytorch import seed_everything

    from lspade_train.data import HiddenStateDataModule
    from lspade_train.module import LSpadeModule

    recipe = parsed.recipe
    seed_everything(recipe.seed_everything, verbose=False)
    data = HiddenStateDataModule(
        recipe.data,
        list(heads.layers) if heads is not None else recipe.model.layers,
        seed=recipe.seed_everything,
        name=recipe.name,
    )
    return LSpadeModule(recipe.model, heads, **options), data


def _loggers(parsed: Parsed, folder: Path) -> Any:
    from lspade_train.callbacks import default_loggers, keep_wandb_from_asking

    logger = parsed.trainer.get("logger")
    if logger is None or logger is True:
        return default_loggers(folder, parsed.recipe.name)
    if logger is not False:
        keep_wandb_from_asking()
    return logger


def _trainer(parsed: Parsed, loggers: Any, callbacks: list[Any]) -> Any:
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.pytorch import Trainer

    from lspade_train.callbacks import AtomicCheckpoints
    from lspade_train.cli.ending import StopTogether

    arguments = parsed.trainer | {"logger": loggers}
    # Copies: each group of layers has a trainer of its own, and callbacks remember.
    given = deepcopy(arguments.pop("callbacks", None) or [])
    given = given if isinstance(given, list) else [given]
    defaults: dict[str, Any] = {"log_every_n_steps": 10, "enable_model_summary": False}
    plugins: list[Any] = []
    if str(arguments.get("strategy", "auto")).startswith(("auto", "ddp")):
        plugins.append(AtomicCheckpoints())  # the others write their shards themselves
    if SLURMEnvironment.detect():
        # Lightning's requeueing may cut a step in half, and any recipe would go on from there.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    defaults["plugins"] = plugins
    return Trainer(**defaults | arguments, callbacks=[*given, *callbacks, StopTogether()])
