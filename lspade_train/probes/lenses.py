"""The registry of lenses: every way of reading next-token logits from one layer.

Tables, figures, report, model card, `results.json` and `inspect --lens` all use this registry, so
one call of `register` adds a lens everywhere. Styles are plain data, and torch is not imported, so
that commands which only print results start fast. Independent of caches and metrics.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from lspade_train.errors import ArtifactError, RecipeError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from lspade_train.models import Unembedding
    from lspade_train.probes.heads import LSpadeHeads

Marker = Literal[
    "circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star", "pentagon"
]
Dash = Literal["solid", "dash", "dot", "dashdot"]


@dataclass(frozen=True)
class LineStyle:
    """Style of a lens's line. Colour, marker and dashes all differ, to be distinct in greyscale.

    Attributes:
        colour: hex, such as `#0072B2`.
        marker: shape of the points.
        dash: pattern of the line.
    """

    colour: str
    marker: Marker = "circle"
    dash: Dash = "solid"


@dataclass(frozen=True)
class LayerView:
    """What a lens may read: one layer at the answer positions.

    Attributes:
        layer: l.
        hidden: h_a^l, (rows, d).
        unembed: the model's frozen final norm and head.
        heads: the heads that the lens uses; None for a lens without heads.
        spade: computes SPADE's logits from that layer, (rows, vocab).
    """

    layer: int
    hidden: "Float[Tensor, 'rows d']"
    unembed: "Unembedding"
    heads: "LSpadeHeads | None"
    spade: "Callable[[], Float[Tensor, 'rows vocab']]"


@dataclass(frozen=True)
class HeadsSource:
    """Where a lens's heads are stored, and what they were fitted to.

    Attributes:
        target: `model.target` of the fit: `spade` or `final`.
        folder: subfolder of the heads folder; `.` is the heads folder itself.
    """

    target: str
    folder: str


@dataclass(frozen=True, kw_only=True)
class Lens:
    """One way of reading a layer.

    Attributes:
        key: name in `results.json` and for `inspect --lens`.
        label: name in tables, legends and the card.
        short_label: name for narrow columns.
        read: computes the logits of the layer in a view, (rows, vocab).
        style: style of its line in figures.
        heads: the heads it uses; None for a lens without heads.
        decoder: the `ExitPolicy.decoder` that answers like this lens, whose FLOPs are its cost;
            None if there is none, which leaves it out of the comparison at equal FLOPs.
        read_tokens: computes the logits of a few tokens per row, whose ids are (rows, tokens),
            without the product with the whole vocabulary; None takes them from `read`.
    """

    key: str
    label: str
    short_label: str
    read: "Callable[[LayerView], Float[Tensor, 'rows vocab']]"
    style: LineStyle
    heads: HeadsSource | None = None
    decoder: str | None = None
    read_tokens: "Callable[[LayerView, Tensor], Float[Tensor, 'rows tokens']] | None" = None

    def logits(self, view: LayerView) -> "Float[Tensor, 'rows vocab']":
        """Read the layer in `view`.

        Raises:
            ArtifactError: the lens needs heads, and the view has none.
        """
        self._require_heads(view)
        return self.read(view)

    def token_logits(
        self, view: LayerView, ids: "Int[Tensor, 'rows tokens']"
    ) -> "Float[Tensor, 'rows tokens']":
        """The logits of a few tokens per row.

        Args:
            view: the layer.
            ids: each row's tokens.

        Raises:
            ArtifactError: as for `logits`.
        """
        self._require_heads(view)
        if self.read_tokens is None:
            return self.read(view).gather(-1, ids)
        return self.read_tokens(view, ids)

    def _require_heads(self, view: LayerView) -> None:
        if self.heads is not None and view.heads is None:
            raise ArtifactError(
                f"The lens {self.key} reads through heads, and none were given.\n"
                f"Fit them with lspade-train fit --config RECIPE.yaml --model.target "
                f"{self.heads.target}, and pass them."
            )


def _through_unembedding(view: LayerView) -> "Tensor":
    return view.unembed(view.hidden.to(view.unembed.weight.dtype))


def _through_heads(view: LayerView) -> "Tensor":
    assert view.heads is not None
    return view.heads.logits(view.hidden, view.layer)


def _tokens_through_heads(view: LayerView, ids: "Tensor") -> "Tensor":
    assert view.heads is not None
    state = view.heads.translate(view.hidden, view.layer)
    return view.unembed.tokens(state.to(view.hidden.dtype), ids)


# Okabe and Ito's palette, which is safe for colour-blind readers.
LOGIT_LENS = Lens(
    key="logit_lens",
    label="logit lens",
    short_label="logit",
    read=_through_unembedding,
    style=LineStyle("#8A8A8A", "square", "dot"),
    decoder="logit_lens",
)
"""The frozen norm and head on the hidden state as it is (nostalgebraist 2020)."""

TUNED_LENS = Lens(
    key="tuned_lens",
    label="tuned lens",
    short_label="tuned",
    read=_through_heads,
    style=LineStyle("#E69F00", "triangle-up", "dashdot"),
    heads=HeadsSource("final", "tuned_lens"),
    read_tokens=_tokens_through_heads,
    decoder="tuned_lens",
)
"""Heads fitted to the full model's distribution (arXiv:2303.08112)."""

L_SPADE = Lens(
    key="l_spade",
    label="L-SPADE",
    short_label="L-SPADE",
    read=_through_heads,
    style=LineStyle("#0072B2", "circle", "solid"),
    heads=HeadsSource("spade", "."),
    read_tokens=_tokens_through_heads,
    decoder="l-spade",
)
"""Heads fitted to SPADE's distribution at the same layer (arXiv:2507.17618)."""

SPADE = Lens(
    key="spade",
    label="SPADE",
    short_label="SPADE",
    read=lambda view: view.spade(),
    style=LineStyle("#D55E00", "diamond", "dash"),
    decoder="spade",
)
"""The remaining layers on `[h_s^l, h_a^l]`: L-SPADE's target, and the answer at an exit."""

LENSES: dict[str, Lens] = {}
"""By key, in the order of tables and figures."""

UNREGISTERED = LineStyle("#CC79A7", "pentagon", "dashdot")
"""Style of a lens that was measured by another installation and is not registered here."""


def register(lens: Lens) -> Lens:
    """Add a lens to every table, figure and command.

    Returns:
        The lens.

    Raises:
        RecipeError: its key is taken, or its style cannot be drawn.
    """
    if lens.key in LENSES:
        raise RecipeError(
            f"A lens {lens.key!r} is registered already; the keys in use are "
            f"{', '.join(LENSES)}. Choose another key."
        )
    markers, dashes = get_args(Marker), get_args(Dash)
    if lens.style.marker not in markers or lens.style.dash not in dashes:
        raise RecipeError(
            f"The lens {lens.key!r} has marker {lens.style.marker!r} and dash "
            f"{lens.style.dash!r}.\n"
            f"Expected one of {', '.join(markers)} and one of {', '.join(dashes)}."
        )
    LENSES[lens.key] = lens
    return lens


for _lens in (LOGIT_LENS, TUNED_LENS, L_SPADE, SPADE):
    register(_lens)


def find_lens(key: str) -> Lens:
    """The registered lens with that key.

    Raises:
        RecipeError: no lens has that key.
    """
    if key not in LENSES:
        raise RecipeError(f"No lens {key!r}; expected one of {', '.join(LENSES)}. Set --lens.")
    return LENSES[key]


def lens_of_target(target: str | None) -> Lens:
    """The lens whose heads are fitted to a given `model.target`.

    Args:
        target: None (not recorded) means `spade`.

    Raises:
        ArtifactError: no lens has heads of that target.
    """
    wanted = target or "spade"
    for lens in LENSES.values():
        if lens.heads is not None and lens.heads.target == wanted:
            return lens
    raise ArtifactError(
        f"No lens reads heads fitted to {wanted!r}; expected spade or final.\n"
        "Fit them again with lspade-train fit."
    )


def label_of(key: str, *, short: bool = False) -> str:
    """A lens's label, or its key if it is not registered here (as in shared results)."""
    lens = LENSES.get(key)
    if lens is None:
        return key
    return lens.short_label if short else lens.label


def style_of(key: str) -> LineStyle:
    """The style of a lens's line."""
    return LENSES[key].style if key in LENSES else UNREGISTERED
