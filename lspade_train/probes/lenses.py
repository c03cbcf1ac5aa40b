"""One protocol for every way of reading a layer: logit lens, tuned lens, L-SPADE, SPADE.

Knows nothing of caches or metrics.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from lspade_train.models import Unembedding
from lspade_train.probes.heads import LSpadeHeads


@dataclass(frozen=True)
class LayerView:
    """What a lens may look at: one layer at the answer positions.

    Attributes:
        layer: l.
        hidden: h_a^l, (rows, d).
        spade: gives SPADE's logits from that layer, (rows, vocab).
    """

    layer: int
    hidden: Float[Tensor, "rows d"]
    spade: Callable[[], Float[Tensor, "rows vocab"]]


class Lens(Protocol):
    """Reads next-token logits off one layer."""

    @property
    def name(self) -> str:
        """Name in tables and files."""
        ...

    def logits(self, view: LayerView) -> Float[Tensor, "rows vocab"]:
        """Logits of the layer in `view`."""
        ...


@dataclass(frozen=True)
class LogitLens:
    """The frozen norm and head applied as they are (nostalgebraist 2020)."""

    unembed: Unembedding
    name: str = "logit_lens"

    def logits(self, view: LayerView) -> Float[Tensor, "rows vocab"]:
        """Unembed the hidden state itself."""
        return self.unembed(view.hidden.to(self.unembed.weight.dtype))


@dataclass(frozen=True)
class HeadsLens:
    """Trained heads: L-SPADE, or a tuned lens (arXiv:2303.08112) where `target` was `final`."""

    heads: LSpadeHeads
    name: str = "l_spade"

    def logits(self, view: LayerView) -> Float[Tensor, "rows vocab"]:
        """Translate, then unembed."""
        return self.heads.logits(view.hidden, view.layer)


@dataclass(frozen=True)
class SpadeLens:
    """The upper blocks on `[h_s^l, h_a^l]`: the target of L-SPADE, and the answer at an exit."""

    name: str = "spade"

    def logits(self, view: LayerView) -> Float[Tensor, "rows vocab"]:
        """SPADE's logits."""
        return view.spade()
