"""The figure of a profile."""

from pathlib import Path
from typing import TYPE_CHECKING

from lspade_train.io.storage import atomic_path
from lspade_train.policies.exit_table import Threshold

if TYPE_CHECKING:
    from lspade_train.profiling.forward import Profile

# Okabe-Ito colours; markers differ, too.
LINES = [("#0072B2", "o"), ("#D55E00", "D"), ("#009E73", "s"), ("#E69F00", "^"), ("#CC79A7", "v")]


def threshold_name(threshold: Threshold | None) -> str:
    """The name of a threshold in tables and figures."""
    if threshold is None:
        return "never exit"
    return f"{threshold:.3g}" if isinstance(threshold, float | int) else "per layer"


def draw(found: "Profile", folder: Path) -> None:
    """Speed-up by prompt length, one panel per batch size, one line per threshold."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    sizes = sorted({row.rows for row in found.results})
    thresholds = list(dict.fromkeys(row.threshold for row in found.results))
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(1 + 3.2 * len(sizes), 3.6), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel, rows in zip(panels[0], sizes, strict=True):
        for place, threshold in enumerate(thresholds):
            line = [r for r in found.results if r.rows == rows and r.threshold == threshold]
            color, marker = LINES[place % len(LINES)]
            panel.plot(
                [row.tokens for row in line], [row.speedup for row in line],
                color=color, marker=marker, label=threshold_name(threshold),
            )  # fmt: skip
        panel.axhline(1, color="black", lw=1)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("prompt tokens")
        panel.set_title(f"batch of {rows}", fontsize=10)
        panel.grid(alpha=0.25)
    panels[0][0].set_ylabel("speed-up over the original model's forward")
    panels[0][-1].legend(frameon=False, title="threshold")
    figure.suptitle(f"{found.device}, {found.dtype}, {found.prompts} prompts", fontsize=10)
    for suffix in ("png", "svg"):
        with atomic_path(folder / f"speedup.{suffix}") as path:
            figure.savefig(path, format=suffix, dpi=160)
    plt.close(figure)
