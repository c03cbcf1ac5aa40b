"""What a figure shows, independent of how it is drawn: one description for print and screen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lspade_train.probes.lenses import LineStyle
from lspade_train.reporting.rows import rows_measured, short_model

Numbers = Sequence[float | None]

INK = "ink"
"""A colour that is black in print and follows the page's text on screen."""


# Okabe and Ito's palette, safe for colour-blind readers; without yellow, which is too pale.
CYCLE = (
    LineStyle("#0072B2", "circle", "solid"),
    LineStyle("#D55E00", "diamond", "dash"),
    LineStyle("#009E73", "triangle-up", "dashdot"),
    LineStyle("#CC79A7", "square", "dot"),
    LineStyle("#E69F00", "triangle-down", "solid"),
    LineStyle("#56B4E9", "pentagon", "dash"),
    LineStyle("#999999", "cross", "dashdot"),
)
MODEL = LineStyle(INK, "cross", "solid")


def cycle_style(index: int) -> LineStyle:
    """The style of the index-th of several lines of one kind."""
    return CYCLE[index % len(CYCLE)]


@dataclass(frozen=True)
class Series:
    """One line with markers, or points alone.

    Attributes:
        label: label in the legend.
        x: positions.
        y: values; None leaves a gap.
        style: colour, marker and dashes.
        low: lower ends of the intervals, drawn as a band.
        high: upper ends.
        texts: texts at the points.
        joined: whether the points are joined by a line.
    """

    label: str
    x: Numbers
    y: Numbers
    style: LineStyle
    low: Numbers | None = None
    high: Numbers | None = None
    texts: Sequence[str] | None = None
    joined: bool = True


@dataclass(frozen=True)
class Level:
    """A horizontal line, with its interval if it has one."""

    label: str
    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Described:
    """Attributes of every figure.

    Attributes:
        name: name of its files.
        title: what it shows.
        note: n, seed, interval; shown below the title.
        caption: how to read it.
        x_label: label of the x axis, with its unit.
        y_label: label of the y axis, with its unit.
    """

    name: str
    title: str
    note: str
    caption: str
    x_label: str
    y_label: str


@dataclass(frozen=True, kw_only=True)
class Chart(Described):
    """Lines and points.

    Attributes:
        series: lines and points.
        levels: horizontal lines.
        log_y: logarithmic y axis.
        log_x: logarithmic x axis.
        whole_x: x is a layer, with ticks at whole numbers only.
        percent_x: x is a fraction, shown as a percentage.
    """

    series: tuple[Series, ...]
    levels: tuple[Level, ...] = ()
    log_y: bool = False
    log_x: bool = False
    whole_x: bool = False
    percent_x: bool = False


@dataclass(frozen=True, kw_only=True)
class Bars(Described):
    """Groups of bars side by side.

    Attributes:
        places: x of each group of bars.
        groups: label and one height per place.
        styles: style of each group.
        width: width of a place, in units of x.
    """

    places: Sequence[float]
    groups: Mapping[str, Numbers]
    styles: tuple[LineStyle, ...]
    width: float


@dataclass(frozen=True, kw_only=True)
class Heatmap(Described):
    """Coloured cells with text in them.

    Attributes:
        rows: row labels, from the top.
        columns: column labels.
        values: values by row; None leaves a cell empty.
        texts: texts in the cells.
        colour_label: what the colour means, with its unit.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Numbers]
    texts: Sequence[Sequence[str]]
    colour_label: str


@dataclass(frozen=True)
class Omitted:
    """A figure that these results have no data for, and why."""

    title: str
    why: str


Figure = Chart | Bars | Heatmap


def run_note(results: dict[str, Any], *, labelled: bool, interval: bool = True) -> str:
    """The note under every title: `arc, test split (org/model), n = 2,000, seed 0, ...`.

    Args:
        results: as in `results.json`.
        labelled: whether only rows with a label count.
        interval: whether intervals are drawn.
    """
    n = results["n_labelled"] if labelled else results["n"]
    text = f"{results['name']}, {rows_measured(results)} ({short_model(results)}), n = {n:,}"
    text += f", seed {results['seed']}"
    level = results["interval"]["level"]
    return f"{text}, {level:.0%} bootstrap intervals" if interval else text
