"""Loggers that work without a key or network: CSV always, W&B if it is enabled."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger, Logger

from lspade_train.io.tracking import quiet_settings, say_offline, say_where, wandb_is_on

LAYER = "/layer_"
"""Separator in the names of per-layer metrics."""
OF_LAYER = re.compile(f"val/.+{LAYER}[0-9]+")
"""Names of a validation's per-layer metrics."""
CHARTS = {"KL (nats)": {"kl"}, "agreement and accuracy": {"agreement", "accuracy"}}
"""Charts of a validation on W&B, and the metrics in them."""


def default_loggers(folder: Path, name: str) -> list[Logger]:
    """CSV always; W&B too if it is installed and has a key, a login or WANDB_MODE."""
    loggers: list[Logger] = [CSVLogger(folder, name="logs")]
    if wandb_is_on():
        loggers.append(_wandb_logger(folder, name))
    return loggers


def _wandb_logger(folder: Path, name: str) -> Logger:
    """A W&B logger that writes offline if the service cannot be reached or refuses the key.

    Per-layer metrics would each get their own panel: instead, a validation's values by layer are
    one chart per epoch, and the means are curves. The CSV has every number.
    """
    from lightning.pytorch import loggers
    from wandb.errors import Error

    class WandbLogger(loggers.WandbLogger):
        @property
        def experiment(self) -> Any:
            if self._experiment is None:  # W&B warns about this key, and about a missing folder
                self._wandb_init.pop("anonymous", None)
                folder.mkdir(parents=True, exist_ok=True)
                say_where(folder)
            try:
                return super().experiment
            except Error as error:
                say_offline(error)
                self._wandb_init |= {"mode": "offline", "settings": quiet_settings(offline=True)}
                return super().experiment

        @rank_zero_only
        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            means = {name: value for name, value in metrics.items() if LAYER not in name}
            super().log_metrics(means | _charts(metrics), step)  # type: ignore[arg-type]

    settings = quiet_settings()
    return WandbLogger(project="lspade-train", name=name, save_dir=folder, settings=settings)


def _charts(metrics: Mapping[str, float]) -> dict[str, Any]:
    """A validation's metrics by layer, as one chart for each of `CHARTS`."""
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
