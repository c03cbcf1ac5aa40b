"""Loggers that work without a key and without a network: CSV always, W&B where it is on."""

import importlib.util
import logging
import netrc
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger

SECONDS_TO_CONNECT = 20

log = logging.getLogger(__name__)


def default_loggers(folder: Path, name: str) -> list[Logger]:
    """CSV always; W&B too where it is installed and has a key, a login or WANDB_MODE."""
    loggers: list[Logger] = [CSVLogger(folder, name="logs")]
    if wandb_is_on():
        loggers.append(_wandb_logger(folder, name))
    return loggers


def start_run(**settings: Any) -> Any:
    """A W&B run of its own, offline where the service cannot be reached or refuses the key."""
    import wandb
    from wandb.errors import Error

    try:
        return wandb.init(settings=wandb.Settings(init_timeout=SECONDS_TO_CONNECT), **settings)
    except Error as error:
        _say_offline(error)
        return wandb.init(mode="offline", **settings)


def _say_offline(error: Exception) -> None:
    first, *_ = str(error).splitlines() or [type(error).__name__]
    log.warning("W&B: %.120s; writing offline, send it with `wandb sync`.", first)


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
                _say_offline(error)
                self._wandb_init["mode"] = "offline"
                return super().experiment

    settings = wandb.Settings(init_timeout=SECONDS_TO_CONNECT)
    return WandbLogger(project="lspade-train", name=name, save_dir=folder, settings=settings)


def keep_wandb_from_asking() -> None:
    """Without a key and without WANDB_MODE, a W&B logger writes offline instead of asking."""
    if not os.environ.get("WANDB_MODE") and not _has_wandb_key():
        os.environ["WANDB_MODE"] = "offline"
        log.warning("W&B: no key found, writing offline; send it later with `wandb sync`.")


def wandb_is_on() -> bool:
    """Whether W&B is installed and has a key, a login or WANDB_MODE; never prompts."""
    mode = os.environ.get("WANDB_MODE")
    wanted = mode != "disabled" and (bool(mode) or _has_wandb_key())
    return wanted and importlib.util.find_spec("wandb") is not None


def _has_wandb_key() -> bool:
    """Whether there is a key in the environment or a login by `wandb login`; never prompts."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, RuntimeError, netrc.NetrcParseError):  # no file, or no home
        return False
