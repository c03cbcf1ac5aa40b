"""Weights & Biases without prompts: whether it is enabled, and runs that start without a network.

Never prompts for a key. Independent of what is logged; imports wandb only at the first run.
"""

import importlib.util
import logging
import netrc
import os
from pathlib import Path
from typing import Any

from lspade_train.io.storage import first_line

SECONDS_TO_CONNECT = 20

log = logging.getLogger(__name__)


def start_run(**given: Any) -> Any:
    """Start a W&B run, offline if the service cannot be reached or refuses the key.

    Args:
        given: arguments of `wandb.init`, including `dir`.
    """
    import wandb
    from wandb.errors import Error

    say_where(given["dir"])
    try:
        return wandb.init(settings=quiet_settings(), **given)
    except Error as error:
        say_offline(error)
        return wandb.init(mode="offline", settings=quiet_settings(offline=True), **given)


def quiet_settings(*, offline: bool = False) -> Any:
    """W&B's settings: online it prints the run's page, offline we print how to upload it."""
    import wandb

    return wandb.Settings(
        init_timeout=SECONDS_TO_CONNECT, quiet=True, silent=offline or _is_offline()
    )


def say_where(folder: Path) -> None:
    """Log where an offline run is stored: W&B itself would print ten lines."""
    if _is_offline():
        log.info("W&B: writing offline to %s; send it with `wandb sync`", folder / "wandb")


def say_offline(error: Exception) -> None:
    """Log why a run is written offline."""
    log.warning("W&B: %.120s; writing offline, send it with `wandb sync`.", first_line(error))


def keep_wandb_from_asking() -> None:
    """Make W&B loggers write offline instead of prompting if there is no key or WANDB_MODE."""
    if not os.environ.get("WANDB_MODE") and not _has_wandb_key():
        os.environ["WANDB_MODE"] = "offline"
        log.warning("W&B: no key found, writing offline; send it later with `wandb sync`.")


def wandb_is_on() -> bool:
    """Whether W&B is installed and has a key, a login or WANDB_MODE; never prompts."""
    mode = os.environ.get("WANDB_MODE")
    wanted = mode != "disabled" and (bool(mode) or _has_wandb_key())
    return wanted and importlib.util.find_spec("wandb") is not None


def _is_offline() -> bool:
    return os.environ.get("WANDB_MODE") in {"offline", "dryrun"}


def _has_wandb_key() -> bool:
    """Whether there is a key in the environment or a login by `wandb login`; never prompts."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, RuntimeError, netrc.NetrcParseError):  # no file, or no home
        return False
