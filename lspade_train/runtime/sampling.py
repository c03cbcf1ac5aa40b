"""Choosing tokens from logits, and speculative sampling. Knows nothing of models."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lspade_train.errors import PolicyError


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0; else from the smallest set of tokens that holds `top_p`.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token.
        top_p: probability that is kept, over 0 up to 1.
        generator: source of randomness, on the model's device.

    Raises:
        PolicyError: a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise PolicyError(
                f"temperature {self.temperature}, top_p {self.top_p}: expected 0 or more, and "
                "over 0 up to 1."
            )

    def pick(self, logits: Float[Tensor, "rows vocab"]) -> Int[Tensor, " rows"]:
        """The next tokens."""
        return self.draft(logits)[0]

    def draft(
        self, logits: Float[Tensor, "rows vocab"]
    ) -> tuple[Int[Tensor, " rows"], Float[Tensor, "rows vocab"] | None]:
        """The next tokens, and what they were drawn from; None where nothing is drawn."""
        if self.temperature == 0:
            return logits.argmax(-1), None
        probabilities = self._probabilities(logits)
        return self._draw(probabilities), probabilities

    def verify(
        self,
        logits: Float[Tensor, "rows fed vocab"],
        drafts: Int[Tensor, "rows drafts"],
        drawn_from: Float[Tensor, "rows drafts vocab"] | None,
    ) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
        """How many drafts of each row are accepted, and the token that follows them.

        Greedy: those before the first one that is not the model's own choice. Otherwise
        speculative sampling: the accepted tokens and the next one have the model's distribution.

        Args:
            logits: the model's, at the token before the drafts and at each of them.
            drafts: drafted tokens.
            drawn_from: distributions that `draft` gave with them; None where there are no drafts.

        Source: arXiv:2211.17192, algorithm 1.
        """
        if self.temperature == 0:
            own = logits.argmax(-1)
            accepted = (own[:, :-1] == drafts).long().cumprod(-1).sum(-1)
            return accepted, own.gather(1, accepted[:, None])[:, 0]
        own = self._probabilities(logits)
        drawn_from = own[:, :0] if drawn_from is None else drawn_from
        at = drafts[..., None]
        theirs, ours = drawn_from.gather(-1, at)[..., 0], own[:, :-1].gather(-1, at)[..., 0]
        chance = torch.rand(theirs.shape, device=theirs.device, generator=self.generator)
        accepted = (chance * theirs < ours).long().cumprod(-1).sum(-1)
        row = torch.arange(len(accepted), device=accepted.device)
        # After the last draft nothing was drafted: the residual is the model's own distribution.
        drafted = torch.cat([drawn_from, torch.zeros_like(own[:, :1])], dim=1)
        residual = (own - drafted)[row, accepted].clamp(min=0)
        # It may be all zeros where both distributions are equal up to rounding.
        residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, own[row, accepted])
        return accepted, self._draw(residual)

    def _probabilities(self, logits: Tensor) -> Tensor:
        probabilities = (logits.float() / self.temperature).softmax(-1)
        if self.top_p == 1:
            return probabilities
        ranked, order = probabilities.sort(descending=True)
        before = ranked.cumsum(-1) - ranked
        kept = torch.zeros_like(ranked).scatter(
            -1, order, ranked.masked_fill(before >= self.top_p, 0.0)
        )
        return kept / kept.sum(-1, keepdim=True)

    def _draw(self, weights: Float[Tensor, "rows vocab"]) -> Int[Tensor, " rows"]:
        return torch.multinomial(weights, 1, generator=self.generator)[:, 0]
