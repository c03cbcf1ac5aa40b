"""The findings of an evaluation in sentences, for the terminal, the report and the card.

Based on `results.json` alone.
"""

from typing import Any

from lspade_train.evaluation.verdict import near_from
from lspade_train.probes.lenses import SPADE, label_of
from lspade_train.reporting.rows import rows_measured
from lspade_train.reporting.tables import exit_lens


def verdict(results: dict[str, Any]) -> list[str]:
    """What the policy saves, whether its guarantee held, whether a fixed layer does as well."""
    found = results.get("verdict")
    policy = (results["exits"] or {}).get("policy") or {}
    if not found or not policy.get("row"):
        return [_no_policy(results, policy), *_near(results), *_at_chance(results)]
    exits = policy["row"]["mean_exit_layer"] < results["num_layers"]
    held = _held(found) if exits else []
    first = _saves(results, policy["row"], found, exits=exits)
    return [first, *held, *_fixed(found), *_at_chance(results)]


def chance_accuracy(full: dict[str, Any]) -> float | None:
    """Accuracy of guessing or of the most frequent answer, without a model; None if unknown."""
    known = [full[name] for name in ("chance", "majority") if full.get(name) is not None]
    return max(known, default=None)


def _saves(
    results: dict[str, Any], row: dict[str, Any], found: dict[str, Any], *, exits: bool
) -> str:
    rows = f"{results['n']:,} rows ({rows_measured(results)})"
    if not exits:
        return f"The policy saves nothing: it never exits on these {rows}."
    time = ""
    if row.get("time_saved") is not None:
        time = f"{row['time_saved']:.1%} of the time (predicted for {row['timed_as']}) and "
    words = (
        f"The policy saves {time}{row['compute_saved']:.1%} of the FLOPs (mean exit at layer "
        f"{row['mean_exit_layer']:.2f} of {results['num_layers']}) on {rows}"
    )
    if found["measured"] is None:
        found = found | {"risk": "disagreement", "measured": row["disagreement"],
                         "measured_interval": row["disagreement_interval"]}  # fmt: skip
    return f"{words}; {_risk(found['risk'], found['measured'])}{_interval(found)}."


def _held(found: dict[str, Any]) -> list[str]:
    if found["budget"] is None:
        return ["No guarantee: this policy has not been calibrated. Run lspade-train calibrate."]
    promised = (
        f"{_points(found['budget'])} of accuracy"
        if found["risk"] == "accuracy_drop"
        else f"{found['budget']:.2%} changed answers"
    )
    promised = f"at most {promised}, with {found['confidence']:.0%} confidence"
    if found["measured"] is None:
        return [
            f"Guarantee: {promised}. It cannot be verified here because not every row has a label."
        ]
    if found["held"] is None:
        return [
            f"Guarantee: {promised}. It cannot be verified here because the policy was selected "
            "on the same rows."
        ]
    if found["held"]:
        return [f"The guarantee held on these rows: {promised}."]
    low = (found["measured_interval"] or [0])[0]
    chance = ", though the interval includes it" if low <= found["budget"] else ""
    return [f"The guarantee did NOT hold on these rows: {promised}{chance}."]


def _fixed(found: dict[str, Any]) -> list[str]:
    fixed = found["fixed"]
    if found["measured"] is None:
        return []
    within = "that risk" if found["budget"] is None else "that budget"
    if fixed is None:
        return [f"No fixed layer stays within {within} on these rows."]
    best = f"layer {fixed['layer']} with {label_of(fixed['lens'])} (chosen in hindsight)"
    what = f"saves {fixed['saved']:.1%}; {_risk(found['risk'], fixed['measured'])}"
    if found["fixed_as_good"]:
        return [f"A fixed exit layer does as well here: {best} {what}."]
    return [f"The policy beats every fixed exit layer within {within}: the best, {best}, {what}."]


def _no_policy(results: dict[str, Any], policy: dict[str, Any]) -> str:
    if policy.get("note"):
        return f"The policy was not measured: {policy['note']}"
    return (
        f"No exit policy was measured on these {results['n']:,} rows "
        f"({rows_measured(results)}): choose one with lspade-train calibrate."
    )


def _near(results: dict[str, Any]) -> list[str]:
    """The layers from which on the heads and SPADE are near the full model."""
    keys = [key for key in (exit_lens(results), SPADE.key) if key in results["lenses"]]
    found = {label_of(key): near_from(results, key) for key in keys}
    parts = [f"{label} from layer {layer} on" for label, layer in found.items() if layer]
    if not parts:
        return []
    return [f"Within a point of the full model's accuracy: {', '.join(parts)}."]


def _at_chance(results: dict[str, Any]) -> list[str]:
    full = results["full_model"]
    chance = chance_accuracy(full)
    if full["accuracy"] is None or chance is None or full["accuracy_interval"][0] > chance:
        return []
    return [
        "The full model itself is not shown to be better than chance "
        f"({full['accuracy']:.1%} against {chance:.1%}): savings are not meaningful if the model "
        "is guessing."
    ]


def _risk(risk: str, value: float) -> str:
    if risk == "disagreement":
        return f"{value:.2%} of the answers are not the full model's"
    if value < 0:
        return f"its accuracy is {_points(-value)} above the full model's"
    return f"it loses {_points(value)} of accuracy"


def _points(share: float) -> str:
    return f"{share * 100:.2f} points"


def _interval(found: dict[str, Any]) -> str:
    if not found["measured_interval"]:
        return ""
    low, high = (value * 100 for value in found["measured_interval"])
    return f" [{low:.2f}, {high:.2f}]"
