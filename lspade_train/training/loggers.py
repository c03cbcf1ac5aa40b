"""Loggers that work without a key and without a network: CSV always, W&B where it is on."""

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger

from lspade_train.io.tracking import SECONDS_TO_CONNECT, say_offline, wandb_is_on


def default_loggers(folder: Path, name: str) -> list[Logger]:
    """CSV always; W&B too where it is installed and has a key, a login or WANDB_MODE."""
    loggers: list[Logger] = [CSVLogger(folder, name="logs")]
    if wandb_is_on():
        loggers.append(_wandb_logger(folder, name))
    return loggers


def _wandb_logger(folder: Path, name: str) -> Logger:
    """A W&B logger that writes offline where the service cannot be reached, or refuses the key."""
    import wandb
    from lightning.pytorch import loggers
    from wandb.errors import Error

    class WandbLogger(loggers.WandbLogger):
        @property
        def experiment(self) -> Any:
            try:
                return super().experiment
            except Error as error:
                say_offline(error)
                self._wandb_init["mode"] = "offline"
                return super().experiment

    settings = wandb.Settings(init_timeout=SECONDS_TO_CONNECT)
    return WandbLogger(project="lspade-train", name=name, save_dir=folder, settings=settings)
