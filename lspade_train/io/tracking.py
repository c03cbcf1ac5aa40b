"""Weights & Biases without questions: whether it is on, and runs that start without a network.

Never prompts for a key. Knows nothing of what is logged; loads wandb at the first run only.
"""

import importlib.util
import logging
import netrc
import os
from typing import Any

SECONDS_TO_CONNECT = 20

log = logging.getLogger(__name__)


def start_run(**settings: Any) -> Any:
    """A W&B run of its own, offline where the service cannot be reached or refuses the key."""
    import wandb
    from wandb.errors import Error

    try:
        return wandb.init(settings=wandb.Settings(init_timeout=SECONDS_TO_CONNECT), **settings)
    except Error as error:
        say_offline(error)
        return wandb.init(mode="offline", **settings)


def say_offline(error: Exception) -> None:
    """Log why a run is written offline."""
    first, *_ = str(error).splitlines() or [type(error).__name__]
    log.warning("W&B: %.120s; writing offline, send it with `wandb sync`.", first)


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
