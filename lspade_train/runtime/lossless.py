"""Several tokens that are the full model's own, some of them drafted at a lower layer.

Self-speculative decoding with a frozen model, as LayerSkip's (arXiv:2404.16710) without its
training. A head reads h^l and drafts a token, blocks 1..l take it in and the head reads again;
then blocks l+1..L take all drafted tokens at once, and those stand that the model would have
chosen. Blocks 1..l are the drafter and the model's own lower half: nothing is computed or kept
twice, and a draft that falls costs what ran for it and nothing else.

Rows of a batch may keep different numbers of tokens: their keys and values are then moved to end
in the same column, so that a batch stays padded on the left. That copies the cache, as appending
to it does anyway, and no row waits for another. What the rows of a batch share is the number of
drafts: drafting stops where it does not pay for the batch.
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
    """A head at layer l, and what its drafts cost and came to so far.

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
        """Feed a token per row and draft behind it.

        Returns:
            h^l of the tokens fed, (rows, fed, d); the tokens, the given one first, (rows, fed); and
            what the drafts were drawn from, (rows, fed - 1, vocab), None where nothing was drawn.
        """
        fed, states, drawn = [tokens], [rows.lower(tokens)], list[Tensor]()
        sure = torch.ones(len(tokens), device=tokens.device)
        while len(fed) <= most:
            logits = self.read(states[-1][:, 0])
            # Asked before the token is drawn: a draft dropped for what it is would change the
            # distribution of those that are left.
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
    """Rows of a batch, their keys and values, and tokens that only the lower blocks have seen."""

    def __init__(self, adapter: ModelAdapter, batch: Batch, layer: int) -> None:
        self.adapter, self.layer = adapter, layer
        self.mask = batch.mask
        # Whole layers where the model needs a window of them, too: its masks do the rest, and what
        # has left a window for a draft that fell could not come back.
        self.cache = DynamicCache()
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        plan = adapter.plan_cached(batch.ids, self.mask, positions, self.cache)
        hidden = plan.hidden
        for block in range(adapter.num_layers):
            hidden = adapter.run_block(plan, block, hidden)
        self.last = hidden[:, -1:]
        self.fed = 0
        # The decoder sizes its masks by the first layers: here these are as long as those above.
        self.upper = copy.copy(self.cache)
        self.upper.layers = [*[self._layers[layer]] * layer, *self._layers[layer:]]

    def lower(self, tokens: Int[Tensor, " rows"]) -> Float[Tensor, "rows 1 d"]:
        """Feed one token per row to blocks 1..l: its h^l."""
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
        """Feed to the blocks above what those below have seen: the model's logits."""
        where = self.mask.sum(-1, keepdim=True) + torch.arange(self.fed, device=self.mask.device)
        plan = self.adapter.plan_cached(tokens, self._mask, where, self.upper)
        for block in range(self.layer, self.adapter.num_layers):
            hidden = self.adapter.run_block(plan, block, hidden)
        return self.adapter.unembed(hidden)

    def keep(self, places: Int[Tensor, " kept"], tokens: Int[Tensor, " kept"]) -> None:
        """Keep some of the rows, and of what each was fed its first tokens."""
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
    """One row's new tokens, and what came of its drafts."""

    def __init__(self, index: int, nats: float) -> None:
        self.index, self.nats = index, nats
        self.tokens: list[int] = []
        self.drafted = self.accepted = self.verifications = 0

    def add(self, drafts: Sequence[int], following: int, ends: Sequence[int]) -> list[int]:
        """What is new in the text: the drafts that stand and what follows, or up to its end."""
        new = [*drafts, following]
        new = new[: next((i for i, token in enumerate(new, 1) if token in ends), len(new))]
        self.tokens += new
        self.accepted += min(len(new), len(drafts))
        return new

    def finished(self, layer: int, size: int) -> Generation:
        """What is known of it at its end."""
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
        drafter: head and settings; it learns from each verification.
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
        for place, (text, drafted, stood, last) in enumerate(added):
            for token in text.add(drafted[:stood], last, adapter.end_tokens):
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
        drafter.length.saw(int(accepted.sum()), int((accepted < drafts.shape[1]).sum()))
        for text in texts:
            text.drafted += drafts.shape[1]
            text.verifications += 1


def draft_costs(adapter: ModelAdapter, layer: int) -> DraftCosts:
    """What a round costs in weights read, in blocks of the mean size.

    A mixture of experts counts with all of them, of which a token reads some.
    """
    sizes = [sum(p.numel() for p in block.parameters()) for block in adapter.blocks]
    each = sum(sizes) / len(sizes)
    weight = adapter.unembed.weight
    return DraftCosts(sum(sizes[:layer]) / each, sum(sizes[layer:]) / each, weight.numel() / each)


def why_plain(adapter: ModelAdapter, longest: int) -> str | None:
    """Why texts of up to `longest` tokens are to be decoded plainly; None: drafts can be verified.

    Several tokens at once behind a cache must give what one after the other does. (A model with
    recurrent states, which no draft could be taken back from, has no adapter.)
    """
    return prefix_refusal(adapter, longest)
