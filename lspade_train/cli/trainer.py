"""Lightning's Trainer for `fit`, `validate` and `test`, and how its loops end early."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lspade_train.cache import StateDataset
from lspade_train.cli.parsing import Parsed
from lspade_train.cli.signals import Terminated, sigterm
from lspade_train.evaluation.chance import cached_accuracy
from lspade_train.io.parallel import lost_peers_named

log = logging.getLogger(__name__)


class StopTogether(Callback):
    """On SIGTERM, all processes of a fit finish the current step and stop together."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove Lightning's own handler.

        It calls a collective at whatever point the signal interrupts a process, while the others
        may be in a different one, and then stops each process after a different step.
        """
        _signals(trainer)._sigterm_notifier_fn = lambda *_: None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on, steps must not be interrupted."""
        sigterm.deferred = True

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Agree among the processes on whether this was the last step."""
        if trainer.strategy.reduce_boolean_decision(sigterm.noted, all=False):
            _signals(trainer).received_sigterm = True


class WarnAtChance(Callback):
    """Warns before a fit if the frozen model's answers are no better than guessing."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the cached validation rows, without computing states."""
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        dataset = data.states("validation") if trainer.is_global_zero else None
        if not isinstance(dataset, StateDataset):  # online: rows are computed on demand
            return
        found = cached_accuracy(dataset, data.unembed)
        if found is not None and found.at_chance:
            log.warning(
                "On validation %s.\nThe heads can only reproduce its answers: try another prompt "
                "first (lspade-train check --config RECIPE).", found.verdict,
            )  # fmt: skip


def _signals(trainer: Trainer) -> Any:
    return trainer._signal_connector  # pyright: ignore[reportPrivateUsage]


@contextmanager
def early_end_named(trainer: Trainer, advice: str) -> Generator[None]:
    """Turn each way in which a loop may end early into a named exception.

    Args:
        trainer: runs the loop.
        advice: what to do if another process was lost.

    Raises:
        Terminated: SIGTERM.
        KeyboardInterrupt: Ctrl-C.
        StoppedError: another process was lost.
    """
    # The first trainer of a command starts the processes, later ones reuse them.
    sigterm.launcher = sigterm.launcher or trainer.strategy.launcher
    try:
        with lost_peers_named(advice):
            yield
    except SystemExit as stop:  # Lightning raises it for both signals
        by_signal = isinstance(stop, SIGTERMException) or isinstance(stop.__context__, Terminated)
        raise (Terminated if by_signal else KeyboardInterrupt) from stop
    finally:
        sigterm.deferred = False


def open_modules(parsed: Parsed, heads: Any = None, **options: Any) -> tuple[Any, Any]:
    """The recipe's Lightning module (around `heads`, or new ones) and data module, seeded."""
    from lightning.pytorch import seed_everything

    from lspade_train.training.datamodule import HiddenStateDataModule
    from lspade_train.training.module import LSpadeModule

    recipe = parsed.recipe
    seed_everything(recipe.seed_everything, verbose=False)
    data = HiddenStateDataModule(
        recipe.data,
        list(heads.layers) if heads is not None else recipe.model.layers,
        seed=recipe.seed_everything,
        name=recipe.name,
        spade=recipe.model.target != "final",
        choices=recipe.model.scope == "choices",
    )
    return LSpadeModule(recipe.model, heads, **options), data


def open_loggers(parsed: Parsed, folder: Path) -> Any:
    """The recipe's loggers, or the default ones, which write to `folder`."""
    from lspade_train.io.tracking import keep_wandb_from_asking
    from lspade_train.training.loggers import default_loggers

    logger = parsed.trainer.get("logger")
    if logger is None or logger is True:
        return default_loggers(folder, parsed.recipe.name)
    if logger is not False:
        keep_wandb_from_asking()
    return logger


def open_trainer(parsed: Parsed, loggers: Any, callbacks: list[Any]) -> Any:
    """Lightning's Trainer with the recipe's arguments over our defaults."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ProgressBar

    from lspade_train.training.callbacks import LOG_EVERY, AtomicCheckpoints, LogEachEpoch
    from lspade_train.training.fit_progress import FitProgress

    arguments = parsed.trainer | {"logger": loggers}
    # Copies: each group of layers has its own trainer, and callbacks have state.
    given = deepcopy(arguments.pop("callbacks", None) or [])
    given = given if isinstance(given, list) else [given]
    defaults: dict[str, Any] = {
        "log_every_n_steps": LOG_EVERY,
        "enable_model_summary": False,
        # Validation is our own code; over the vocabulary two batches can cost as much as an epoch.
        "num_sanity_val_steps": 0,
    }
    ours: list[Callback] = [StopTogether()]
    if "log_every_n_steps" not in arguments:
        ours.append(LogEachEpoch())
    if arguments.get("enable_progress_bar", True) and not any(
        isinstance(callback, ProgressBar) for callback in given
    ):
        ours.append(FitProgress())
    plugins: list[Any] = []
    if str(arguments.get("strategy", "auto")).startswith(("auto", "ddp")):
        plugins.append(AtomicCheckpoints())  # other strategies write shards themselves
    if SLURMEnvironment.detect():
        # Lightning's requeueing may interrupt a step, and another recipe might resume from there.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    defaults["plugins"] = plugins
    return Trainer(**defaults | arguments, callbacks=[*given, *callbacks, *ours])
