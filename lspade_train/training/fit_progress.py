"""Progress of Lightning's loops, shown like all other long-running work."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from lspade_train.io.progress import Progress


class FitProgress(ProgressBar):
    """One bar for all epochs of a fit, or for one pass of `validate` or `test`."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._work: Progress | None = None

    def disable(self) -> None:
        """Show nothing, as on all ranks but 0."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress from now on."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start at the step that a resumed fit has reached."""
        work = self._open("fit", int(trainer.estimated_stepping_batches), "steps")
        work.skip(trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the optimiser's steps."""
        work = self._work
        if work is not None and trainer.global_step > work.done:
            epochs = f" of {trainer.max_epochs}" if (trainer.max_epochs or 0) > 0 else ""

            def note() -> str:  # reading a loss synchronises the device: only when it is shown
                loss = trainer.progress_bar_metrics.get("loss")
                told = "" if loss is None else f", loss {loss:.3f}"
                return f"epoch {trainer.current_epoch + 1}{epochs}{told}"

            work.advance(trainer.global_step - work.done, note)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a bar for `validate`."""
        self._open_pass(trainer, TrainerFn.VALIDATING, "validation", trainer.num_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a bar for `test`."""
        self._open_pass(trainer, TrainerFn.TESTING, "test", trainer.num_test_batches)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Count the batches, or note in a fit's bar that it is validating."""
        self._count(trainer)

    def on_test_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Count the batches."""
        self._count(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the bar."""
        self._close()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the bar of `validate`."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._close()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the bar."""
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove the bar before an error is printed."""
        self._close()

    def _open(self, name: str, total: int, unit: str) -> Progress:
        self._close()
        self._work = Progress(name if self._enabled else None, total, unit).__enter__()
        return self._work

    def _open_pass(self, trainer: Trainer, fn: TrainerFn, name: str, batches: list[Any]) -> None:
        if trainer.state.fn == fn:
            self._open(name, int(sum(batches)), "batches")

    def _count(self, trainer: Trainer) -> None:
        if self._work is None:  # the sanity check before a fit
            return
        if trainer.state.fn == TrainerFn.FITTING:
            self._work.show(lambda: "validating")
        else:
            self._work.advance()

    def _close(self) -> None:
        if self._work is not None:
            self._work.__exit__()
            self._work = None
