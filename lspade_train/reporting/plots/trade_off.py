"""Figures of SPADE-EXIT: accuracy against compute."""

from collections.abc import Iterator, Sequence
from typing import Any

from lspade_train.probes.lenses import LineStyle, label_of, style_of
from lspade_train.reporting.plots.charts import (
    Bars,
    Chart,
    Level,
    Omitted,
    Series,
    cycle_style,
    run_note,
)

NO_EXITS = "No exits were measured: SPADE-EXIT needs heads at a layer below the last."
CLOSE = 0.02
"""Lines whose accuracy differs by no more than this are drawn as one."""
POLICY = LineStyle("#D55E00", "star")
PAPER = LineStyle("#E69F00", "square")
ORACLE = LineStyle("#009E73", "triangle-up")
EXIT = LineStyle("#009E73", "star", "solid")


def sweep_by_layer(results: dict[str, Any]) -> Chart | Omitted:
    """Accuracy against mean exit layer over all thresholds."""
    return _sweep(
        results,
        of=lambda row: row["mean_exit_layer"],
        name="exits_by_layer",
        title="SPADE-EXIT: accuracy by mean exit layer",
        x_label=f"mean exit layer (of {results['num_layers']})",
    )


def sweep_by_flops(results: dict[str, Any]) -> Chart | Omitted:
    """Accuracy against FLOPs over all thresholds, including all checks except the oracle's."""
    return _sweep(
        results,
        of=_flops,
        name="exits_by_flops",
        title="SPADE-EXIT: accuracy by FLOPs",
        x_label="FLOPs used, checks charged (share of the full model's)",
        percent_x=True,
    )


def exit_histogram(results: dict[str, Any]) -> Bars | Omitted:
    """Where rows exit: with the policy and with two of the paper's thresholds."""
    title = "Exit layers"
    exits = results["exits"]
    if not exits:
        return Omitted(title, NO_EXITS)
    rows = {f"{_entropy(row)} nats": row["exit_counts"] for row in exits["paper"][:2]}
    policy = exits["policy"]
    if policy and policy["row"] and {*policy["exit_layers"]} <= {*exits["exit_layers"]}:
        # The policy may check fewer layers than the sweep.
        counts = dict(zip(policy["exit_layers"], policy["row"]["exit_counts"], strict=True))
        every = [counts.get(layer, 0) for layer in exits["exit_layers"]]
        rows = {policy.get("label", "policy.json"): every, **rows}
    shares = {name: [count / sum(counts) for count in counts] for name, counts in rows.items()}
    return Bars(
        name="exit_histogram",
        title=title,
        note=run_note(results, labelled=False, interval=False),
        caption="Share of the rows that exit after each block; the last is the full model. "
        "Thresholds are on the heads' entropy; the policy is that of policy.json.",
        x_label="exit layer",
        y_label="share of rows",
        places=exits["exit_layers"],
        groups=shares,
        styles=tuple(cycle_style(index) for index in range(len(shares))),
        width=1.0,
    )


def iso_compute_chart(results: dict[str, Any]) -> Chart | Omitted:
    """Every lens at every fixed layer, SPADE-EXIT and the policy, against their total FLOPs."""
    iso = results["iso_compute"]
    if not iso:
        return Omitted("Equal compute", "FLOPs were not counted for these lenses.")
    series = [
        Series(label_of(key), lens["flops"], lens["accuracy"], style_of(key))
        for key, lens in iso["lenses"].items()
    ]
    if "spade_exit" in iso["at_budget"]:
        best = iso["at_budget"]["spade_exit"]
        series.append(Series("SPADE-EXIT", iso["budgets"], best, EXIT))
    labelled = iso["metric"] == "accuracy"
    series += _policy(results, _flops, labelled)
    return Chart(
        name="iso_compute",
        title="Equal compute",
        note=run_note(results, labelled=labelled, interval=False),
        caption=f"100% is {iso['full_flops']:.3g} FLOPs. Each point of a lens answers every row at "
        "one fixed layer; SPADE-EXIT has the costliest threshold within each budget. Blocks, maps, "
        "norm, unembedding, SPADE's continuation and SPADE-EXIT's checks are all charged.",
        x_label="FLOPs per row (share of the full model's)",
        y_label=_what(labelled),
        series=tuple(series),
        levels=(*_full_model(results), *chance_levels(results["full_model"])) if labelled else (),
        percent_x=True,
    )


def chance_levels(full: dict[str, Any]) -> Iterator[Level]:
    """Baselines without a model; one line if both are about equal."""
    chance, majority = full.get("chance"), full.get("majority")
    if chance is not None:
        yield Level("chance", chance)
    if majority is not None and majority - (chance or 0.0) > CLOSE:
        yield Level("most frequent answer", majority)


def _sweep(results: dict[str, Any], *, of: Any, title: str, **described: Any) -> Chart | Omitted:
    exits = results["exits"]
    if not exits:
        return Omitted(title, NO_EXITS)
    labelled = exits["never"]["accuracy"] is not None  # not if only some rows have labels
    grid = exits["grid"]
    low, high = zip(*(_interval(row, labelled) for row in grid), strict=True)
    series = [
        Series(
            "every threshold", [of(row) for row in grid], _values(grid, labelled),
            LineStyle("#0072B2", "circle"), low, high,
        ),
        Series(
            "thresholds of the paper (nats)", [of(row) for row in exits["paper"]],
            _values(exits["paper"], labelled), PAPER,
            texts=[_entropy(row) for row in exits["paper"]], joined=False,
        ),
    ]  # fmt: skip
    series += _policy(results, of, labelled)
    never = exits["never"]
    caption = "The heads' entropy decides, SPADE answers."
    if of is _flops and exits["oracle_saving"] is not None:
        where = [1 - exits["oracle_saving"]]
        series.append(
            Series("oracle, checks free", where, _values([never], labelled), ORACLE, joined=False)
        )
        caption += " The oracle exits each row at the first layer that agrees with the full model."
    return Chart(
        title=title,
        note=run_note(results, labelled=labelled),
        caption=caption,
        y_label=_what(labelled),
        series=tuple(series),
        levels=_full_model(results) if labelled else (),
        **described,
    )


def _policy(results: dict[str, Any], of: Any, labelled: bool) -> Iterator[Series]:
    """The star for policy.json, if it was measured."""
    policy = (results["exits"] or {}).get("policy")
    if policy and policy["row"]:
        row, label = policy["row"], policy.get("label", "policy.json")
        yield Series(label, [of(row)], _values([row], labelled), POLICY, joined=False)


def _flops(row: dict[str, Any]) -> float:
    return 1 - row["compute_saved"]


def _values(rows: Sequence[dict[str, Any]], labelled: bool) -> list[float | None]:
    if labelled:
        return [row["accuracy"] for row in rows]
    return [1 - row["disagreement"] for row in rows]


def _interval(row: dict[str, Any], labelled: bool) -> tuple[float | None, float | None]:
    if labelled:
        low, high = row["accuracy_interval"] or (None, None)
        return low, high
    low, high = row["disagreement_interval"]
    return 1 - high, 1 - low


def _what(labelled: bool) -> str:
    return "accuracy (fraction of rows)" if labelled else "answers as the full model (fraction)"


def _full_model(results: dict[str, Any]) -> tuple[Level, ...]:
    return (Level("full model", results["full_model"]["accuracy"]),)


def _entropy(row: dict[str, Any]) -> str:
    return f"{row['threshold']:g}"
