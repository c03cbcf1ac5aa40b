"""What a figure shows, apart from how it is drawn: one description for paper and screen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lspade_train.reporting.rows import rows_measured

Numbers = Sequence[float | None]

INK = "ink"
"""A colour that is black on paper and follows the page's text on screen."""


@dataclass(frozen=True)
class Look:
    """How a series is told from others, also in grey: colour, marker and dashes all differ.

    Attributes:
        colour: hex, or `INK`.
        marker: circle, square, diamond, triangle-up, triangle-down, cross, star or pentagon.
        dash: solid, dash, dot or dashdot.
    """

    colour: str
    marker: str = "circle"
    dash: str = "solid"


# Okabe & Ito's palette, made to be told apart by the colour-blind; yellow is left out: too pale.
CYCLE = (
    Look("#0072B2", "circle", "solid"),
    Look("#D55E00", "diamond", "dash"),
    Look("#009E73", "triangle-up", "dashdot"),
    Look("#CC79A7", "square", "dot"),
    Look("#E69F00", "triangle-down", "solid"),
    Look("#56B4E9", "pentagon", "dash"),
    Look("#999999", "cross", "dashdot"),
)
LENSES = {
    "logit_lens": ("logit lens", Look("#8A8A8A", "square", "dot")),
    "tuned_lens": ("tuned lens", Look("#E69F00", "triangle-up", "dashdot")),
    "l_spade": ("L-SPADE", Look("#0072B2", "circle", "solid")),
    "spade": ("SPADE", Look("#D55E00", "diamond", "dash")),
}
MODEL = Look(INK, "cross", "solid")


def look(index: int) -> Look:
    """The look of the index-th of several like things."""
    return CYCLE[index % len(CYCLE)]


@dataclass(frozen=True)
class Series:
    """One line with markers, or points alone.

    Attributes:
        label: in the legend.
        x: where.
        y: what; None leaves a gap.
        look: colour, marker and dashes.
        low: lower ends of the intervals, drawn as a band.
        high: upper ends.
        texts: written at the points.
        joined: whether the points are joined by a line.
    """

    label: str
    x: Numbers
    y: Numbers
    look: Look
    low: Numbers | None = None
    high: Numbers | None = None
    texts: Sequence[str] | None = None
    joined: bool = True


@dataclass(frozen=True)
class Level:
    """A horizontal line, with its interval where it has one."""

    label: str
    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Described:
    """What every figure has.

    Attributes:
        name: of its files.
        title: what it shows.
        note: n, seed, interval: written under the title.
        caption: how to read it.
        x_label: with its unit.
        y_label: with its unit.
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
        series: what is drawn.
        levels: horizontal lines.
        log_y: logarithmic y axis.
        log_x: logarithmic x axis.
        whole_x: x is a layer, so that only whole numbers are ticks.
        percent_x: x is a fraction shown as per cent.
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
        looks: of each group.
        width: of a place, in units of x.
    """

    places: Sequence[float]
    groups: Mapping[str, Numbers]
    looks: tuple[Look, ...]
    width: float


@dataclass(frozen=True, kw_only=True)
class Heatmap(Described):
    """Coloured cells with their values written in them.

    Attributes:
        rows: labels, from the top.
        columns: labels.
        values: by row; None leaves a cell empty.
        texts: written into the cells.
        colour_label: what the colour means, with its unit.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Numbers]
    texts: Sequence[Sequence[str]]
    colour_label: str


@dataclass(frozen=True)
class Omitted:
    """A figure that these results have nothing for, and why."""

    title: str
    why: str


Figure = Chart | Bars | Heatmap


def run_note(results: dict[str, Any], *, labelled: bool, interval: bool = True) -> str:
    """What stands under every title: `arc, test split (org/model), n = 2,000, seed 0, ...`.

    Args:
        results: as in `results.json`.
        labelled: whether only rows with a right answer count.
        interval: whether intervals are drawn.
    """
    model = "/".join(results["model_id"].rstrip("/").split("/")[-2:])
    n = results["n_labelled"] if labelled else results["n"]
    text = f"{results['name']}, {rows_measured(results)} ({model}), n = {n:,}"
    text += f", seed {results['seed']}"
    level = results["interval"]["level"]
    return f"{text}, {level:.0%} bootstrap intervals" if interval else text
