"""The measures of confidence that decide an exit, in one registry.

A measure is added here, or from anywhere with `register_measure`: `calibrate --measure NAME`, the
runtime, tables, figures and cards use the registry. Independent of models, policies and files.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lspade_train.errors import PolicyError
from lspade_train.probes.metrics import entropy


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A measure of how confident a distribution over tokens is.

    Attributes:
        name: name in `calibrate --measure`, `policy.json` and tables.
        function: maps logits (..., tokens), where -inf excludes a token, to one fp32 value per
            row; None if it is not a function of one distribution (a learned gate, a fixed exit).
        lower_is_sure: whether low values mean confident, as for an entropy.
        bounds: lowest and highest value for a given number of tokens, `math.inf` if unknown.
        unit: unit of the values, such as nats; "" for none.
    """

    name: str
    function: Callable[[Float[Tensor, "*rows tokens"]], Float[Tensor, "*rows"]] | None
    lower_is_sure: bool
    bounds: Callable[[float], tuple[float, float]]
    unit: str = ""

    def ends(self, tokens: int) -> tuple[float, float]:
        """The values of a certain and of a uniform distribution over `tokens`."""
        low, high = self.bounds(tokens)
        return (low, high) if self.lower_is_sure else (high, low)

    def is_sure(self, values: Float[Tensor, "*rows"], limit: float) -> Tensor:
        """Which values are at the threshold or more confident; never true for NaN."""
        return values <= limit if self.lower_is_sure else values >= limit

    @property
    def relation(self) -> str:
        """How a value that exits compares to its threshold, in words."""
        return "at or under" if self.lower_is_sure else "at or over"


GATED = "gate"
"""The learned gate's doubt: computed by `policies.gate` from more than one distribution."""

FIXED = "fixed"
"""No check: every row that reaches the layer exits there."""

MEASURES: dict[str, Measure] = {}


def register_measure(measure: Measure) -> Measure:
    """Register a measure under its name.

    Raises:
        PolicyError: the name is taken.
    """
    if measure.name in MEASURES:
        raise PolicyError(
            f"A measure named {measure.name!r} is registered already. Choose another name."
        )
    MEASURES[measure.name] = measure
    return measure


def find_measure(name: str) -> Measure:
    """The measure with that name.

    Raises:
        PolicyError: no measure has that name.
    """
    if name not in MEASURES:
        raise PolicyError(
            f"measure is {name!r}; expected {', '.join(MEASURES)}, or one that was added with "
            "register_measure."
        )
    return MEASURES[name]


def signal(logits: Float[Tensor, "*rows tokens"], measure: str) -> Float[Tensor, "*rows"]:
    """The confidence of each row, in fp32, over the tokens given.

    Args:
        logits: over the vocabulary or over the choices; -inf excludes a token.
        measure: name of a registered measure.
    """
    function = find_measure(measure).function
    if function is None:
        raise PolicyError(f"The measure {measure} is not a function of one distribution's logits.")
    return function(logits)


def _max_prob(logits: Float[Tensor, "*rows tokens"]) -> Float[Tensor, "*rows"]:
    """Probability of the most likely token."""
    return logits.float().softmax(-1).amax(-1)


def _margin(logits: Float[Tensor, "*rows tokens"]) -> Float[Tensor, "*rows"]:
    """Probability of the most likely token minus that of the second."""
    top = logits.float().softmax(-1).topk(min(2, logits.shape[-1])).values
    return top[..., 0] - top[..., 1:].sum(-1)


def _nats(tokens: float) -> tuple[float, float]:
    return 0.0, math.log(tokens)


def _probability(tokens: float) -> tuple[float, float]:  # noqa: ARG001
    return 0.0, 1.0


register_measure(
    Measure(name="entropy", function=entropy, lower_is_sure=True, bounds=_nats, unit="nats")
)
register_measure(Measure(name="margin", function=_margin, lower_is_sure=False, bounds=_probability))
register_measure(
    Measure(name="max_prob", function=_max_prob, lower_is_sure=False, bounds=_probability)
)
register_measure(Measure(name=GATED, function=None, lower_is_sure=True, bounds=_probability))
register_measure(Measure(name=FIXED, function=None, lower_is_sure=True, bounds=_probability))
