"""Several tokens after an early exit: below it the whole context, above it the answer alone.

Beyond the paper, which answers in one token and names this its first open question. Each prompt
keeps the exit layer l that its first token was decided at. Blocks 1..l see and cache everything;
blocks l+1..L see and cache the start token, the prompt's last token and the tokens generated so
far. With l = L this is plain generation, token for token.

Limits: above l the prompt is gone for every token, so that agreement with the full model falls
with each token and with how early the exit is; the layer is never chosen anew, and a policy's
calibrated guarantee covers the first token only.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from lspade_train.errors import NumericsError, PolicyError
from lspade_train.models import ModelAdapter
from lspade_train.policies.gate import Reading
from lspade_train.policies.policy import ExitPolicy
from lspade_train.probes.metrics import entropy
from lspade_train.runtime.batching import Batch
from lspade_train.runtime.decide import Probe

Pick = Callable[[Float[Tensor, "rows vocab"]], Int[Tensor, " rows"]]
Listener = Callable[[int, int], object]


@dataclass(frozen=True)
class Drafts:
    """What was drafted and verified for one prompt, after its first token.

    Attributes:
        drafted: tokens.
        accepted: of these, tokens that are in the text.
        verifications: runs through the upper blocks.
        tokens_per_verification: new tokens from one of them, 1 in plain decoding.
    """

    drafted: int
    accepted: int
    verifications: int
    tokens_per_verification: float


@dataclass(frozen=True)
class Generation:
    """The tokens generated for one prompt.

    Attributes:
        token_ids: generated tokens, the end-of-text token included where it came.
        text: the tokens' text, without special tokens; None without a tokenizer.
        layer: exit layer of every token; L is the full model.
        entropy: nats, of the check that stopped the prompt, or of the model's first token.
        exited: whether it stopped below L.
        cache_bytes: keys and values held for this row when it ended.
        drafts: what was drafted and verified for it; None where nothing was to be drafted.
    """

    token_ids: tuple[int, ...]
    text: str | None
    layer: int
    entropy: float
    exited: bool
    cache_bytes: int
    drafts: Drafts | None = None


class Group:
    """Rows that left the same batch at the same layer, from then on decoded together."""

    def __init__(
        self,
        probe: Probe,
        batch: Batch,
        rows: Int[Tensor, " rows"],
        layer: int,
        below: DynamicCache,
    ) -> None:
        self.probe, self.batch, self.layer, self.below = probe, batch, layer, below
        self.adapter = probe.adapter
        self.rows = rows
        self.mask = batch.mask[rows]
        self.entropy: list[float] = []
        # With any other decoder a head answers at the exit, and no block above it runs.
        exits = layer < self.adapter.num_layers
        continues = exits and probe.policy.decoder_at(layer) == "spade"
        self.above = _answer_cache(self.adapter, batch.starts[rows], layer) if continues else None
        self.seen = 1  # tokens in `above`
        self.alone = self.mask.sum(-1) == 1  # prompts of a start token, which `above` has already

    def start(
        self, hidden: Float[Tensor, "rows d"], checked: Float[Tensor, "rows vocab"] | None
    ) -> tuple["Group", Float[Tensor, "rows vocab"]]:
        """Itself and the logits of the first new token, from h^l of the prompts' last ones."""
        logits = self.climb(hidden, self.batch.ids[self.rows, -1])
        self.entropy = entropy(logits if checked is None else checked).tolist()
        return self, logits

    def climb(
        self, hidden: Float[Tensor, "rows d"], tokens: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows vocab"]:
        """From h^l of each row's newest token to the logits of its next one."""
        if self.layer < self.adapter.num_layers and self.above is None:
            return self.probe.exit_logits(None, hidden, self.layer, self.batch, self.rows)
        states = hidden[:, None]
        if self.above is not None:
            where = self.mask.sum(-1, keepdim=True) - 1
            if self.probe.policy.positions == "compact":
                where = torch.full_like(where, self.seen)
            self.seen += 1
            mask = self.mask.new_ones(len(tokens), self.seen)
            mask[:, 0] = (~self.alone).to(mask.dtype)  # by index, a GPU would be waited for
            plan = self.adapter.plan_cached(tokens[:, None], mask, where, self.above)
            for block in range(self.layer, self.adapter.num_layers):
                states = self.adapter.run_block(plan, block, states)
        return self.probe.read(states[:, 0], self.batch, self.rows)

    def step(self, tokens: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocab"]:
        """Feed one token per row; the logits of the next ones."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        # With no block below there is no cache to lengthen, and the mask covers the token alone.
        mask, cache = (self.mask, self.below) if self.layer else (self.mask[:, -1:], None)
        where = self.mask.sum(-1, keepdim=True) - 1
        plan = self.adapter.plan_cached(tokens[:, None], mask, where, cache)
        hidden = plan.hidden
        for block in range(self.layer):
            hidden = self.adapter.run_block(plan, block, hidden)
        return self.climb(hidden[:, 0], tokens)

    def keep(self, places: Int[Tensor, " kept"]) -> None:
        """Drop the other rows, which have ended."""
        places = places.to(self.mask.device)
        self.rows, self.mask = self.rows[places.cpu()], self.mask[places]
        self.alone = self.alone[places]
        for cache in (self.below, self.above):
            if cache is not None:
                _select(cache, places)

    @property
    def bytes_per_row(self) -> int:
        """Keys and values of one row, below and above the exit."""
        held = [layer for layer in _layers(self.below) if layer.keys is not None]
        held += [] if self.above is None else _layers(self.above)[self.layer :]
        sizes = (layer.keys.nbytes + layer.values.nbytes for layer in held)
        return sum(sizes) // max(len(self.rows), 1)


@torch.no_grad()
def generate_batch(
    probe: Probe,
    batch: Batch,
    pick: Pick,
    *,
    max_new_tokens: int,
    ends: Sequence[int],
    listen: Listener,
) -> dict[int, Generation]:
    """Continue every row of a batch; its exit groups are decoded one after the other.

    Args:
        probe: model, heads and policy, of scope `vocabulary`.
        batch: prompts.
        pick: chooses the next tokens from logits.
        max_new_tokens: most tokens per row.
        ends: tokens that end a row.
        listen: called with (prompt index, token) as tokens come.

    Returns:
        By prompt index; `text` is left None.

    Raises:
        NumericsError: logits are NaN.
    """
    found: dict[int, Generation] = {}
    # Every prompt is read before the first group is continued: prompts cost most, and together.
    for group, logits in list(_prefill(probe, batch)):
        nats = dict(zip(group.rows.tolist(), group.entropy, strict=True))
        for row, tokens, size in _decode(group, logits, pick, max_new_tokens, ends, listen):
            exited = group.layer < probe.adapter.num_layers
            index = batch.queries[row].index
            found[index] = Generation(tuple(tokens), None, group.layer, nats[row], exited, size)
    return found


def check_tokens(max_new_tokens: int) -> None:
    """Refuse to generate nothing.

    Raises:
        PolicyError: under 1 token.
    """
    if max_new_tokens < 1:
        raise PolicyError(f"max_new_tokens is {max_new_tokens}; expected 1 or more.")


def check_policy(policy: ExitPolicy) -> None:
    """Refuse a policy that cannot be followed without choices and groups.

    Raises:
        PolicyError: it is of scope `choices`, or for some groups.
    """
    policy.require_no_groups("generate")
    if policy.scope == "choices":
        raise PolicyError(
            "This policy checks a task's choices, and free text has none. Calibrate one of scope "
            "vocabulary with lspade-train calibrate."
        )


def _prefill(probe: Probe, batch: Batch) -> Iterator[tuple[Group, Tensor]]:
    """Run the prompts, and yield each group with its first logits as its rows leave."""
    adapter, policy = probe.adapter, probe.policy
    adapter.refresh()
    cache = DynamicCache(config=adapter.model.config)
    positions = (batch.mask.cumsum(-1) - 1).clamp(min=0)
    plan = adapter.plan_cached(batch.ids, batch.mask, positions, cache)
    hidden, inside = plan.hidden, torch.arange(len(batch.queries))
    before: Reading | None = None
    for block in range(adapter.num_layers):
        if block in policy.check_layers:
            found = probe.check(hidden[:, -1], block, batch, inside, before)
            leaving = policy.exits(found.value, block).to(hidden.device)
            out, stay = leaving.nonzero()[:, 0], (~leaving).nonzero()[:, 0]
            if len(out):
                rows = inside[out.cpu()]
                group = Group(probe, batch, rows, block, _copy(cache, out))
                seen = next(iter(found.logits.values()), None)
                seen = None if seen is None else seen[out.to(seen.device)]
                yield group.start(hidden[out, -1], seen)
                _select(cache, stay)
                hidden, plan, inside = hidden[stay], plan.select(stay), inside[stay.cpu()]
            before = None if found.reading is None else found.reading.rows(stay)
        if not len(inside):
            return
        hidden = adapter.run_block(plan, block, hidden)
    group = Group(probe, batch, inside, adapter.num_layers, cache)
    yield group.start(hidden[:, -1], None)


def _decode(
    group: Group, logits: Tensor, pick: Pick, most: int, ends: Sequence[int], listen: Listener
) -> Iterator[tuple[int, list[int], int]]:
    """Rows as they end: row, tokens, bytes of its keys and values."""
    written: dict[int, list[int]] = {row: [] for row in group.rows.tolist()}
    for count in range(1, most + 1):
        require_numbers(logits, [group.batch.queries[row].index for row in group.rows.tolist()])
        tokens = pick(logits).to(group.mask.device)
        size, ended = group.bytes_per_row, torch.full(tokens.shape, count == most)
        for place, (row, token) in enumerate(
            zip(group.rows.tolist(), tokens.tolist(), strict=True)
        ):
            written[row].append(token)
            listen(group.batch.queries[row].index, token)
            ended[place] |= token in ends
            if ended[place]:
                yield row, written[row], size
        if ended.all():
            return
        if ended.any():
            stay = (~ended).nonzero()[:, 0].to(tokens.device)
            group.keep(stay)
            tokens = tokens[stay]
        logits = group.step(tokens)


def require_numbers(logits: Float[Tensor, "rows values"], prompts: Sequence[int]) -> None:
    """Refuse NaN.

    Args:
        logits: of each row.
        prompts: index of each row's prompt.

    Raises:
        NumericsError: some are NaN.
    """
    broken = logits.isnan().any(-1)
    if broken.any():
        raise NumericsError(
            f"The model's logits are NaN for prompt {prompts[int(broken.nonzero()[0, 0])] + 1}. "
            "Load the model in a wider dtype (bfloat16 or float32)."
        )


def _answer_cache(adapter: ModelAdapter, starts: Int[Tensor, " rows"], layer: int) -> DynamicCache:
    """A cache that holds each row's start token at every block above `layer`.

    The decoder sizes its masks by the first layer of each kind (full or sliding), so the blocks
    below, which never run on this cache, show it the first one above of their own kind.
    """
    known = [adapter.start_cache(int(token)) for token in starts]

    def of_rows(block: int) -> Any:
        same = [_layers(start)[block] for start in known]
        one = copy.copy(same[0])
        one.keys = torch.cat([start.keys for start in same])
        one.values = torch.cat([start.values for start in same])
        return one

    upper = [of_rows(block) for block in range(layer, adapter.num_layers)]
    cache = copy.copy(known[0])
    shown: list[Any] = []
    for block, below in enumerate(_layers(cache)[:layer]):
        alike = [one for one in upper if type(one) is type(below)]
        shown.append(alike[0] if alike else of_rows(block))
    cache.layers = [*shown, *upper]
    return cache


def _copy(cache: DynamicCache, rows: Int[Tensor, " rows"]) -> DynamicCache:
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    _select(other, rows)
    return other


def _select(cache: DynamicCache, rows: Int[Tensor, " rows"]) -> None:
    # Once each: the layers under an answer cache are those above it.
    for layer in {id(layer): layer for layer in _layers(cache)}.values():
        if layer.keys is not None and len(layer.keys):
            layer.batch_select_indices(rows.to(layer.keys.device))


def _layers(cache: DynamicCache) -> list[Any]:
    """Its layers, each with keys and values: the adapter's check refuses models of other kinds."""
    return list(cache.layers)
