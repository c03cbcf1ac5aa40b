"""Renders a token view in the terminal or as one HTML file. Independent of models."""

from pathlib import Path

from jinja2 import Environment, PackageLoader
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lspade_train.inspection.view import Cell, TokenView
from lspade_train.io.storage import write_text
from lspade_train.probes.lenses import label_of

LONGEST = 12  # most characters of a token in a terminal cell
# Certain to uniform: one hue of decreasing luminance, which also works in greyscale.
SCALE = ((224, 239, 251), (86, 152, 208), (8, 36, 74))


def render_terminal(view: TokenView, console: Console) -> None:
    """Print the positions that fit the console's width, then the answer position and its choices.

    A cell's colour is its entropy; on a console with few colours, the entropy is printed instead.
    """
    coloured = console.color_system in {"256", "truecolor"}
    console.print(_heading(view, coloured), highlight=False)
    console.print(_positions(view, console.width, coloured))
    console.print(_top_k(view, coloured))
    if view.choices:
        console.print(_choices(view))


def render_html(view: TokenView, path: Path, *, model: str) -> Path:
    """Write one self-contained file: both tables, with every cell's top-k on hover.

    Raises:
        LSpadeError: the file cannot be written.
    """
    pages = Environment(loader=PackageLoader("lspade_train.inspection", ""), autoescape=True)
    page = pages.get_template("template.html").render(
        view=view,
        model=model,
        lens=label_of(view.lens),
        style=style,
        legend=[step / 8 * view.uniform for step in range(9)],
    )
    write_text(path, page)
    return path


def style(entropy: float, uniform: float) -> tuple[str, str]:
    """Background and text colour of an entropy, as hex: pale for certain, dark for uniform.

    Args:
        entropy: nats.
        uniform: the highest possible entropy, nats.
    """
    share = min(max(entropy / uniform, 0.0), 1.0)
    half = int(share >= 0.5)
    within = share * 2 - half
    ends = zip(SCALE[half], SCALE[half + 1], strict=True)
    red, green, blue = (round(a + (b - a) * within) for a, b in ends)
    return f"#{red:02x}{green:02x}{blue:02x}", "#000000" if share < 0.63 else "#ffffff"


def _heading(view: TokenView, coloured: bool) -> str:
    how = "colour, from pale" if coloured else "number, from"
    return (
        f"\n{label_of(view.lens)}: likeliest next token by layer and position; underlined where it "
        f"is the full model's.\nEntropy: the {how} 0 (certain) to {view.uniform:.2f} nats "
        "(uniform)\n"
    )


def _positions(view: TokenView, width: int, coloured: bool) -> Table:
    """Table of layer x position, with as many of the last positions as fit the width."""
    columns = [
        [_cell(row[place], view.uniform, coloured) for row in view.cells]
        for place in range(len(view.tokens))
    ]
    headings = [Text(_short(token)) for token in view.tokens]
    kept, room = len(columns), width - 14
    for place in reversed(range(len(columns))):
        room -= max(text.cell_len for text in [headings[place], *columns[place]]) + 3
        if room < 0 and place < len(columns) - 1:
            break
        kept = place
    table = Table("layer")
    for heading in headings[kept:]:
        table.add_column(heading)
    for number, layer in reversed(list(enumerate(view.layers))):
        table.add_row(_layer(view, layer), *(column[number] for column in columns[kept:]))
    hidden = view.first + kept
    if hidden:
        table.caption = f"{hidden} earlier positions are not shown; --html has those of --last"
    return table


def _top_k(view: TokenView, coloured: bool) -> Table:
    """Table of layer x top-k at the answer position."""
    ranks = (f"top {rank + 1}" for rank in range(len(view.answer[0].tokens)))
    table = Table("layer", "entropy (nats)", "KL to the model", *ranks, title="answer position")
    for layer, cell in reversed(list(zip(view.layers, view.answer, strict=True))):
        background, colour = style(cell.entropy, view.uniform)
        spread = Text(f"{cell.entropy:.3f}", f"{colour} on {background}" if coloured else "")
        tokens = (
            Text(f"{_short(token)} {probability:.3f}")
            for token, probability in zip(cell.tokens, cell.probabilities, strict=True)
        )
        table.add_row(_layer(view, layer), spread, f"{cell.kl:.3f}", *tokens)
    return table


def _choices(view: TokenView) -> Table:
    """Table of layer x choice: probability among the choices, the highest in bold."""
    table = Table("layer", title="probability among the choices")
    for choice in view.choices:
        table.add_column(Text(choice))
    for layer, scores in reversed(list(zip(view.layers, view.scores, strict=True))):
        best = max(scores)
        cells = (Text(f"{score:.3f}", "bold" if score == best else "") for score in scores)
        table.add_row(_layer(view, layer), *cells)
    return table


def _cell(cell: Cell, uniform: float, coloured: bool) -> Text:
    word = _short(cell.tokens[0])
    underline = "underline" if cell.agrees else ""
    if not coloured:
        return Text(f"{word} {cell.entropy:.1f}", underline)
    background, colour = style(cell.entropy, uniform)
    return Text(word, f"{colour} on {background} {underline}")


def _short(token: str) -> str:
    return token if len(token) <= LONGEST else token[: LONGEST - 1] + "…"


def _layer(view: TokenView, layer: int) -> str:
    return f"{layer} (model)" if layer == view.layers[-1] else str(layer)
