"""Loggers that work without a key and without a network: CSV always, W&B where it is on."""

import importlib.util
import logging
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

SECONDS_TO_CONNECT = 20
LAYER = "/layer_"
"""In the names of the metrics of one layer."""
CHARTS = {"KL (nats)": {"kl"}, "agreement and accuracy": {"agreement", "accuracy"}}
"""Charts of a validation on W&B, and the metrics in them."""

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
        return wandb.init(settings=_wandb_settings(), **settings)
    except Error as error:
        _say_offline(error)
        return wandb.init(mode="offline", settings=_wandb_settings(offline=True), **settings)


def _wandb_settings(*, offline: bool = False) -> Any:
    """Quiet: online it names the run's page, offline we say ourselves how to send it."""
    import wandb

    offline = offline or os.environ.get("WANDB_MODE") in {"offline", "dryrun"}
    return wandb.Settings(init_timeout=SECONDS_TO_CONNECT, quiet=True, silent=offline)


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
            self._wandb_init.pop("anonymous", None)  # which W&B warns of, whatever it is
            folder.mkdir(parents=True, exist_ok=True)  # without it, too
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

    found: dict[str, Any] = {}
    for title, of_chart in CHARTS.items():
        lines: dict[str, dict[int, float]] = {}
        for name, value in metrics.items():
            stage, *target, metric, layer = name.split("/")[-4:] if LAYER in name else [""] * 3
            if stage == "val" and metric in of_chart:
                label = " ".join([metric, *target])
                lines.setdefault(label, {})[int(layer.removeprefix("layer_"))] = value
        if lines:
            layers = sorted(next(iter(lines.values())))
            values = [[line[layer] for layer in layers] for line in lines.values()]
            found[f"val/{title} by layer"] = wandb.plot.line_series(
                layers, values, keys=list(lines), title=f"{title} by layer", xname="layer"
            )
    return found


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
