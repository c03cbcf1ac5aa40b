"""What the rows of one batch pay together, where they leave it at different layers.

A block takes nearly as long for one single-token row as for eight: most of it is reading weights.
Arrays in, numbers out: knows nothing of models or of how anything was measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Together:
    """What a batch pays once for a piece of work, however many of its rows need it.

    `ExitCosts` shares that evenly among the rows of a full batch, as if all needed it. Where some
    have left, the others pay their part too. K check layers, all in the unit of the costs.

    Attributes:
        rows: in a batch.
        reach: in the blocks up to each check layer, then up to the last block, (K+1,).
        check: in the check at each check layer, (K,).
        above: in the single-token blocks from each check layer up, (K,).
        unread: in a head's answer that its check does not have at hand, (K,).
        continues: whether a row that exits there continues as a single token, (K,).
        last: in the answer behind the last block.
        first: in the first exit of a batch that continues.
    """

    rows: int
    reach: Float[np.ndarray, " stages"]
    check: Float[np.ndarray, " checks"]
    above: Float[np.ndarray, " checks"]
    unread: Float[np.ndarray, " checks"]
    continues: Bool[np.ndarray, " checks"]
    last: float
    first: float

    def at(self, places: Sequence[int]) -> Self:
        """Only the check layers at these places."""
        columns = list(places)
        per_check = ("check", "above", "unread", "continues")
        kept: dict[str, Any] = {name: getattr(self, name)[columns] for name in per_check}
        return replace(self, reach=self.reach[[*columns, len(self.check)]], **kept)

    def extra(self, stops: Int[np.ndarray, " rows"]) -> float:
        """What a row pays on average beyond its share of full batches.

        Batches are drawn at random from these rows, so that a piece that a share p of them needs
        is paid by 1 - (1 - p)^rows of the batches.

        Args:
            stops: place of each row's exit, K for a row that never stops.
        """
        checks = len(self.check)
        at = np.bincount(stops, minlength=checks + 1) / len(stops)
        reached = at[::-1].cumsum()[::-1]  # at that place or later
        away = (at[:checks] * self.continues).cumsum()  # as single tokens, in the blocks from there
        going = float(away[-1])
        return (
            self._more(reached, np.diff(self.reach, prepend=0.0))
            + self._more(reached[:checks], self.check)
            + self._more(away, -np.diff(self.above, append=0.0))
            + self._more(at[:checks], self.unread)
            + self._more(np.array([at[checks] + going]), np.array([self.last]))
            + self._more(np.array([going]), np.array([self.first]))
        )

    def _more(self, share: NDArray[np.float64], once: NDArray[np.float64]) -> float:
        some = 1 - (1 - share) ** self.rows
        return float(((some - share) * once).sum() / self.rows)
