"""Iso-compute accuracy: every lens at equal total FLOPs. Independent of wall time and files."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lspade_train.cache import StateDataset
from lspade_train.models import ModelAdapter
from lspade_train.policies.flops import FlopCounts, count_flops, exit_flops
from lspade_train.policies.policy import ExitPolicy
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.lenses import find_lens

BUDGETS = tuple(round(0.05 * step, 2) for step in range(1, 21))


def iso_compute(
    results: dict[str, Any],
    dataset: StateDataset,
    adapter: ModelAdapter,
    heads: Mapping[str, LSpadeHeads | None],
) -> dict[str, Any]:
    """Accuracy of every lens against its total FLOPs, as JSON.

    The cost of a lens at layer l includes the prompt's blocks up to l, its map, the final norm and
    the unembedding of one row over the vocabulary; for SPADE also the two-token continuation
    through the blocks above (the start token's half is a constant of the model). SPADE-EXIT, read
    from the threshold grid, includes every check on the way. A lens that no exit policy can decode
    with is left out, as its cost is not known.

    Args:
        results: has `layers`, `lenses`, `full_model` and, for SPADE-EXIT, `exits`.
        dataset: provides the prompts' lengths.
        adapter: the frozen model.
        heads: bound heads by the key of their lens; None for a lens without heads.

    Source: arXiv:2507.17618v2, accuracy at equal compute.
    """
    metric = "accuracy" if results["n_labelled"] else "answer_agrees_model"
    lengths = dataset.labels["position_id"] + 1
    without_heads = count_flops(adapter)
    full = without_heads.full(lengths)
    lenses: dict[str, Any] = {}
    for key, values in results["lenses"].items():
        decoder = find_lens(key).decoder
        if decoder is None:
            continue
        own = heads[key]
        counts = without_heads if own is None else count_flops(adapter, own)
        flops = _fixed_layers(counts, lengths, results["layers"], decoder).sum(0)
        fractions: list[float] = (flops / full.sum()).tolist()
        lenses[key] = {"flops": fractions, "accuracy": values[metric]}
    points = {
        name: list(zip(lens["flops"], lens["accuracy"], strict=True))
        for name, lens in lenses.items()
    }
    if results.get("exits"):
        points["spade_exit"] = [
            (1 - row["compute_saved"], _value(row, metric)) for row in results["exits"]["grid"]
        ]
    return {
        "metric": metric,
        "full_flops": float(full.mean()),
        "lenses": lenses,
        "budgets": list(BUDGETS),
        "at_budget": {name: _at_budgets(found) for name, found in points.items()},
    }


def _fixed_layers(
    counts: FlopCounts, lengths: Tensor, layers: Sequence[int], decoder: Any
) -> Tensor:
    policy = ExitPolicy(layers=tuple(layers), decoder=decoder)
    return exit_flops(counts, lengths, layers, policy, checks=())


def _value(row: dict[str, Any], metric: str) -> float | None:
    return row["accuracy"] if metric == "accuracy" else 1 - row["disagreement"]


def _at_budgets(points: Sequence[tuple[float, float | None]]) -> list[float | None]:
    """Value of the most expensive point within each budget, without selection on these rows."""
    found: list[float | None] = []
    for budget in BUDGETS:
        within = [point for point in points if point[0] <= budget]
        found.append(max(within, key=lambda point: point[0])[1] if within else None)
    return found
