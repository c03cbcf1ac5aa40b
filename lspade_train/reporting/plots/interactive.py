"""Figures for the screen: plotly's JSON, drawn by its script in the page.

Colours that depend on the page's theme (text, grid, `INK`) are left to the page's script.
"""

from typing import Any

from lspade_train.reporting.plots.charts import INK, Bars, Chart, Figure, Heatmap, Level, Series

# Positions of the texts beside the paper's four thresholds, so that neighbours do not overlap.
CORNERS = ("middle right", "middle right", "bottom center", "top center")
DASHES = ("solid", "dash", "dot")
"""Dashes of levels, in their order."""
TICKS = 10
"""Approximate maximum on an axis of whole numbers, to fit a phone's screen."""
PATTERNS = ("", "/", ".", "x")


def plotly(figure: Figure) -> dict[str, Any]:
    """`{"data": [...], "layout": {...}}` for plotly's script."""
    return DRAWERS[type(figure)](figure)


def _chart(chart: Chart) -> dict[str, Any]:
    data = [trace for series in chart.series for trace in _traces(series)]
    across = [x for series in chart.series for x in series.x if x is not None]
    ends = min(across), max(across)
    data += [_level(level, ends, DASHES[i % len(DASHES)]) for i, level in enumerate(chart.levels)]
    x_axis: dict[str, Any] = {"type": "log" if chart.log_x else "linear"}
    if chart.whole_x:
        x_axis |= {"tickformat": "d", "dtick": max(1, round((ends[1] - ends[0]) / TICKS))}
    if chart.percent_x:
        x_axis["tickformat"] = ".0%"
    y_axis = {"type": "log" if chart.log_y else "linear", "exponentformat": "power"}
    return {"data": data, "layout": _layout(chart, x_axis, y_axis)}


def _traces(series: Series) -> list[dict[str, Any]]:
    """The line, above its interval band (a closed path)."""
    style = series.style
    trace: dict[str, Any] = {
        "type": "scatter",
        "name": series.label,
        "legendgroup": series.label,
        "x": list(series.x),
        "y": list(series.y),
        "mode": "lines+markers" if series.joined else "markers+text",
        "line": {"color": style.colour, "dash": style.dash, "width": 2},
        "marker": {
            "color": style.colour,
            "symbol": style.marker,
            "size": 8 if series.joined else 13,
        },
        "hovertemplate": "%{x:.4~g}: %{y:.4f}<extra>%{fullData.name}</extra>",
    }
    if series.texts:
        trace |= {"text": list(series.texts), "textposition": list(CORNERS[: len(series.texts)])}
    if series.low is None or series.high is None:
        return [trace]
    trace["customdata"] = [list(pair) for pair in zip(series.low, series.high, strict=True)]
    trace["hovertemplate"] = (
        "%{x:.4~g}: %{y:.4f} [%{customdata[0]:.4f}, %{customdata[1]:.4f}]"
        "<extra>%{fullData.name}</extra>"
    )
    ends = zip(series.x, series.low, series.high, strict=True)
    known = [(x, low, high) for x, low, high in ends if low is not None and high is not None]
    across, lows, highs = ([point[i] for point in known] for i in range(3))
    band = {
        "type": "scatter",
        "name": series.label,
        "legendgroup": series.label,
        "x": [*across, *reversed(across)],
        "y": [*highs, *reversed(lows)],
        "fill": "toself",
        "fillcolor": style.colour,
        "opacity": 0.15,
        "line": {"width": 0},
        "mode": "lines",
        "hoverinfo": "skip",
        "showlegend": False,
    }
    return [band, trace]


def _level(level: Level, ends: tuple[float, float], dash: str) -> dict[str, Any]:
    interval = f" [{level.interval[0]:.4f}, {level.interval[1]:.4f}]" if level.interval else ""
    return {
        "type": "scatter",
        "name": level.label,
        "x": list(ends),
        "y": [level.value, level.value],
        "mode": "lines",
        "line": {"color": INK, "width": 1.2, "dash": dash},
        "hovertemplate": f"{level.value:.4f}{interval}<extra>{level.label}</extra>",
    }


def _bars(bars: Bars) -> dict[str, Any]:
    data = [
        {
            "type": "bar",
            "name": label,
            "x": list(bars.places),
            "y": list(heights),
            "marker": {
                "color": bars.styles[index].colour,
                "pattern": {"shape": PATTERNS[index % len(PATTERNS)], "size": 6},
            },
            "hovertemplate": "%{x:.4~g}: %{y:.4f}<extra>%{fullData.name}</extra>",
        }
        for index, (label, heights) in enumerate(bars.groups.items())
    ]
    whole = {"dtick": max(1, round(len(bars.places) / TICKS))} if bars.width == 1.0 else {}
    return {"data": data, "layout": {**_layout(bars, whole, {}), "barmode": "group"}}


def _heatmap(heatmap: Heatmap) -> dict[str, Any]:
    trace = {
        "type": "heatmap",
        "x": [column.replace("\n", "<br>") for column in heatmap.columns],
        "y": list(heatmap.rows),
        "z": [list(row) for row in heatmap.values],
        "text": [[text.replace("\n", "<br>") for text in row] for row in heatmap.texts],
        "texttemplate": "%{text}",
        "colorscale": "Cividis",
        "zmin": 0,
        "zmax": 1,
        "colorbar": {"title": {"text": heatmap.colour_label, "side": "right"}},
        "hovertemplate": "%{y} on %{x}: %{z:.4f}<extra></extra>",
    }
    axis = {"type": "category"}
    layout = _layout(heatmap, axis, {**axis, "autorange": "reversed"})
    return {"data": [trace], "layout": layout}


def _layout(figure: Figure, x_axis: dict[str, Any], y_axis: dict[str, Any]) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": figure.x_label}, "automargin": True, **x_axis},
        "yaxis": {"title": {"text": figure.y_label}, "automargin": True, **y_axis},
        "margin": {"l": 60, "r": 16, "t": 12, "b": 50},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
    }


DRAWERS: dict[type, Any] = {Chart: _chart, Bars: _bars, Heatmap: _heatmap}
