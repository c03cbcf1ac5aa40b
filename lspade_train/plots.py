"""Figures from results, by matplotlib. Knows nothing of models or caches."""

from pathlib import Path
from typing import Any

# Okabe-Ito colours with distinct markers and dashes: readable in grey and by the colour-blind.
STYLES: dict[str, dict[str, Any]] = {
    "logit_lens": {"label": "logit lens", "color": "#999999", "marker": "s", "ls": ":"},
    "tuned_lens": {"label": "tuned lens", "color": "#E69F00", "marker": "^", "ls": "-."},
    "l_spade": {"label": "L-SPADE", "color": "#0072B2", "marker": "o", "ls": "-"},
    "spade": {"label": "SPADE", "color": "#D55E00", "marker": "D", "ls": "--"},
}


def accuracy_by_layer(results: dict[str, Any], folder: Path) -> Path:
    """Accuracy (or, without labels, agreement with the model) of every lens by layer.

    Args:
        results: as `evaluation.summarise` gives them, with task and split.
        folder: receives `accuracy_by_layer.png` and `.svg`.

    Returns:
        The PNG.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    labelled = results["n_labelled"] > 0
    metric = "accuracy" if labelled else "agrees_model"
    n = results["n_labelled"] if labelled else results["n"]
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, lens in results["lenses"].items():
        axes.plot(results["layers"], lens[metric], **STYLES[name], ms=5, lw=1.6)
    full = results["full_model"]["accuracy"] if labelled else 1.0
    axes.axhline(full, color="black", lw=1, label="full model")
    axes.set_xlabel("layer (block the answer is read after)")
    axes.set_ylabel("accuracy" if labelled else "agreement with the full model")
    axes.set_xticks(results["layers"])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.set_title(f"{results['task']}, {results['split']} split, n = {n:,}", fontsize=10)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{'accuracy' if labelled else 'agreement'}_by_layer.png"
    figure.savefig(path, dpi=160)
    figure.savefig(path.with_suffix(".svg"))
    plt.close(figure)
    return path


def write_figures(results: dict[str, Any], folder: Path) -> list[Path]:
    """Every figure of one evaluation."""
    return [accuracy_by_layer(results, folder)]


def compare_accuracy(results: list[dict[str, Any]], path: Path) -> Path:
    """L-SPADE's accuracy (agreement, without labels) over relative depth, a line per result.

    Args:
        results: `results.json` of each, with a `label`.
        path: the PNG.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    metric = "accuracy" if all(one["n_labelled"] for one in results) else "agrees_model"
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for one in results:
        depth = [layer / one["num_layers"] for layer in one["layers"]]
        axes.plot(depth, one["lenses"]["l_spade"][metric], marker="o", label=one["label"])
    axes.set_xlabel("depth (fraction of the blocks)")
    axes.set_ylabel(f"L-SPADE: {metric}")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)
    return path
