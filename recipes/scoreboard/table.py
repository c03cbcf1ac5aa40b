"""Writes docs/scoreboard.md and its figure, from the files in results/ alone."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from lspade_train.probes.lenses import LENSES, label_of, style_of

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
PAGE = ROOT / "docs/scoreboard.md"
FIGURE = ROOT / "docs/assets/scoreboard.svg"

RULES = {"paper": "the paper's rule", "ours": "calibrate"}
BASELINES = ("fixed layer", "linear probe", "patience", "SVM over statistics")
WITHIN = (0.01, 0.02)
LEVEL = 0.95
COLUMNS = 4
"""Most panels of the figure side by side."""


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The results, sorted by name."""
    files = sorted(folder.glob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


def write_page(folder: Path = RESULTS, page: Path = PAGE, figure: Path = FIGURE) -> Path:
    """Write the page and its figure."""
    found = load(folder)
    page.write_text(render(found), encoding="utf-8")
    draw([pair for pair in found if above_chance(pair)], figure)
    return page


def above_chance(pair: Mapping[str, Any]) -> bool:
    """Whether the model is better than chance on the task."""
    return pair["full_model"]["interval"][0] > blind(pair)


def blind(pair: Mapping[str, Any]) -> float:
    """Accuracy of guessing or of the most frequent answer."""
    return max(pair["full_model"]["chance"] or 0.0, pair["full_model"]["majority"])


def render(found: Sequence[Mapping[str, Any]]) -> str:
    """The page."""
    used = [pair for pair in found if above_chance(pair)]
    heads = found[0]["provenance"]["recipe"]["heads"]
    seconds = sum(sum(pair["provenance"]["cpu_seconds"].values()) for pair in found)
    exiting = [row for pair in used for row in pair["policies"].values() if row["layers"]]
    return (
        (HERE / "page.md")
        .read_text(encoding="utf-8")
        .format(
            heads=", ".join(f"`model.{key}: {value}`" for key, value in heads.items()),
            budget=f"{100 * found[0]['budget']:g}",
            short=_summary(found, used),
            full=table(found, _full_columns()),
            depth=table(used, _depth_columns()),
            exits=table(used, _exit_columns()),
            baselines=table(used, _baseline_columns()),
            policies=len(exiting),
            over=sum(row["drop"] > found[0]["budget"] for row in exiting),
            expected=(1 - LEVEL) * len(exiting),
            hours=seconds / 3600,
            hardware=_each(pair["provenance"]["hardware"] for pair in found),
            weights=_each(
                f"{pair['model']}, {pair['weights']}, run in {pair['provenance']['dtype']}"
                for pair in found
            ),
        )
    )


def _summary(found: Sequence[Mapping[str, Any]], used: Sequence[Mapping[str, Any]]) -> str:
    """A summary of the tables, in a few sentences."""

    def of(name: str) -> str:
        rows = [pair["policies"][name] for pair in used]
        exiting = [row for row in rows if row["layers"]]
        if not exiting:
            return "exits on none"
        saved = [row["compute_saved"] for row in exiting]
        lost = max(100 * row["drop"] for row in exiting)
        span = f" ({min(saved):.1%} to {max(saved):.1%})" if len(saved) > 1 else ""
        return (
            f"exits on {len(exiting)} of them, saves a median {median(saved):.1%} of the FLOPs "
            f"there{span} and loses at most {lost:.1f} points"
        )

    budget = found[0]["budget"]
    fixed = [pair["baselines"]["fixed layer"]["drop"] > budget for pair in used]
    return (
        f"Pairs of a model and a task: {len(found)}; those whose model is above chance: "
        f"{len(used)}. `calibrate` {of('ours')}; the paper's rule {of('paper')}. The best fixed "
        "layer, chosen on validation rows without a guarantee, loses more than the budget on "
        f"{sum(fixed)} of them."
    )


def _each(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))


Column = Callable[[Mapping[str, Any]], str]


def table(pairs: Sequence[Mapping[str, Any]], columns: Mapping[str, Column]) -> str:
    """Markdown, one row per pair."""
    names = ["model", "task", *columns]
    lines = [names, ["---"] * len(names)]
    for pair in pairs:
        cells = [column(pair) for column in columns.values()]
        lines.append([pair["model"], pair["task"], *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _full_columns() -> dict[str, Column]:
    def accuracy(pair: Mapping[str, Any]) -> str:
        low, high = pair["full_model"]["interval"]
        return f"{pair['full_model']['accuracy']:.3f} [{low:.3f}, {high:.3f}]"

    def share(name: str) -> Column:
        return lambda pair: _number(pair["full_model"][name], ".3f")

    return {
        "rows: train / validation / test": lambda pair: (
            f"{pair['rows']['train']:,} / {pair['rows']['validation']:,} / {pair['n']:,}"
        ),
        "accuracy": accuracy,
        "chance": share("chance"),
        "most frequent": share("majority"),
        "above chance": lambda pair: "yes" if above_chance(pair) else "no",
    }


def _depth_columns() -> dict[str, Column]:
    def depth(lens: str) -> Column:
        def cell(pair: Mapping[str, Any]) -> str:
            if lens not in pair["lenses"]:
                return "-"
            found = [first_within(pair, lens, points) for points in WITHIN]
            return " / ".join("-" if one is None else str(one) for one in found)

        return cell

    blocks: dict[str, Column] = {"blocks": lambda pair: str(pair["num_layers"])}
    return blocks | {label_of(lens): depth(lens) for lens in LENSES}


def first_within(pair: Mapping[str, Any], lens: str, points: float) -> int | None:
    """First layer from which on a lens's accuracy stays within `points` of the full model's."""
    found: int | None = None
    least = pair["full_model"]["accuracy"] - points
    accuracy = pair["lenses"][lens]["accuracy"]
    for layer, value in zip(reversed(pair["layers"]), reversed(accuracy), strict=True):
        if value < least - 1e-9:
            break
        found = layer
    return found


def _exit_columns() -> dict[str, Column]:
    def rule(name: str) -> Column:
        def cell(pair: Mapping[str, Any]) -> str:
            row = pair["policies"][name]
            return _saved(row) if row["layers"] else "never"

        return cell

    columns: dict[str, Column] = {"n": lambda pair: f"{pair['n']:,}"}
    columns |= {label: rule(name) for name, label in RULES.items()}
    for size in ("1", "8"):
        columns[f"time, batch {size}"] = partial(_time, size=size)
    return columns | {
        "calibrate chose": lambda pair: pair["policies"]["ours"]["name"].replace("->", "→"),
        "oracle": lambda pair: _number(pair["policies"]["ours"]["oracle_saving"], ".1%"),
    }


def _time(pair: Mapping[str, Any], size: str) -> str:
    found = pair.get("wall", {}).get("over_plain", {}).get(size)
    return (
        "-" if found is None else f"{found['median']:.2f} ({found['low']:.2f}-{found['high']:.2f})"
    )


def _baseline_columns() -> dict[str, Column]:
    def rule(name: str) -> Column:
        return lambda pair: _saved(pair["baselines"][name])

    return {name: rule(name) for name in BASELINES}


def _saved(row: Mapping[str, Any]) -> str:
    return f"{row['compute_saved']:.1%} / {100 * row['drop']:+.1f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


# The figure ----------------------------------------------------------------------------------


def draw(pairs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy by layer of every lens, one panel per pair."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    from lspade_train.reporting.plots.static import SETTINGS

    columns = min(COLUMNS, max(len(pairs), 2))
    rows = max(1, -(-len(pairs) // columns))
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(2.6 * columns + 0.4, 2.3 * rows + 0.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes: Any = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for place, axis in enumerate(axes.flat):
            _panel(axis, pairs[place] if place < len(pairs) else None)
        for line in axes:
            line[0].set_ylabel("accuracy", fontsize=8)
        ncols = min(6, 2 * columns - 1)
        handles = {h.get_label(): h for axis in axes.flat for h in axis.get_lines()}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=ncols)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _panel(axes: Any, pair: Mapping[str, Any] | None) -> None:
    if pair is None:
        axes.set_axis_off()
        return
    for lens, colour in _lens_colours(pair):
        accuracy = pair["lenses"][lens]["accuracy"]
        axes.plot(pair["layers"], accuracy, label=label_of(lens), color=colour, lw=1.4)
    axes.axhline(pair["full_model"]["accuracy"], color="black", lw=1, label="full model")
    axes.axhline(blind(pair), color="black", lw=1, ls=":", label="without a model")
    axes.set_title(f"{pair['model']}\n{pair['task']}, n = {pair['n']:,}", fontsize=8)
    axes.set_xlabel("layer", fontsize=8)
    axes.tick_params(labelsize=8)


def _lens_colours(pair: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for lens in pair["lenses"]:
        yield lens, style_of(lens).colour
