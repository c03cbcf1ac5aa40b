"""Figures for print: PNG and SVG, by matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lspade_train.io.progress import track
from lspade_train.probes.lenses import LineStyle
from lspade_train.reporting.plots.charts import (
    INK,
    Bars,
    Chart,
    Figure,
    Heatmap,
    Omitted,
    Series,
)
from lspade_train.reporting.plots.figures import all_figures, comparison

SIZE, DPI = (6.4, 4.2), 160  # inches: a column and a half of a paper, or a README's width
MARKERS = {
    "circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v",
    "cross": "X", "star": "*", "pentagon": "p",
}  # fmt: skip
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
NOTE: dict[str, Any] = {
    "xytext": (0, 7), "textcoords": "offset points", "fontsize": 7.5, "color": "#555555",
}  # fmt: skip
# Offsets in points of the texts beside neighbouring points, so that they do not overlap.
CORNERS = ((9, -4), (9, -4), (-3, -15), (-16, -4))
HATCHES = ("", "////", "....", "xxxx")
SETTINGS: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "lspade-train",  # equal results give identical bytes
    "text.parse_math": False,  # a user's $ is a dollar sign
}


def write_figures(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw every figure that the results support.

    Args:
        results: as in `results.json`.
        folder: receives `NAME.png` and `NAME.svg`; figures of an earlier run are removed.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [figure for figure in all_figures(results) if not isinstance(figure, Omitted)]
    told = track(drawn, "figures", len(drawn), "figures")
    paths = [path for figure in told for path in draw(figure, folder / figure.name)]
    for old in {*folder.glob("*.png"), *folder.glob("*.svg")} - set(paths):
        old.unlink()
    return paths


def compare_accuracy(several: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw the accuracy by layer of several heads folders.

    Args:
        several: results, each with its own `label`.
        path: the PNG; an SVG is written beside it.

    Returns:
        The PNG.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return draw(comparison(several), path.with_suffix(""))[0]


def draw(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Draw one figure.

    Args:
        figure: what to show.
        stem: path without suffix.

    Returns:
        The PNG and the SVG.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    from lspade_train.io.storage import atomic_path

    with rc_context(SETTINGS):
        canvas = Canvas(figsize=SIZE, layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.subplots()
        axes.set_title(figure.title, fontsize=11, loc="left", pad=20, weight="bold")
        note = axes.annotate(figure.note, (0, 1), xycoords="axes fraction", **NOTE)
        note.set_in_layout(False)
        axes.set_xlabel(figure.x_label)
        axes.set_ylabel(figure.y_label)
        DRAWERS[type(figure)](axes, figure)
        png, svg = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")
        canvas.draw_without_rendering()
        canvas.set_layout_engine("none")  # both files share one layout: computed once
        with atomic_path(png) as path:
            canvas.savefig(path, format="png", dpi=DPI)
        with atomic_path(svg) as path:
            canvas.savefig(path, format="svg", metadata={"Date": None})
    return png, svg


def _draw_chart(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    for series in chart.series:
        _draw_series(axes, series)
    for index, level in enumerate(chart.levels):
        style: dict[str, Any] = {"color": "black", "lw": 1, "ls": ("-", "--", ":")[index % 3]}
        axes.axhline(level.value, label=level.label, zorder=1.5, **style)
        if level.interval:
            axes.axhspan(*level.interval, color="black", alpha=0.1, lw=0)
    if chart.log_y:
        axes.set_yscale("log")
    if chart.log_x:
        axes.set_xscale("log")
        axes.set_xticks(chart.series[0].x, [f"{x:,}" for x in chart.series[0].x])
        axes.minorticks_off()
    if chart.whole_x:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if chart.percent_x:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _legend(axes)


def _draw_series(axes: Any, series: Series) -> None:
    y = [float("nan") if value is None else value for value in series.y]
    style = _matplotlib_style(series.style)
    crowded = len(y) > 40
    axes.plot(
        series.x, y, label=series.label, color=style["color"], marker=style["marker"],
        ls=style["ls"] if series.joined else "", lw=1.6, zorder=2.5 if series.joined else 3,
        ms=(5 if series.joined else 11 if series.style.marker == "star" else 8),
        markevery=max(1, len(y) // 20) if crowded else None,
        markeredgecolor=style["color"] if series.joined else "black", markeredgewidth=0.7,
    )  # fmt: skip
    if series.low is not None and series.high is not None:
        ends = [
            [float("nan") if value is None else value for value in end]
            for end in (series.low, series.high)
        ]
        axes.fill_between(series.x, *ends, color=style["color"], alpha=0.15, lw=0)
    for index, text in enumerate(series.texts or ()):
        place, corner = (series.x[index], y[index]), CORNERS[index % len(CORNERS)]
        axes.annotate(text, place, xytext=corner, textcoords="offset points", fontsize=8)


def _draw_bars(axes: Any, bars: Bars) -> None:
    width = bars.width * 0.86 / len(bars.groups)
    for index, (label, heights) in enumerate(bars.groups.items()):
        shift = (index - (len(bars.groups) - 1) / 2) * width
        axes.bar(
            [place + shift for place in bars.places], heights, width, label=label,
            color=_matplotlib_style(bars.styles[index])["color"], edgecolor="white", lw=0.4,
            hatch=HATCHES[index % len(HATCHES)],
        )  # fmt: skip
    if bars.width == 1.0 and len(bars.places) <= 20:
        axes.set_xticks(bars.places)
    axes.grid(visible=False, axis="x")
    _legend(axes)


def _draw_heatmap(axes: Any, heatmap: Heatmap) -> None:
    rows = [[float("nan") if v is None else v for v in row] for row in heatmap.values]
    image = axes.imshow(rows, cmap="cividis", aspect="auto", vmin=0, vmax=1)
    for y, row in enumerate(heatmap.texts):
        for x, text in enumerate(row):
            value = heatmap.values[y][x]
            colour = "black" if value is None or value > 0.5 else "white"
            axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(heatmap.columns)), heatmap.columns)
    axes.set_yticks(range(len(heatmap.rows)), heatmap.rows)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.figure.colorbar(image, label=heatmap.colour_label)


def _legend(axes: Any) -> None:
    """Add a legend at the emptiest place; omitted for a single entry, which the title names."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        axes.legend(handles, labels, loc="best")


def _matplotlib_style(style: LineStyle) -> dict[str, str]:
    colour = "black" if style.colour == INK else style.colour
    return {"color": colour, "marker": MARKERS[style.marker], "ls": DASHES[style.dash]}


DRAWERS: dict[type, Any] = {Chart: _draw_chart, Bars: _draw_bars, Heatmap: _draw_heatmap}
