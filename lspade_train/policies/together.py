"""Costs that the rows of a batch share, if they exit at different layers.

A block takes nearly as long for one single-token row as for eight, since most of the time goes into
reading weights. Works on arrays only: independent of models and of how anything was measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Together:
    """Fixed costs per batch for each piece of work, for any number of rows that need it.

    `ExitCosts` divides these costs evenly among the rows of a full batch, as if all needed it. If
    some have exited, the others pay their share, too. K check layers, in the unit of the costs.

    Attributes:
        rows: rows in a batch.
        reach: cost in the blocks up to each check layer, then up to the last block, (K+1,).
        check: cost in the check at each check layer, (K,).
        above: cost in the single-token blocks from each check layer up, (K,).
        unread: cost in a head's answer that its check has not computed, (K,).
        continues: whether a row that exits there continues as a single token, (K,).
        last: cost in the answer after the last block.
        first: cost in the first exit of a batch that continues.
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
        """A row's average cost beyond its share of full batches.

        Batches are drawn at random from these rows, so a piece that a fraction p of them needs is
        paid by 1 - (1 - p)^rows of the batches.

        Args:
            stops: index of each row's exit, K for a row that never exits.
        """
        checks = len(self.check)
        at = np.bincount(stops, minlength=checks + 1) / len(stops)
        reached = at[::-1].cumsum()[::-1]  # at that index or later
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
