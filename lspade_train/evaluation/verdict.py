"""Whether a policy kept its guarantee on the measured rows, and whether a fixed exit is as good.

Computed from `results.json` alone, without heavy imports.
"""

from typing import Any

NEAR = 0.01
"""How far below the full model's an accuracy still counts as near it: one percentage point."""
ROUNDING = 1e-9
"""Tolerance for a difference of two means: a loss of 1 - 0.99 is within a budget of 0.01."""


def judge(results: dict[str, Any]) -> dict[str, Any] | None:
    """The verdict on the measured policy, as JSON; None if no policy was measured.

    Args:
        results: has `exits`, `lenses`, `full_model` and `iso_compute`.

    Returns:
        `risk` (`accuracy_drop` or `disagreement`) of the policy's guarantee, or, without one, the
        risk that these rows can measure; `budget` and `confidence` of the guarantee or None;
        `measured`, the risk on these rows, with `measured_interval` (None if the risk needs labels
        and there are none); `held`, whether it is within the budget, None if these rows cannot
        show it; `fixed`, the fixed exit that saves most within the same risk on these rows, chosen
        in hindsight, or None; `fixed_as_good`, whether that saves as much as the policy.
    """
    policy = (results["exits"] or {}).get("policy") or {}
    row = policy.get("row")
    if row is None:
        return None
    promised = policy.get("promise") or {}
    labelled = row["drop"] is not None
    risk: str = promised.get("risk") or ("accuracy_drop" if labelled else "disagreement")
    column = "drop" if risk == "accuracy_drop" else "disagreement"
    measured, budget = row[column], promised.get("budget")
    held = None
    if measured is not None and budget is not None and not policy["chosen_on_these_rows"]:
        held = measured <= budget + ROUNDING
    fixed = None
    if measured is not None:
        fixed = _best_fixed(results, risk, measured if budget is None else max(budget, measured))
    return {
        "risk": risk,
        "budget": budget,
        "confidence": promised.get("confidence"),
        "measured": measured,
        "measured_interval": row[f"{column}_interval"],
        "held": held,
        "fixed": fixed,
        "fixed_as_good": None
        if fixed is None
        else fixed["saved"] >= row["compute_saved"] - ROUNDING,
    }


def near_from(results: dict[str, Any], lens: str) -> int | None:
    """The first layer from which on a lens stays within a point of the full model's accuracy."""
    full, accuracy = results["full_model"]["accuracy"], results["lenses"][lens]["accuracy"]
    if full is None or accuracy is None:
        return None
    first = None
    for layer, value in zip(results["layers"], accuracy, strict=True):
        near = value >= full - NEAR - ROUNDING
        first = (layer if first is None else first) if near else None
    return first


def _best_fixed(results: dict[str, Any], risk: str, allowed: float) -> dict[str, Any] | None:
    """The fixed exit (one layer and lens for all rows) that saves most within the risk."""
    found: list[dict[str, Any]] = []
    for lens, costs in results["iso_compute"]["lenses"].items():
        values = results["lenses"][lens]
        if risk == "accuracy_drop":
            full = results["full_model"]["accuracy"]
            risks = [full - value for value in values["accuracy"]]
        else:
            risks = [1 - value for value in values["answer_agrees_model"]]
        found += [
            {"lens": lens, "layer": layer, "saved": 1 - flops, "measured": value}
            for layer, flops, value in zip(results["layers"], costs["flops"], risks, strict=True)
            if value <= allowed + ROUNDING and flops < 1
        ]
    return max(found, key=lambda one: one["saved"], default=None)
