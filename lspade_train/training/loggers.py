"""Loggers that work without a key and without a network: CSV always, W&B where it is on."""

import importlib.util
import logging
import netrc
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

SECONDS_TO_CONNECT = 20
LAYER = "/layer_"
"""In the names of the metrics of one layer."""
OF_LAYER = re.compile(f"val/.+{LAYER}[0-9]+")
"""Those of a validation."""
CHARTS = {"KL (nats)": {"kl"}, "agreement and accuracy": {"agreement", "accuracy"}}
"""Charts of a validation on W&B, and the metrics in them."""

log = logging.getLogger(__name__)


def default_loggers(folder: Path, name: str) -> list[Logger]:
    """CSV always; W&B too where it is installed and has a key, a login or WANDB_MODE."""
    loggers: list[Logger] = [CSVLogger(folder, name="logs")]
    if wandb_is_on():
        loggers.append(_wandb_logger(folder, name))
    return loggers


def start_run(folder: Path, **given: Any) -> Any:
    """A W&B run of its own, offline where the service cannot be reached or refuses the key.

    Args:
        folder: its files go to `wandb/` there.
        given: to `wandb.init`.
    """
    import wandb
    from wandb.errors import Error

    _say_where(folder)
    try:
        return wandb.init(dir=folder, settings=_wandb_settings(), **given)
    except Error as error:
        _say_offline(error)
        settings = _wandb_settings(offline=True)
        return wandb.init(dir=folder, mode="offline", settings=settings, **given)


def _wandb_settings(*, offline: bool = False) -> Any:
    """Quiet: online it names the run's page, offline we say ourselves how to send it."""
    import wandb

    return wandb.Settings(
        init_timeout=SECONDS_TO_CONNECT, quiet=True, silent=offline or _is_offline()
    )


def _is_offline() -> bool:
    return os.environ.get("WANDB_MODE") in {"offline", "dryrun"}


def _say_where(folder: Path) -> None:
    """Where an offline run is: W&B itself would take ten lines."""
    if _is_offline():
        log.info("W&B: writing offline to %s; send it with `wandb sync`", folder / "wandb")


def _say_offline(error: Exception) -> None:
    first, *_ = str(error).splitlines() or [type(error).__name__]
    log.warning("W&B: %.120s; writing offline, send it with `wandb sync`.", first)


def _wandb_logger(folder: Path, name: str) -> Logger:
    """A W&B logger that writes offline where the service cannot be reached, or refuses the key.

    Layers are not metrics of their own there, which would be a panel each: what a validation says
    of every layer is one chart per epoch, and the means are curves. The CSV has every number.
    """
    from lightning.pytorch import loggers
    from wandb.errors import Error

    class WandbLogger(loggers.WandbLogger):
        @property
        def experiment(self) -> Any:
            if self._experiment is None:  # W&B warns of this key, and of a folder that is not there
                self._wandb_init.pop("anonymous", None)
                folder.mkdir(parents=True, exist_ok=True)
                _say_where(folder)
            try:
                return super().experiment
            except Error as error:
                _say_offline(error)
                self._wandb_init |= {"mode": "offline", "settings": _wandb_settings(offline=True)}
                return super().experiment

        @rank_zero_only
        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            means = {name: value for name, value in metrics.items() if LAYER not in name}
            super().log_metrics(means | _charts(metrics), step)  # type: ignore[arg-type]

    settings = _wandb_settings()
    return WandbLogger(project="lspade-train", name=name, save_dir=folder, settings=settings)


def _charts(metrics: Mapping[str, float]) -> dict[str, Any]:
    """What a validation says of every layer, as one chart for each of `CHARTS`."""
    import wandb

    lines: dict[str, dict[str, dict[int, float]]] = {}  # chart -> metric, target -> layer -> value
    for name in filter(OF_LAYER.fullmatch, metrics):
        _, *kind, layer = name.split("/")
        for title, of_chart in CHARTS.items():
            if kind[-1] in of_chart:
                line = lines.setdefault(title, {}).setdefault(" ".join(reversed(kind)), {})
                line[int(layer.removeprefix("layer_"))] = metrics[name]
    return {
        f"val/{title} by layer": wandb.plot.line_series(
            sorted(next(iter(found.values()))),
            [[line[layer] for layer in sorted(line)] for line in found.values()],
            keys=list(found),
            title=f"{title} by layer",
            xname="layer",
        )
        for title, found in lines.items()
    }


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
