"""How Lightning's loops end early: by a signal, or since another process of the run was lost."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lspade_train.cli.signals import Terminated, sigterm
from lspade_train.parallel import lost_peers_named


class StopTogether(Callback):
    """On SIGTERM, all processes of a fit finish the step in hand and leave it together."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take Lightning's own handler out.

        It calls a collective wherever the signal finds a process, while the others are inside
        another one, and then stops each process after a step of its own.
        """
        _signals(trainer)._sigterm_notifier_fn = lambda *_: None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on a step may not be cut in half."""
        sigterm.deferred = True

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Agree on whether this step was the last."""
        if trainer.strategy.reduce_boolean_decision(sigterm.noted, all=False):
            _signals(trainer).received_sigterm = True


def _signals(trainer: Trainer) -> Any:
    return trainer._signal_connector  # pyright: ignore[reportPrivateUsage]


@contextmanager
def early_end_named(trainer: Trainer, advice: str) -> Generator[None]:
    """Give the ways in which a loop may end early their names.

    Args:
        trainer: runs the loop.
        advice: what to do where another process was lost.

    Raises:
        Terminated: SIGTERM.
        KeyboardInterrupt: Ctrl-C.
        StoppedError: another process was lost.
    """
    # The first trainer of a command starts the processes, the next ones find them.
    sigterm.launcher = sigterm.launcher or trainer.strategy.launcher
    try:
        with lost_peers_named(advice):
            yield
    except SystemExit as stop:  # Lightning's own way out of both
        by_signal = isinstance(stop, SIGTERMException) or isinstance(stop.__context__, Terminated)
        raise (Terminated if by_signal else KeyboardInterrupt) from stop
    finally:
        sigterm.deferred = False
