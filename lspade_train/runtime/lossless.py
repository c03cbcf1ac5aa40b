"""Self-speculative decoding: a lower layer drafts tokens, the full model verifies them.

As in LayerSkip (arXiv:2404.16710), but without retraining the model. A head reads h^l and drafts a
token, blocks 1..l run on that token, and the head drafts the next one; then blocks l+1..L run on
all drafted tokens at once, and the drafts that the full model agrees with are accepted. Blocks 1..l
are both the drafter and the lower part of the model: their hidden states, keys and values are
reused, and there is no separate draft cache.

Rows of a batch may accept different numbers of drafts. Their keys and values are then shifted to
end in the same column, so that the batch stays padded on the left and no row waits for another.
This copies the cache once per verification, as appending to it does anyway. The number of tokens
drafted is the same for all rows.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from lspade_train.models import ModelAdapter, prefix_refusal
from lspade_train.policies.drafting import DraftCosts, Drafting, DraftLength
from lspade_train.policies.readers import draft_reader
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.metrics import entropy
from lspade_train.runtime.batching import Batch
from lspade_train.runtime.generate import Drafts, Generation, Listener, require_numbers
from lspade_train.runtime.sampling import Sampling


class Drafter:
    """The head that drafts, and how long its drafts should be.

    Args:
        adapter: the model.
        heads: its heads, of which the drafting may name one; None: the logit lens.
        drafting: the settings.

    Raises:
        PolicyError: a layer the model does not have, or heads that are not there.
        ArtifactError: no head at the layer.
    """

    def __init__(
        self, adapter: ModelAdapter, heads: LSpadeHeads | None, drafting: Drafting
    ) -> None:
        drafting.check_fit(adapter.num_layers)
        self.adapter, self.drafting = adapter, drafting
        self.reader = draft_reader(drafting, heads)
        self.length = DraftLength(draft_costs(adapter, drafting.layer), drafting.tokens)
        self.ends = torch.tensor(adapter.end_tokens, device=adapter.device)

    def read(self, hidden: Float[Tensor, "rows d"]) -> Float[Tensor, "rows vocab"]:
        """The head's logits."""
        if self.reader is not None:
            hidden = self.reader.translate(hidden, self.drafting.layer).to(hidden.dtype)
        return self.adapter.unembed(hidden)

    def draft(
        self, rows: "Rows", tokens: Int[Tensor, " rows"], most: int, sampling: Sampling
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run the lower blocks on one token per row, then draft up to `most` tokens after it.

        Returns:
            h^l of the tokens fed, (rows, fed, d); the tokens, the given one first, (rows, fed); and
            what the drafts were drawn from, (rows, fed - 1, vocab), None where nothing was drawn.
        """
        fed, states, drawn = [tokens], [rows.lower(tokens)], list[Tensor]()
        sure = torch.ones(len(tokens), device=tokens.device)
        while len(fed) <= most:
            logits = self.read(states[-1][:, 0])
            # Decided before the token is drawn: a stopping rule that looks at the drawn token
            # would bias the distribution of the text.
            sure = sure * logits.float().softmax(-1).amax(-1).to(sure.device)
            if not sure.mean() >= self.drafting.confidence:  # also where it is NaN
                break
            token, drawn_from = sampling.draft(logits)
            token = token.to(tokens.device)
            drawn += [] if drawn_from is None else [drawn_from]
            fed.append(token)
            states.append(rows.lower(token))
            sure = sure.masked_fill(torch.isin(token, self.ends), 0.0)  # the text ends there
        return torch.cat(states, 1), torch.stack(fed, 1), torch.stack(drawn, 1) if drawn else None


class Rows:
    """Rows of a batch and their cache, in which the lower blocks may be ahead of the upper ones."""

    def __init__(self, adapter: ModelAdapter, batch: Batch, layer: int) -> None:
        self.adapter, self.layer = adapter, layer
        self.mask = batch.mask
        # Without a config every layer keeps all tokens, also where attention is through a sliding
        # window (the model's masks apply it): tokens that a window drops for a draft could not be
        # restored when that draft is rejected.
        self.cache = DynamicCache()
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        plan = adapter.plan_cached(batch.ids, self.mask, positions, self.cache)
        hidden = plan.hidden
        for block in range(adapter.num_layers):
            hidden = adapter.run_block(plan, block, hidden)
        self.last = hidden[:, -1:]
        self.fed = 0
        # The decoder sizes its masks by the first layer, which here must be as long as the upper
        # ones.
        self.upper = copy.copy(self.cache)
        self.upper.layers = [*[self._layers[layer]] * layer, *self._layers[layer:]]

    def lower(self, tokens: Int[Tensor, " rows"]) -> Float[Tensor, "rows 1 d"]:
        """Run blocks 1..l on one more token per row; returns its h^l."""
        where = self.mask.sum(-1, keepdim=True) + self.fed
        self.fed += 1
        # With no block below there is no cache to lengthen, and the mask covers the token alone.
        mask, cache = (self._mask, self.cache) if self.layer else (self._mask[:, -1:], None)
        plan = self.adapter.plan_cached(tokens[:, None], mask, where, cache)
        hidden = plan.hidden
        for block in range(self.layer):
            hidden = self.adapter.run_block(plan, block, hidden)
        return hidden

    def verify(
        self, hidden: Float[Tensor, "rows fed d"], tokens: Int[Tensor, "rows fed"]
    ) -> Float[Tensor, "rows fed vocab"]:
        """Run blocks l+1..L on the tokens that the lower blocks have seen; the model's logits."""
        where = self.mask.sum(-1, keepdim=True) + torch.arange(self.fed, device=self.mask.device)
        plan = self.adapter.plan_cached(tokens, self._mask, where, self.upper)
        for block in range(self.layer, self.adapter.num_layers):
            hidden = self.adapter.run_block(plan, block, hidden)
        return self.adapter.unembed(hidden)

    def keep(self, places: Int[Tensor, " kept"], tokens: Int[Tensor, " kept"]) -> None:
        """Keep some of the rows, and of the tokens since the last verification each row's first."""
        lengths = self.mask[places].sum(-1) + tokens
        ends = self.mask.shape[1] + tokens  # column behind each row's last token
        width = int(lengths.max())
        column = torch.arange(width, device=ends.device)
        columns = (column + (ends - width)[:, None]).clamp(min=0)
        whole = len(places) == len(self.mask) and bool((ends == ends[0]).all())
        for layer in self._layers:
            for name in ("keys", "values"):
                held = getattr(layer, name)
                if whole:
                    held = held[:, :, int(ends[0]) - width : int(ends[0])]
                else:
                    rows, at = places.to(held.device), columns.to(held.device)
                    held = held[rows[:, None], :, at].transpose(1, 2)
                setattr(layer, name, held)
        self.mask = (column >= width - lengths[:, None]).long()
        self.fed = 0

    @property
    def bytes_per_row(self) -> int:
        """Keys and values of one row."""
        return sum(it.keys.nbytes + it.values.nbytes for it in self._layers) // len(self.mask)

    @property
    def _mask(self) -> Int[Tensor, "rows seen"]:
        return torch.nn.functional.pad(self.mask, (0, self.fed), value=1)

    @property
    def _layers(self) -> list[Any]:
        return list(self.cache.layers)


class Text:
    """One row's new tokens, and the counts of its drafts."""

    def __init__(self, index: int, nats: float) -> None:
        self.index, self.nats = index, nats
        self.tokens: list[int] = []
        self.drafted = self.accepted = self.verifications = 0

    def add(self, drafts: Sequence[int], following: int, ends: Sequence[int]) -> list[int]:
        """Append the accepted drafts and the next token, up to an end token; returns these."""
        new = [*drafts, following]
        new = new[: next((i for i, token in enumerate(new, 1) if token in ends), len(new))]
        self.tokens += new
        self.accepted += min(len(new), len(drafts))
        return new

    def finished(self, layer: int, size: int) -> Generation:
        """The result, once the row has ended."""
        rounds = self.verifications
        each = (len(self.tokens) - 1) / rounds if rounds else 1.0
        drafts = Drafts(self.drafted, self.accepted, rounds, each)
        return Generation(tuple(self.tokens), None, layer, self.nats, False, size, drafts)


@torch.no_grad()
def generate_lossless(
    drafter: Drafter,
    batch: Batch,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    listen: Listener,
) -> dict[int, Generation]:
    """Continue every row of a batch with the full model's tokens.

    Args:
        drafter: head and settings; its draft length adapts to what is accepted.
        batch: prompts.
        sampling: how tokens are chosen.
        max_new_tokens: most tokens per row.
        listen: called with (prompt index, token) as tokens come.

    Returns:
        By prompt index; `text` is left None.

    Raises:
        NumericsError: logits are NaN.
    """
    adapter = drafter.adapter
    rows = Rows(adapter, batch, drafter.drafting.layer)
    logits = adapter.unembed(rows.last)[:, 0]
    nats = entropy(logits).tolist()
    texts = [Text(query.index, n) for query, n in zip(batch.queries, nats, strict=True)]
    require_numbers(logits, [text.index for text in texts])
    following = sampling.pick(logits).to(adapter.device)
    drafts, accepted = following[:, None][:, :0], torch.zeros_like(following)
    found: dict[int, Generation] = {}
    while True:
        stay: list[int] = []
        added = zip(texts, drafts.tolist(), accepted.tolist(), following.tolist(), strict=True)
        for place, (text, drafted, count, last) in enumerate(added):
            for token in text.add(drafted[:count], last, adapter.end_tokens):
                listen(text.index, token)
            if len(text.tokens) < max_new_tokens and text.tokens[-1] not in adapter.end_tokens:
                stay.append(place)
            else:
                found[text.index] = text.finished(adapter.num_layers, rows.bytes_per_row)
        if not stay:
            return found
        places = torch.tensor(stay, device=following.device)
        rows.keep(places, (accepted + (rows.fed > 0))[places])
        texts, tokens = [texts[place] for place in stay], following[places]
        left = max_new_tokens - max(len(text.tokens) for text in texts)
        most = min(drafter.length.next, left - 1)
        hidden, fed, drawn_from = drafter.draft(rows, tokens, most, sampling)
        logits = rows.verify(hidden, fed)
        require_numbers(logits.flatten(1), [text.index for text in texts])
        drafts = fed[:, 1:]
        accepted, following = (
            it.to(adapter.device)
            for it in sampling.verify(logits, drafts.to(logits.device), drawn_from)
        )
        drafter.length.update(int(accepted.sum()), int((accepted < drafts.shape[1]).sum()))
        for text in texts:
            text.drafted += drafts.shape[1]
            text.verifications += 1


def draft_costs(adapter: ModelAdapter, layer: int) -> DraftCosts:
    """Costs in weights read; the unit is the mean block.

    All experts of a mixture are counted, although a token reads only some.
    """
    sizes = [sum(p.numel() for p in block.parameters()) for block in adapter.blocks]
    each = sum(sizes) / len(sizes)
    weight = adapter.unembed.weight
    return DraftCosts(sum(sizes[:layer]) / each, sum(sizes[layer:]) / each, weight.numel() / each)


def why_plain(adapter: ModelAdapter, longest: int) -> str | None:
    """Why texts of up to `longest` tokens cannot be verified in blocks; None: they can.

    Several tokens at once, after cached ones, must give the logits of one token at a time.
    (Models with recurrent states, which cannot be rolled back, are refused by the adapter.)
    """
    return prefix_refusal(adapter, longest)
