"""`Drafting`: which layer drafts tokens for the model to verify; `drafting.json` beside the heads.

Also the expected cost and gain of a draft, from which its length is chosen.
Independent of models.
"""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self, get_args

from lspade_train.errors import PolicyError
from lspade_train.io.fetch import local_folder
from lspade_train.io.layout import DRAFTING
from lspade_train.io.storage import read_versioned, require_kinds, write_json
from lspade_train.policies.policy import Reader

FORMAT_VERSION = 1
REMEDY = "Choose one with lspade-train calibrate --for generate."

MOST_TOKENS = 64

START, PRIOR, DECAY = 0.8, 2.0, 0.95
"""Prior acceptance, the number of drafts it counts as, and the decay of counts per verification.

Counts decay, so that drafting is tried again after a passage where it did not pay.
"""


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """Lossless decoding: a head at a lower layer drafts tokens, the full model verifies them.

    Attributes:
        layer: l, 0..L-1. Drafted tokens run through blocks 1..l one by one, and through the blocks
            above together.
        tokens: most drafts per verification, 1 to 64. The number in use adapts to the acceptance
            seen.
        confidence: drafting stops when the product of the head's top probabilities over the draft
            (in a batch, its mean over the rows) is under this; 0 never stops. Our default.
        reader: which head drafts: `tuned_lens` (heads fitted with target final), `l-spade`, or
            `logit_lens` (no head); None: the first of these that there is at the layer.
        calibration: free-form record of how it was chosen.

    Raises:
        PolicyError: a value out of range.

    Source: arXiv:2404.16710 (LayerSkip), self-speculative decoding; here without retraining.
    """

    layer: int
    tokens: int = 8
    confidence: float = 0.4
    reader: Reader | None = None
    calibration: dict[str, Any] = field(default_factory=dict[str, Any], repr=False)

    def __post_init__(self) -> None:
        given: dict[str, Any] = vars(self)
        for name, kind, least, most, words in (
            ("layer", int, 0, math.inf, "0 or more"),
            ("tokens", int, 1, MOST_TOKENS, f"1 to {MOST_TOKENS}"),
            ("confidence", int | float, 0, math.nextafter(1, 0), "0 or more and under 1"),
        ):
            value = given[name]
            kin = isinstance(value, kind) and not isinstance(value, bool)
            if not (kin and least <= value <= most):
                raise PolicyError(f"{name} is {value!r}; expected {words}. {REMEDY}")
        if self.reader not in (*get_args(Reader), None):
            raise PolicyError(
                f"reader is {self.reader!r}; expected {', '.join(get_args(Reader))} or None. "
                f"{REMEDY}"
            )

    def check_fit(self, num_layers: int) -> None:
        """Refuse a layer that a model of `num_layers` blocks cannot draft at.

        Raises:
            PolicyError: the layer is L or above.
        """
        if self.layer >= num_layers:
            raise PolicyError(
                f"Drafting at layer {self.layer}; this model's layers that can draft go from 0 to "
                f"{num_layers - 1}. {REMEDY}"
            )

    def save(self, folder: Path) -> None:
        """Write `drafting.json`.

        Raises:
            PolicyError: the folder cannot be written.
        """
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        write_json(
            Path(folder) / DRAFTING, {"format_version": FORMAT_VERSION, **values}, PolicyError
        )

    @classmethod
    def from_pretrained(cls, path: str | Path, revision: str | None = None) -> Self:
        """The `drafting.json` in a heads folder, or in a repository of the Hub.

        Args:
            path: folder such as `checkpoints/arc`, a URL, or `org/name`.
            revision: branch, tag or commit on the Hub.

        Raises:
            PolicyError: none there, malformed, or of an unknown format.
            HubError: neither a folder nor a repository that can be read.
        """
        file = local_folder(path, revision) / DRAFTING
        values = read_versioned(file, FORMAT_VERSION, PolicyError, REMEDY)
        unknown = values.keys() - {item.name for item in fields(cls)}
        if unknown:
            raise PolicyError(f"{file} has the unknown key {min(unknown)!r}. {REMEDY}")
        kinds = {"layer": int, "calibration": dict}
        require_kinds({"calibration": {}, **values}, kinds, file, PolicyError, REMEDY)
        return cls(**values)


@dataclass(frozen=True)
class DraftCosts:
    """Costs of drafting and verifying, in any unit.

    A verification of several tokens is taken to cost as much as one token, as it does where time
    is spent on reading weights. This makes `speedup` a ceiling.

    Attributes:
        below: blocks 1..l for one token.
        above: blocks l+1..L, once for all tokens of a verification.
        readout: final norm and unembedding, once for each draft and once for a verification.
    """

    below: float
    above: float
    readout: float

    def of(self, drafts: int) -> float:
        """One verification and its drafts: `drafts + 1` tokens run through blocks 1..l."""
        return (drafts + 1) * self.below + drafts * self.readout + self.above + self.readout

    def speedup(self, acceptance: float, drafts: int) -> float:
        """Plain decoding's cost per token over that of rounds of so many drafts."""
        return expected_tokens(acceptance, drafts) * self.of(0) / self.of(drafts)

    def best(self, acceptance: float, most: int) -> int:
        """How many drafts make a token cheapest; 0: plain decoding does."""
        return max(range(most + 1), key=lambda drafts: self.speedup(acceptance, drafts))


def expected_tokens(acceptance: float, drafts: int) -> float:
    """Expected tokens per verification if each draft is accepted with probability `acceptance`.

    Those before the first rejected one, and the model's own in its place: 1 + a + ... + a^drafts.

    Source: arXiv:2211.17192, equation 1.
    """
    return sum(acceptance**count for count in range(drafts + 1))


class DraftLength:
    """How many tokens to draft next, given the acceptance seen so far.

    Args:
        costs: of drafting and verifying.
        most: upper limit.
    """

    def __init__(self, costs: DraftCosts, most: int) -> None:
        self.costs, self.most = costs, most
        self._accepted = self._tried = 0.0

    @property
    def acceptance(self) -> float:
        """Estimated probability that a draft is accepted."""
        return (START * PRIOR + self._accepted) / (PRIOR + self._tried)

    @property
    def next(self) -> int:
        """Drafts before the next verification; 0 where drafting does not pay."""
        return self.costs.best(self.acceptance, self.most)

    def update(self, accepted: int, rejected: int) -> None:
        """Count the drafts of a verification; those after a rejected one do not count."""
        self._accepted = DECAY * self._accepted + accepted
        self._tried = DECAY * self._tried + accepted + rejected
